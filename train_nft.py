"""DiffusionNFT: `accelerate launch train_nft.py --config configs/tiny/nft_sd3_composition.yaml`."""

import rewards
from rlg.cli import fail_cleanly
from trainers import online
from trainers.nft import NFTConfig, NFTTrainer


def main() -> None:
    """Config -> policy, reward, data -> train."""
    online.start(NFTConfig, NFTTrainer, rewards.build)


if __name__ == "__main__":
    with fail_cleanly():
        main()
