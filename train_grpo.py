"""GRPO: `accelerate launch train_grpo.py --config configs/tiny/grpo_sd3_compressibility.yaml`."""

import rewards
from rlg.cli import fail_cleanly
from trainers import online
from trainers.grpo import GRPOConfig, GRPOTrainer


def main() -> None:
    """Config -> policy, reward, data -> train."""
    online.start(GRPOConfig, GRPOTrainer, rewards.build)


if __name__ == "__main__":
    with fail_cleanly():
        main()
