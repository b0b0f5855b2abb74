#!/usr/bin/env bash
# One LayerSkip step on random weights of Llama 3.2 1B's, Qwen3 0.6B's and Gemma 2 2B's own configurations, measured
# peak memory beside the estimate, and the estimated memory of larger models for every engine. No download of any kind.
# So that 24 GiB are enough, Llama 3.2 1B has its optimizer's states in 8 bits (pip install bitsandbytes), and Gemma 2 2B adapters on
# bfloat16 weights (pip install peft); with float32 AdamW they take 25 and 45 GiB.
# Usage: bash scripts/real_architectures.sh      (a machine with 24 GiB; a GPU is used where there is one)
set -euo pipefail
cd "$(dirname "$0")/.."

export HF_HUB_OFFLINE=1
python -m train.architectures step qwen3-0.6b --length 256
python -m train.architectures step llama-3.2-1b --length 256 --optimizer adamw_8bit
python -m train.architectures step gemma-2-2b --length 256 --lora
python -m train.architectures table
