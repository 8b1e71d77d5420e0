"""Diffusion-DPO, offline, or with --online on own samples.

accelerate launch train_dpo.py --config configs/tiny/dpo_sd3.yaml
"""

from rlg.cli import fail_cleanly
from trainers.commands import TRAINERS

main = TRAINERS["dpo"]

if __name__ == "__main__":
    with fail_cleanly():
        main()
