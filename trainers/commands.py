"""Commands that train a model, by RL or on preferences.

They are `rlg train NAME` and `train_NAME.py`. A command reads its options from sys.argv and makes a trainer of them.
The trainer makes policy, rewards and data. --help and mistakes are answered before the trainer, and torch, is
imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trainers.core.config import answer

_CONFIG = "_config"  # ending of the names of modules with a trainer's options


def train(name: str) -> None:
    """Run the command of a trainer.

    Its options are the class of trainers/NAME_config.py whose name ends in Config. Its algorithm is the class of
    trainers/NAME.py whose name ends in Trainer. Where that module defines `trainer_of`, this chooses the class by the
    config.
    """
    config_type = _only_class(f"trainers.{name}{_CONFIG}", "Config")
    answer(config_type, config_type.__doc__)
    from trainers.core.start import run

    run(config_type, _trainer(f"trainers.{name}"))


def _trainer(module: str) -> Callable[[Any], Any]:
    """The function from a config to its trainer."""
    trainer_of = getattr(importlib.import_module(module), "trainer_of", None)
    return _only_class(module, "Trainer") if trainer_of is None else lambda config: trainer_of(config)(config)


def _only_class(module: str, ending: str) -> Any:
    """The one class of a module whose name has this ending.

    Classes that the module imports do not count.
    """
    members = vars(importlib.import_module(module))
    found = [member for name, member in members.items() if name.endswith(ending) and member.__module__ == module]
    assert len(found) == 1, f"{module} must define one class whose name ends in {ending}, and defines {len(found)}"
    return found[0]


def commands(folder: Path) -> dict[str, Callable[[], None]]:
    """The command of each trainer in a folder, by its name.

    A trainer has a NAME_config.py.
    """
    names = sorted(file.stem.removesuffix(_CONFIG) for file in folder.glob(f"*{_CONFIG}.py"))
    return {name: partial(train, name) for name in names}


TRAINERS = commands(Path(__file__).parent)
