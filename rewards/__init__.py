"""Rewards: their contract, their table, and mixes of several.

A reward is one file with one factory and one line in `REWARDS`. The factory holds its heavy imports, so that this
table costs nothing to read. A reward is asked for by name, or as NAME=SOURCE: `pickscore=path/to/model`,
`remote=http://127.0.0.1:8000`. A mix keeps the raw scores of every reward next to the weighted total. A trainer may
weight rewards (the total), or normalise each one's advantages first (the parts; GDPO, MixGRPO), since their scales
differ a thousandfold.
"""

from __future__ import annotations

from rewards.calls import CheckedReward, DifferentiableReward, Reward, RewardError, ServerError
from rewards.mix import RewardMix, RewardScores, build
from rewards.table import REWARDS, RewardSpec, lookup, places, require_gradients

__all__ = [
    "REWARDS",
    "CheckedReward",
    "DifferentiableReward",
    "Reward",
    "RewardError",
    "RewardMix",
    "RewardScores",
    "RewardSpec",
    "ServerError",
    "build",
    "lookup",
    "places",
    "require_gradients",
]
