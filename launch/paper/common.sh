# What the scripts of this folder share; each reads it with `source`, in the repository's root.
#   --smoke      the same steps on a tiny model that ships with the project, without a download
#   --dry_run    print the commands instead of running them
smoke="" dry_run=""
for option in "$@"; do
    case $option in
        --smoke) smoke=1 ;;
        --dry_run) dry_run=1 ;;
        *) echo "error: unknown option $option; known: --smoke, --dry_run" >&2; exit 2 ;;
    esac
done
unread=()
for pattern in 'text_encoders/*' '*.bin' '*.ckpt' '*.fp16.*' '*.onnx*' '*.msgpack' 'sd*.safetensors' 'v1-5*'; do
    unread+=(--exclude "$pattern")
done
gpus=(accelerate launch --config_file launch/accelerate/8gpu.yaml)
tiny=(--max_steps 1 --num_prompts 2 --num_generations 2 --batch_size 4)
tiny+=(--steps 3 --num_train_steps 1 --overwrite)

run() { # a command
    if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

fetch() { # file, URL: unless it is there
    [ -n "$smoke" ] || [ -s "$1" ] || run curl -fsSL --create-dirs -o "$1" "$2"
}

weights() { # hub ids: their files, without other formats and pipelines in one file
    local id
    for id in "$@"; do
        [ -n "$smoke" ] || run hf download "$id" "${unread[@]}"
    done
}

metrics() { # rewards: loaded once, for their weights, so that 8 processes find them
    [ -n "$smoke" ] || run python -c 'import sys, rewards; rewards.build(sys.argv[1:])' "$@"
}

last() { # the last checkpoint of a run; in a dry run, a name for it
    if [ -n "$dry_run" ]; then
        echo "$1/checkpoint-N"
    else
        find "$1" -maxdepth 1 -name 'checkpoint-*' | sort -V | tail -n 1
    fi
}

train_tiny() { # the tuned model of a smoke run: one step of GRPO
    run python train_grpo.py --config configs/tiny/grpo_sd3_compressibility.yaml --name paper-smoke "${tiny[@]}"
}

evaluate() { # config of configs/eval, more options: base, tuned and RLG over w; an interrupted one goes on
    local name=$1
    shift
    if [ -n "$smoke" ]; then
        run python -m rlg.evaluate --config "configs/eval/tiny_$task.yaml" --ckpt "$(last runs/paper-smoke)" \
            --output "runs/paper-smoke/$name" --overwrite
    else
        run "${gpus[@]}" -m rlg.evaluate --config "configs/eval/$name.yaml" --output "runs/paper/$name" "$@"
    fi
}
