"""GRPO: `accelerate launch train_grpo.py --config configs/tiny/grpo_sd3_compressibility.yaml`."""

from rlg.cli import fail_cleanly
from trainers.commands import TRAINERS

main = TRAINERS["grpo"]

if __name__ == "__main__":
    with fail_cleanly():
        main()
