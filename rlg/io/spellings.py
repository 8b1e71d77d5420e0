"""Names of options: the one that is used here, and others.

An option has one name in every command. Its former names, and those that are usual in the field, are accepted on the
command line, in YAML, and in the config.yaml of a run.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

# Other name: the names that it may stand for. The first one that a command has is meant.
SPELLINGS = {
    "batch": ("batch_size",),
    "blend_modes": ("method",),
    "cfg_scale": ("cfg",),
    "eta": ("level",),
    "guidance_mode": ("mode",),
    "guidance_scale": ("cfg",),
    "held_out": ("held_out_reward",),
    "model": ("base",),
    "modes": ("method", "mode"),
    "noise_level": ("level",),
    "num_inference_steps": ("steps",),
    "num_steps": ("steps",),
    "per_device_batch_size": ("batch_size",),
    "rewards": ("reward",),
    "sampler": ("kernel",),
    "scales": ("w", "num_w"),
    "train_guidance": ("train_cfg",),
    "tuned": ("ckpt",),
    "weights": ("reward_weights",),
}


def canonical(name: str, known: Container[str]) -> str:
    """The name of an option that a command uses.

    known: the options of the command. A name without an entry in `SPELLINGS` stays as it is.
    """
    if name in known:
        return name
    return next((each for each in SPELLINGS.get(name, ()) if each in known), name)


def canonical_keys(row: Mapping[str, Any], known: Container[str], where: str) -> dict[str, Any]:
    """The same values, by the names that a command uses.

    where: the source of the row, for messages. Raises ValueError for an option that is given under two names.
    """
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in row.items():
        name = canonical(key, known)
        if name in found:
            raise ValueError(f"{where}: {origin[name]} and {key} are one option; keep {name}")
        found[name], origin[name] = value, key
    return found


def canonical_words(words: Sequence[str], known: Container[str]) -> list[str]:
    """A command line with the names that a command uses.

    Raises ValueError for an option that is given under two names.
    """
    result: list[str] = []
    origin: dict[str, str] = {}
    for word in words:
        option, equals, value = word.partition("=")
        given = option.removeprefix("--").replace("-", "_")
        name = canonical(given, known)
        if option.startswith("--") and name in known:
            if origin.setdefault(name, given) != given:
                raise ValueError(f"--{origin[name]} and --{given} are one option; keep --{name}")
            word = f"--{name}{equals}{value}"
        result.append(word)
    return result
