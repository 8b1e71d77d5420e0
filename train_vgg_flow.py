"""VGG-Flow: `accelerate launch train_vgg_flow.py --config configs/tiny/vgg_flow_ink.yaml`."""

from rlg.cli import fail_cleanly
from trainers.commands import TRAINERS

main = TRAINERS["vgg_flow"]

if __name__ == "__main__":
    with fail_cleanly():
        main()
