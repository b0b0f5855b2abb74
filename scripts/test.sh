#!/usr/bin/env bash
# Set everything up and run lint, types and tests, offline apart from the package index.
# Usage: bash scripts/test.sh [--slow] [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/setup.sh" test

select=(-m "not slow")
if [ "${1:-}" = "--slow" ]; then
    select=()
    shift
fi
export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=1 # the tests run side by side, one process a core
ruff check .
ruff format --check .
mypy
python -m pytest --numprocesses auto --dist worksteal "${select[@]}" "$@"
