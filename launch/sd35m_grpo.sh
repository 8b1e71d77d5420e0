#!/usr/bin/env bash
# Stable Diffusion 3.5 Medium + GRPO, of the paper's table: train on 8 GPUs, then the curve over w. An interrupted run goes on.
#   bash launch/sd35m_grpo.sh data/pickscore/test.txt
set -euo pipefail
cd "$(dirname "$0")/.."
prompts=${1:?a file of held-out prompts, one a line}
run=runs/sd35m-pickscore
accelerate launch --config_file launch/accelerate/8gpu.yaml train_grpo.py --config configs/grpo/sd35m_pickscore.yaml \
    $([ -d "$run" ] && echo --resume)
last=$(find "$run" -maxdepth 1 -name 'checkpoint-*' | sort -V | tail -1)
accelerate launch --config_file launch/accelerate/8gpu.yaml -m rlg.evaluate --ckpt "$last" --prompts "$prompts" \
    --reward pickscore --w 0 0.5 1 1.5 2 2.5 3 --kernel ode --steps 40 --k 1
