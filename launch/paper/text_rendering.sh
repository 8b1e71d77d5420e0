#!/usr/bin/env bash
# Text rendering: SD 3.5 Medium + Flow-GRPO, as published, by OCR; needs the extra [ocr].
#   bash launch/paper/text_rendering.sh            on 8 GPUs, into runs/paper/; 3.5 Medium needs `hf auth login`
#   bash launch/paper/text_rendering.sh --smoke    on a tiny model, into runs/paper-smoke/; under a minute
set -euo pipefail
cd "$(dirname "$0")/../.."
task=text_rendering
source launch/paper/common.sh
flow_grpo=https://raw.githubusercontent.com/yifan123/flow_grpo/main/dataset
fetch data/ocr/test.txt "$flow_grpo/ocr/test.txt"
weights stabilityai/stable-diffusion-3.5-medium jieliu/SD3.5M-FlowGRPO-Text
metrics ocr pickscore imagereward aesthetic
[ -z "$smoke" ] || train_tiny
evaluate text_rendering
