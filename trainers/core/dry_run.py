"""Report of `--dry_run`: config, counts, memory, missing files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from rlg.models import hub
from rlg.tasks import prompt_sets
from trainers.benchmark import memory_plan
from trainers.core.config import RunConfig, in_use

_PROMPTS = ("prompts", "eval_prompts")
_DATA = ("data", "image_root", "preference_model")


def report(config: RunConfig, processes: int) -> None:
    """Print a config and what follows from it, as YAML with comments.

    Raises ValueError for a missing file, and for sizes that do not fit together.
    """
    derived = config.derived(processes)
    print(yaml.safe_dump(in_use(config), sort_keys=False).rstrip())
    print("# derived", *(f"# {name}: {value}" for name, value in derived.items()), sep="\n")
    print(*(f"# {line}" for line in memory_plan.lines(config, processes)), sep="\n", flush=True)
    if absent := list(missing(config)):
        raise ValueError(f"not on this machine: {', '.join(absent)}")
    check_prompts(config)


def missing(config: RunConfig) -> Iterator[str]:
    """`option path` of each local file or folder that is missing.

    The hub is not asked.
    """
    values = vars(config)
    for name in (*_PROMPTS, *_DATA):
        value = values.get(name)
        if value is None or value.startswith(prompt_sets.ELSEWHERE) or Path(value).expanduser().exists():
            continue
        if name in _PROMPTS or not hub.is_id(value):
            yield f"{name} {value}"


def check_prompts(config: RunConfig) -> None:
    """Read the prompt sets that need no network.

    Raises ValueError as `rlg.tasks.prompt_sets.load_each`.
    """
    values = vars(config)
    sources = [values.get(name) for name in _PROMPTS]
    if any(sources) and not any(source and source.startswith(prompt_sets.HUB) for source in sources):
        prompt_sets.load_each(sources, values["prompt_column"])
