#!/usr/bin/env bash
# Composition: SD 3.5 Medium + Flow-GRPO, as published, by GenEval's verdict on its own prompts.
#   bash launch/paper/composition.sh            on 8 GPUs, into runs/paper/; 3.5 Medium needs `hf auth login`
#   bash launch/paper/composition.sh --smoke    on a tiny model, into runs/paper-smoke/; under a minute
set -euo pipefail
cd "$(dirname "$0")/../.."
task=composition
source launch/paper/common.sh
geneval=https://raw.githubusercontent.com/djghosh13/geneval/main/prompts
fetch data/geneval/evaluation_metadata.jsonl "$geneval/evaluation_metadata.jsonl"
weights stabilityai/stable-diffusion-3.5-medium jieliu/SD3.5M-FlowGRPO-GenEval
metrics geneval_strict pickscore imagereward aesthetic
[ -z "$smoke" ] || train_tiny
evaluate composition
