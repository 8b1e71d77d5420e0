"""SPO: `accelerate launch train_spo.py --config configs/tiny/spo_sd3.yaml`."""

from rlg.cli import fail_cleanly
from trainers.commands import TRAINERS

main = TRAINERS["spo"]

if __name__ == "__main__":
    with fail_cleanly():
        main()
