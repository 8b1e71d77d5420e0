"""SPO's step-aware preference model: `accelerate launch train_spm.py --config configs/tiny/spm_sd3.yaml`."""

from rlg.cli import fail_cleanly
from trainers import common
from trainers.spm import SPMConfig, SPMTrainer


def main() -> None:
    """Config -> base model, pairs -> train -> accuracy by noise level (of a finished run: --resume)."""
    config = common.parse_config(SPMConfig)
    accelerator = common.make_accelerator(config)
    derived = config.derived(accelerator.num_processes)
    if config.dry_run:
        common.dry_run(config, derived)
        return
    common.check_folder(config)
    SPMTrainer(config, accelerator).train()


if __name__ == "__main__":
    with fail_cleanly():
        main()
