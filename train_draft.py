"""DRaFT, ReFL, AlignProp: `accelerate launch train_draft.py --config configs/tiny/draft_ink.yaml`."""

from rlg.cli import fail_cleanly
from trainers.commands import TRAINERS

main = TRAINERS["draft"]

if __name__ == "__main__":
    with fail_cleanly():
        main()
