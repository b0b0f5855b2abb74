#!/usr/bin/env bash
# Train a model of about a billion parameters for a few minutes and time it on one CUDA GPU, bfloat16, captured in CUDA
# graphs, against transformers; under ten minutes on an H200-class GPU. It uses the Python that is active, whatever its
# versions (torch 2.11 and transformers 5.17 or newer), and downloads nothing.
# Usage: bash scripts/benchmark_gpu.sh [OUTPUT_DIR]      (default: runs/gpu-1b)
set -euo pipefail
cd "$(dirname "$0")/.."

run="${1:-runs/gpu-1b}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "error: python sees no CUDA GPU; activate an environment whose torch does" >&2
    exit 2
}
python -m train recipes/quickstart/gpu-1b.yaml "output_dir=$run"
python -m eval benchmark --run "$run" --dtype bfloat16 --compile --profile --output_dir "$run/report"
