"""Reward-weighted fit: `accelerate launch train_rwr.py --config configs/equivalence/rwr_sd3_compressibility.yaml`."""

from rlg.cli import fail_cleanly
from trainers.commands import TRAINERS

main = TRAINERS["rwr"]

if __name__ == "__main__":
    with fail_cleanly():
        main()
