#!/usr/bin/env bash
# GRPO, DPO, SPO and NFT of one utility (composition), from one base, in one reward-against-KL plot.
#   bash launch/compare_trainers.sh            tiny-sd3; hours on two CPU cores
#   bash launch/compare_trainers.sh runs 2     a smoke run of two iterations each, in the folder `runs`
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs}
steps=${2:+--max_steps $2}
few=${2:+--num_prompts 4 --k 2}
# one stochastic sampler for all: the path KL needs its noise
sweep="--w 0 0.5 1 1.5 2 3 --method rlg --kernel sde --level 0.7 --steps 10 --cfg 1 ${few:---k 8}"
pairs=$([ -n "${2:-}" ] && echo 40 || echo 8000)
evaluations=()

train_and_guide() {  # trainer, config, name of the run, more options
    local trainer=$1 config=$2 run=$runs/$3
    shift 3
    # shellcheck disable=SC2086
    python "train_$trainer.py" --config "$config" --output_dir "$runs" "$@" $steps $([ -d "$run" ] && echo --resume)
    last=$(find "$run" -maxdepth 1 -name 'checkpoint-*' | sort -V | tail -1)
    # shellcheck disable=SC2086
    python -m rlg.evaluate --ckpt "$last" $sweep --output "$run/eval/compare"
    evaluations+=("$run/eval/compare")
}

train_and_guide grpo configs/tiny/grpo_sd3_composition.yaml tiny-sd3-composition
train_and_guide nft configs/tiny/nft_sd3_composition.yaml tiny-sd3-composition-nft
# NFT's own direction of guidance leads from the old policy to the trained one
# shellcheck disable=SC2086
python -m rlg.evaluate --ckpt "$last" --origin "$last/trainer_state/lora_old.safetensors" $sweep \
    --output "$runs/tiny-sd3-composition-nft/eval/compare-old"
[ -d "$runs/preferences-sd3" ] || python -m rlg.preferences --base tiny-sd3 \
    --output "$runs/preferences-sd3" --pairs "$pairs" --steps 10 --utility composition
train_and_guide dpo configs/tiny/dpo_sd3.yaml tiny-sd3-dpo --data "$runs/preferences-sd3"
train_and_guide spo configs/tiny/spo_sd3.yaml tiny-sd3-spo
python -m rlg.report "${evaluations[@]}" --output "$runs/compare_trainers"
python -m rlg.report "$runs/tiny-sd3-composition-nft/eval/compare" "$runs/tiny-sd3-composition-nft/eval/compare-old" \
    --output "$runs/compare_nft"
