#!/usr/bin/env bash
# Human preference: SD 1.5 + DPO, SDXL + SPO and SD 3.5 Medium + Flow-GRPO, as published, by four metrics; needs the
# extra [hpsv2].
#   bash launch/paper/human_preference.sh            on 8 GPUs, into runs/paper/; 3.5 Medium needs `hf auth login`
#   bash launch/paper/human_preference.sh --smoke    on a tiny model, into runs/paper-smoke/; under a minute
set -euo pipefail
cd "$(dirname "$0")/../.."
task=human_preference
source launch/paper/common.sh
flow_grpo=https://raw.githubusercontent.com/yifan123/flow_grpo/main/dataset
fetch data/pickscore/test.txt "$flow_grpo/pickscore/test.txt"
weights stable-diffusion-v1-5/stable-diffusion-v1-5 mhdang/dpo-sd1.5-text2image-v1 \
    stabilityai/stable-diffusion-xl-base-1.0 SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep_LoRA \
    stabilityai/stable-diffusion-3.5-medium jieliu/SD3.5M-FlowGRPO-PickScore
metrics pickscore hpsv2 imagereward aesthetic
models=(sd15 sdxl sd35m)
if [ -n "$smoke" ]; then
    train_tiny
    models=(sd35m)
fi
for model in "${models[@]}"; do
    evaluate "human_preference_$model"
done
