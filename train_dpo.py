"""Diffusion-DPO: `accelerate launch train_dpo.py --config configs/tiny/dpo_sd3.yaml`; --online: on its own samples."""

import sys

import rewards
from rlg.cli import fail_cleanly
from trainers import online
from trainers.dpo import DPOConfig, DPOTrainer, OnlineDPOConfig, OnlineDPOTrainer


def main() -> None:
    """Config -> policy, pairs or reward -> train."""
    if "--online" in sys.argv:
        sys.argv.remove("--online")
        online.start(OnlineDPOConfig, OnlineDPOTrainer, rewards.build)
    else:
        online.start(DPOConfig, DPOTrainer, rewards.build)


if __name__ == "__main__":
    with fail_cleanly():
        main()
