#!/usr/bin/env bash
# Compressibility, a slider both ways: trains SD 1.5 by GRPO with DDPO's numbers, as no checkpoint is published.
#   bash launch/paper/compressibility.sh            on 8 GPUs, into runs/paper/; an interrupted run goes on
#   bash launch/paper/compressibility.sh --smoke    on a tiny model, into runs/paper-smoke/; under a minute
set -euo pipefail
cd "$(dirname "$0")/../.."
task=compressibility
source launch/paper/common.sh
ddpo=https://raw.githubusercontent.com/kvablack/ddpo-pytorch/main/ddpo_pytorch/assets
fetch data/ddpo/imagenet_classes.txt "$ddpo/imagenet_classes.txt"
weights stable-diffusion-v1-5/stable-diffusion-v1-5
metrics clipscore aesthetic
checkpoint=""
if [ -n "$smoke" ]; then
    train_tiny
else
    run sed -n '1,398w data/ddpo/imagenet_animals.txt' data/ddpo/imagenet_classes.txt
    run "${gpus[@]}" train_grpo.py --config configs/grpo/sd15_compressibility.yaml \
        $([ -d runs/sd15-compressibility ] && echo --resume)
    checkpoint=$(last runs/sd15-compressibility)
fi
evaluate compressibility --ckpt "$checkpoint"
