"""GRPO: `accelerate launch train_grpo.py --config configs/tiny/grpo_sd3_compressibility.yaml`."""

import rewards
from rlg.cli import fail_cleanly
from trainers import common
from trainers.grpo import GRPOConfig, GRPOTrainer


def main() -> None:
    """Config -> policy, reward, data -> train."""
    config = common.parse_config(GRPOConfig)
    accelerator = common.make_accelerator(config)
    derived = config.derived(accelerator.num_processes)
    if config.dry_run:
        common.dry_run(config, derived)
        return
    common.check_folder(config)
    reward = rewards.build(config.reward, config.reward_weights, device=str(accelerator.device))
    held_out = (
        rewards.build(config.held_out_reward, device=str(accelerator.device)) if config.held_out_reward else None
    )
    prompts, eval_prompts = common.load_prompts(config)
    GRPOTrainer(config, reward, prompts, eval_prompts, accelerator, held_out).train()


if __name__ == "__main__":
    with fail_cleanly():
        main()
