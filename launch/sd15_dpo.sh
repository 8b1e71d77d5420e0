#!/usr/bin/env bash
# Stable Diffusion 1.5 + DPO, of the paper's table: train on 8 GPUs, then the curve over w. An interrupted run goes on.
#   bash launch/sd15_dpo.sh data/pickscore/test.txt
set -euo pipefail
cd "$(dirname "$0")/.."
prompts=${1:?a file of held-out prompts, one a line}
run=runs/sd15-dpo
accelerate launch --config_file launch/accelerate/8gpu.yaml train_dpo.py --config configs/dpo/sd15_pickapic.yaml \
    $([ -d "$run" ] && echo --resume)
last=$(find "$run" -maxdepth 1 -name 'checkpoint-*' | sort -V | tail -1)
accelerate launch --config_file launch/accelerate/8gpu.yaml -m rlg.evaluate --ckpt "$last" --prompts "$prompts" \
    --reward pickscore --w 0 0.5 1 1.5 2 2.5 3 --kernel ode --steps 50 --k 1
