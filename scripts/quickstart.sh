#!/usr/bin/env bash
# Train a small LayerSkip model on the Python standard library's own source, then decode with it self-speculatively.
# Usage: bash scripts/quickstart.sh [--fresh]
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""

run=runs/quickstart/layerskip
report=runs/quickstart/report
fresh=()
case "${1:-}" in
    "") ;;
    --fresh) fresh=(--fresh); rm -rf "$report" ;;
    *) echo "error: unknown argument '$1'; the only one is --fresh" >&2; exit 2 ;;
esac
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# accelerate gives a process on a CPU one thread unless told otherwise
accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process "$(python -c "import torch; print(torch.get_num_threads())")" \
    -m train recipes/quickstart/layerskip.yaml "${fresh[@]}"
if [ ! -f "$report/report.html" ]; then
    # the exit and drafts that the run found best, and drafts that stop by themselves
    python -m eval benchmark --run "$run" --output_dir "$report" --strategies \
        "self_speculative,self_speculative:draft_stop=confidence:num_speculations=8,prompt_lookup,hf_generate,hf_early_exit,hf_prompt_lookup"
else
    cat "$report/table.txt"
    echo "reusing $report/report.html; pass --fresh to start over" >&2
fi
