#!/usr/bin/env bash
# Does w play beta / w? Everything that RESULTS.md says of it, on a CPU: the toy laws, then for both models and both
# rewards a fit to the tilted law at a known beta, guided with several w and held against the sampled oracle; GRPO at
# three beta, one of them guided, and without a KL; a second training of two fits; then Diffusion Blend of the two experts of tiny-sd3
# against a model trained on the mix.
#
#   bash launch/equivalence.sh [--dry_run]
set -euo pipefail
cd "$(dirname "$0")/.."
dry=${1:-}

run() {
    echo "+ $*"
    [ "$dry" = --dry_run ] || "$@"
}

run python -m rlg.equivalence --toy
run accelerate launch train_rwr.py --config configs/equivalence/rwr_sd3_compressibility.yaml --beta 0.065 \
    --name tiny-sd3-rwr-compressibility-half
for name in sd3_compressibility sd3_composition sd_compressibility sd_composition; do
    run accelerate launch train_rwr.py --config "configs/equivalence/rwr_$name.yaml"
    run python -m rlg.equivalence --config "configs/equivalence/tiny_$name.yaml"
done
for each in 0.001:60 0.002:40 0.004:40; do  # of the first, the checkpoint at 40 is judged as well
    run accelerate launch train_grpo.py --config configs/equivalence/grpo_sd3_compressibility.yaml \
        --beta "${each%:*}" --max_steps "${each#*:}" --name "tiny-sd3-grpo-beta-${each%:*}"
done
run python -m rlg.equivalence --config configs/equivalence/tiny_sd3_grpo.yaml
run accelerate launch train_grpo.py --config configs/tiny/grpo_sd3_composition.yaml
run python -m rlg.equivalence --config configs/equivalence/tiny_sd3_composition_grpo.yaml
for again in sd3_compressibility:8 sd_compressibility:8; do
    name=${again%:*} steps=${again#*:}
    run accelerate launch train_rwr.py --config "configs/equivalence/rwr_$name.yaml" --seed 1 --max_steps "$steps" \
        --name "tiny-$name-seed1"
    run python -m rlg.equivalence --config "configs/equivalence/tiny_$name.yaml" \
        --ckpt "runs/tiny-$name-seed1/checkpoint-$steps" --output "runs/equivalence/tiny_$name-seed1"
done
run accelerate launch train_rwr.py --config configs/equivalence/rwr_sd3_mix.yaml
run python -m rlg.evaluate --config configs/eval/blend_tiny_sd3.yaml
