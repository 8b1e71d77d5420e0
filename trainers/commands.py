"""Train a model by RL or on preferences, as `rlg train NAME` and as `train_NAME.py`.

Each command takes its options from sys.argv: config -> trainer, which makes policy, rewards and data -> train. It
answers --help and mistakes before it imports its trainer, and torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trainers.core.config import answer

_CONFIG = "_config"  # ends the name of a trainer's module of options


def train(name: str) -> None:
    """The command of a trainer.

    Its options are the class of trainers/NAME_config.py whose name ends in Config. Its algorithm is the class of
    trainers/NAME.py whose name ends in Trainer, or what `trainer_of` there makes of a config.
    """
    config_type = _only_class(f"trainers.{name}{_CONFIG}", "Config")
    answer(config_type, config_type.__doc__)
    from trainers.core.start import run

    run(config_type, _trainer(f"trainers.{name}"))


def _trainer(module: str) -> Callable[[Any], Any]:
    """What makes a trainer of a config."""
    trainer_of = getattr(importlib.import_module(module), "trainer_of", None)
    return _only_class(module, "Trainer") if trainer_of is None else lambda config: trainer_of(config)(config)


def _only_class(module: str, ending: str) -> Any:
    """The class that a module defines under a name of this ending."""
    members = vars(importlib.import_module(module))
    found = [member for name, member in members.items() if name.endswith(ending) and member.__module__ == module]
    assert len(found) == 1, f"{module} must define one class whose name ends in {ending}, and defines {len(found)}"
    return found[0]


def commands(folder: Path) -> dict[str, Callable[[], None]]:
    """The command of each trainer of a folder, by name: of each NAME_config.py."""
    names = sorted(file.stem.removesuffix(_CONFIG) for file in folder.glob(f"*{_CONFIG}.py"))
    return {name: partial(train, name) for name in names}


TRAINERS = commands(Path(__file__).parent)
