#!/usr/bin/env bash
# What LayerSkip training costs beside plain training, what the FLOPs predict, and transformers.Trainer, on this machine's
# CPU or GPU: the quickstart's model, the same with a vocabulary of 16384, and on a GPU one of 1.1 billion parameters.
# Uses the Python that is active, downloads nothing. Nothing else should run meanwhile.
# Usage: bash scripts/benchmark_training.sh [OUTPUT_DIR] [STEPS]      (default: runs/training-cost 20)
set -euo pipefail
cd "$(dirname "$0")/.."

output="${1:-runs/training-cost}"
steps="${2:-20}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
adamw='optimizer={kind: adamw, lr: 0.001}'
measure() { # NAME RECIPE [KEY=VALUE]...
    local name="$1"
    shift
    echo "== $name"
    python -m train.benchmark "$@" "$adamw" --steps "$steps" --output_dir "$output/$name"
}

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    measure 1b recipes/quickstart/gpu-1b.yaml batch.sequences=8 batch.micro=null batch.length=2048
else
    measure quickstart recipes/quickstart/layerskip.yaml
    measure large-vocabulary recipes/quickstart/layerskip.yaml model.tokenizer.train.vocab_size=16384
fi
