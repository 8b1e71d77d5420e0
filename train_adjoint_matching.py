"""Adjoint Matching: `accelerate launch train_adjoint_matching.py --config configs/tiny/adjoint_matching_ink.yaml`."""

from rlg.cli import fail_cleanly
from trainers.commands import TRAINERS

main = TRAINERS["adjoint_matching"]

if __name__ == "__main__":
    with fail_cleanly():
        main()
