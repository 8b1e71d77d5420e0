"""Pretrain a base model of the tinyworld.

python -m rlg.pretraining --family sd3 --world emoji --output runs/tiny-sd3-emoji
"""

from __future__ import annotations

from rlg.cli import fail_cleanly
from rlg.pretraining.settings import PRETRAIN


def main() -> None:
    """Command line."""
    with fail_cleanly():
        settings = PRETRAIN.parse()  # --help and a typo end here, before torch is loaded
        from rlg.pretraining.pretrain import run

        run(settings)


if __name__ == "__main__":
    main()
