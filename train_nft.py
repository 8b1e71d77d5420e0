"""DiffusionNFT: `accelerate launch train_nft.py --config configs/tiny/nft_sd3_composition.yaml`."""

from rlg.cli import fail_cleanly
from trainers.commands import TRAINERS

main = TRAINERS["nft"]

if __name__ == "__main__":
    with fail_cleanly():
        main()
