#!/usr/bin/env bash
# What the demo shows, as a claim: three trainings, each evaluated on all held-out prompts, and pooled (results/demo).
#   bash launch/demo_seeds.sh            some twenty minutes of two CPU cores; run it again and it goes on
#   bash launch/demo_seeds.sh runs 2     a smoke run of two iterations each, in the folder `runs`
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs}
steps=${2:+--max_steps $2 --save_steps $2}
few=${2:+--num_prompts 4 --k 2}
results=$([ -n "${2:-}" ] && echo "$runs/demo-seeds" || echo results/demo)
evaluations=()

for seed in 0 1 2; do
    run=$runs/demo-seed$seed
    # shellcheck disable=SC2086
    python train_spo.py --config configs/tiny/demo.yaml --output_dir "$runs" --name "demo-seed$seed" --seed $seed \
        $steps $([ -d "$run" ] && echo --resume)
    last=$(find "$run" -maxdepth 1 -name 'checkpoint-*' | sort -V | tail -1)
    # shellcheck disable=SC2086
    python -m rlg.evaluate --config configs/eval/demo.yaml --ckpt "$last" --seed $seed --k 4 \
        --output "$run/eval/seeds" $few
    evaluations+=("$run/eval/seeds")
done
python -m rlg.pool "${evaluations[@]}" --output "$results" --title "The demo, three trainings" \
    --by "bash launch/demo_seeds.sh"
