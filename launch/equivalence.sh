#!/usr/bin/env bash
# Does w play beta / w? Everything that RESULTS.md says of it, on a CPU: the toy laws, then for both models and both
# rewards a fit to the tilted law at a known beta, guided with several w and held against the sampled oracle; then
# Diffusion Blend of the two experts of tiny-sd3 against a model trained on the mix.
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
run accelerate launch train_rwr.py --config configs/equivalence/rwr_sd3_mix.yaml
run python -m rlg.evaluate --config configs/eval/blend_tiny_sd3.yaml
