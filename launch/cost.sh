#!/usr/bin/env bash
# What guidance costs and what cheaper ways keep, on three tuned models of tiny-sd3, and docs/img/cost.png from the three.
#
#   bash launch/cost.sh COMPRESSIBILITY_CKPT COMPOSITION_CKPT TEXT_CKPT [more options of rlg.benchmark guidance]
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=runs/benchmarks/cost
modes=(full+batch reuse:2 reuse:4 reuse_at:0 reuse_at:0,2 reuse_at:0,2:linear scaled scaled_but:0,2:carry)

measure() {
    python -m rlg.benchmark guidance --output "$out/$1" --ckpt "$2" --w "$3" --budget 1.25 --calibration_prompts 16 \
        --batch_size 32 --mode "${modes[@]}" "${@:4}"
}

measure compressibility "$1" 2 --k 4 "${@:4}"
measure composition "$2" 3 --k 16 "${@:4}"
measure text "$3" 4 --k 4 --mode full+batch reuse:2 reuse_at:0 reuse_at:1 scaled scaled_but:0:carry "${@:4}"  # four steps
python -m rlg.benchmark.guidance_figure "$out"/{compressibility,composition,text}/results.json --output docs/img/cost
