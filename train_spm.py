"""SPO's step-aware preference model: `accelerate launch train_spm.py --config configs/tiny/spm_sd3.yaml`."""

from rlg.cli import fail_cleanly
from trainers import common
from trainers.spm import SPMConfig, SPMTrainer


def main() -> None:
    """Config -> base model, pairs -> train -> accuracy by noise level (of a finished run: --resume)."""
    SPMTrainer(*common.begin(SPMConfig)).train()


if __name__ == "__main__":
    with fail_cleanly():
        main()
