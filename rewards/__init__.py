"""Rewards: what a reward is, the table of those that exist, and `build`, which mixes several.

A reward is one file with one factory and one line in `REWARDS`; its heavy imports live inside the factory, so that
this table costs nothing to read. It is asked for by name, or as NAME=SOURCE: `pickscore=path/to/model`,
`remote=http://127.0.0.1:8000`. A mix keeps every part, raw, next to the weighted total: a trainer may weight rewards
(the total) or normalise each one's advantages first (the parts; GDPO, MixGRPO), as their scales differ a thousandfold.
"""

from __future__ import annotations

from rewards.calls import CheckedReward, Reward, RewardError, ServerError
from rewards.mix import RewardMix, RewardScores, build
from rewards.table import REWARDS, RewardSpec, lookup, places

__all__ = [
    "REWARDS",
    "CheckedReward",
    "Reward",
    "RewardError",
    "RewardMix",
    "RewardScores",
    "RewardSpec",
    "ServerError",
    "build",
    "lookup",
    "places",
]
