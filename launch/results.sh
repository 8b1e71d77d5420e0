#!/usr/bin/env bash
# The claims of results/: trainings from several seeds, each evaluated on all held-out prompts x 4, pooled into a table.
# Interrupt it, give the same command again, and it goes on.
#
#   bash launch/results.sh NAME...            demo emoji_spo emoji_dpo emoji_grpo emoji_files
#   SMOKE=2 bash launch/results.sh NAME...    two iterations of one training, two prompts, all of it in runs/smoke
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
runs=runs results=results prompts=185 pairs=8000 seeds="0 1 2" short=()
if [ -n "${SMOKE:-}" ]; then
    runs=runs/smoke results=runs/smoke/results prompts=2 pairs=40 seeds=0
    short=(--max_steps "$SMOKE" --save_steps "$SMOKE")
fi

claim() { # name, seeds, trainer, config of the training, config of the evaluation, title, more options of the training
    local name=$1 seeds=$2 trainer=$3 config=$4 evaluation=$5 title=$6 evaluations=() run last
    shift 6
    for seed in $seeds; do
        run=$runs/$name-seed$seed
        # shellcheck disable=SC2046
        python "train_$trainer.py" --config "$config" --output_dir "$runs" --name "$name-seed$seed" --seed "$seed" \
            "$@" "${short[@]}" $([ ! -d "$run" ] || echo --resume)
        last=$(find "$run" -maxdepth 1 -name 'checkpoint-*' | sort -V | tail -n 1)
        python -m rlg.evaluate --config "$evaluation" --ckpt "$last" --seed "$seed" --k 4 --num_prompts "$prompts" \
            --output "$run/eval/results"
        evaluations+=("$run/eval/results")
    done
    python -m rlg.pool "${evaluations[@]}" --output "$results/$name" --title "$title" \
        --by "bash launch/results.sh $name"
    cp "$config" "$results/$name/config.yaml"
    # shellcheck disable=SC2016
    printf '#!/usr/bin/env bash\nset -euo pipefail\ncd "$(dirname "$0")/../.."\nbash launch/results.sh %s\n' "$name" \
        > "$results/$name/command.sh"
}

labels() { # the base's own images in pairs, labelled by an annotator who is known
    [ -d "$runs/preferences-emoji" ] || python -m rlg.preferences --base tiny-sd3-emoji --pairs "$pairs" --steps 10 \
        --prompts tinyworld:emoji/train --test_prompts tinyworld:emoji/test --output "$runs/preferences-emoji"
}

one=${seeds%% *}
for name in "$@"; do
    case $name in
        demo) claim demo "$seeds" spo configs/tiny/demo.yaml configs/eval/demo.yaml "The demo, three trainings" ;;
        emoji_spo)
            claim emoji_spo "$one" spo configs/tiny/spo_emoji.yaml configs/eval/emoji.yaml "SPO for composition" ;;
        emoji_dpo)
            labels
            claim emoji_dpo "$seeds" dpo configs/tiny/dpo_emoji.yaml configs/eval/emoji.yaml \
                "Diffusion-DPO for composition" --data "$runs/preferences-emoji" ;;
        emoji_grpo)
            claim emoji_grpo "$one" grpo configs/tiny/grpo_emoji.yaml configs/eval/emoji.yaml "GRPO for composition" ;;
        emoji_files)
            claim emoji_files "$one" grpo configs/tiny/grpo_emoji_compressibility.yaml configs/eval/emoji.yaml \
                "GRPO for small files" ;;
        *) echo "error: no claim is called $name; see the head of launch/results.sh" >&2; exit 2 ;;
    esac
done
