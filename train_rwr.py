"""Reward-weighted fit: `accelerate launch train_rwr.py --config configs/equivalence/rwr_sd3_compressibility.yaml`."""

import rewards
from rlg.cli import fail_cleanly
from trainers import online
from trainers.rwr import RWRConfig, RWRTrainer


def main() -> None:
    """Config -> policy, reward, data -> train."""
    online.start(RWRConfig, RWRTrainer, rewards.build)


if __name__ == "__main__":
    with fail_cleanly():
        main()
