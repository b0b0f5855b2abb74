#!/usr/bin/env bash
# Train a small LayerSkip model on the Python standard library's own source, and Medusa, Hydra, EAGLE and EAGLE-3 heads
# on text that it writes itself; then decode with each of them, without changing what is written.
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
    --num_samples 384 --max_steps 160 --batch_size 64 --sample True --temperature 0.8 \
    --output_dir $runs/selfwritten "${fresh[@]}"
for heads in medusa hydra eagle eagle3; do
    train $heads
    # what is fastest on this machine, chain or tree, found once
    [ -f $runs/$heads/export/tree.json ] ||
        python -m eval tree --run $runs/$heads --num_samples 8 --max_steps 48 --max_nodes 31
done
strategies=(
    self_speculative # the exit and drafts that the run found best
    self_speculative:draft_stop=confidence:num_speculations=8
    self_speculative:draft_tree
    prompt_lookup lookahead
    medusa:draft=$runs/medusa hydra:draft=$runs/hydra
    eagle:draft=$runs/eagle eagle2:draft=$runs/eagle eagle3:draft=$runs/eagle3
    hf_generate hf_early_exit hf_prompt_lookup
)
if [ ! -f "$report/report.html" ]; then
    python -m eval benchmark --run $runs/layerskip --num_samples 24 --max_steps 32 --output_dir "$report" \
        --strategies "$(IFS=,; echo "${strategies[*]}")"
else
    cat "$report/table.txt"
    echo "reusing $report/report.html; pass --fresh to start over" >&2
fi
