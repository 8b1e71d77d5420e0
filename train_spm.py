"""SPO's step-aware preference model: `accelerate launch train_spm.py --config configs/tiny/spm_sd3.yaml`."""

from rlg.cli import fail_cleanly
from trainers.commands import TRAINERS

main = TRAINERS["spm"]

if __name__ == "__main__":
    with fail_cleanly():
        main()
