#!/usr/bin/env bash
# Train a small LayerSkip model on the Python standard library's own source, and Medusa and Hydra heads on text that
# it writes itself; then decode with each of them, without changing what is written.
# Usage: bash scripts/quickstart.sh [--fresh]
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""

runs=runs/quickstart
report=$runs/report
fresh=()
case "${1:-}" in
    "") ;;
    --fresh) fresh=(--fresh); rm -rf "$report" ;;
    *) echo "error: unknown argument '$1'; the only one is --fresh" >&2; exit 2 ;;
esac
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

train() { # accelerate gives a process on a CPU one thread unless told otherwise
    accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
        --num_cpu_threads_per_process "$(python -c "import torch; print(torch.get_num_threads())")" \
        -m train "recipes/quickstart/$1.yaml" "${fresh[@]}"
}

train layerskip
# heads learn best from what their model writes itself
python -m scripts.regenerate --model $runs/layerskip/export --dataset recipes/quickstart/layerskip.yaml \
    --num_samples 512 --max_steps 160 --batch_size 64 --sample True --temperature 0.8 \
    --output_dir $runs/selfwritten "${fresh[@]}"
for heads in medusa hydra; do
    train $heads
    # the tree that is fastest on this machine, found once
    [ -f $runs/$heads/export/tree.json ] || python -m eval tree --run $runs/$heads
done
if [ ! -f "$report/report.html" ]; then
    # the exit and drafts that the run found best, drafts that stop by themselves, heads, and transformers' own
    python -m eval benchmark --run $runs/layerskip --output_dir "$report" --strategies \
        "self_speculative,self_speculative:draft_stop=confidence:num_speculations=8,prompt_lookup,medusa:draft=$runs/medusa,hydra:draft=$runs/hydra,hf_generate,hf_early_exit,hf_prompt_lookup"
else
    cat "$report/table.txt"
    echo "reusing $report/report.html; pass --fresh to start over" >&2
fi
