"""SPO: `accelerate launch train_spo.py --config configs/tiny/spo_sd3.yaml`."""

from typing import Any

import rewards
from rewards import step_aware
from rlg.cli import fail_cleanly
from trainers import online
from trainers.spo import SPOConfig, SPOTrainer


def trainer(config: SPOConfig, *data: Any) -> SPOTrainer:
    """A trainer whose judge is the step-aware preference model, where the config names one."""
    scorer = step_aware.load(config.preference_model) if config.preference_model else None
    made = SPOTrainer(config, *data, scorer=scorer)
    if scorer is not None:
        scorer.to(made.policy.device)
    return made


def main() -> None:
    """Config -> policy, judge, data -> train."""
    online.start(SPOConfig, trainer, rewards.build)


if __name__ == "__main__":
    with fail_cleanly():
        main()
