#!/usr/bin/env bash
# One LayerSkip step on random weights of Llama 3.2 1B's, Qwen3 0.6B's and Gemma 2 2B's own configurations, measured
# peak memory beside the estimate, and the estimated memory of larger models for every engine. No download of any kind.
# Gemma 2 2B with float32 weights and AdamW takes 45 GiB: it has adapters on bfloat16 weights here.
# Usage: bash scripts/real_architectures.sh      (a machine with 24 GiB; a GPU is used where there is one)
set -euo pipefail
cd "$(dirname "$0")/.."

export HF_HUB_OFFLINE=1
python -m train.architectures step qwen3-0.6b --length 256
python -m train.architectures step llama-3.2-1b --length 256
python -m train.architectures step gemma-2-2b --length 256 --lora
python -m train.architectures table
