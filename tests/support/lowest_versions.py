"""Print the lowest versions that pyproject.toml allows, as constraints for pip.

    python -m tests.support.lowest_versions > lowest.txt; pip install -c lowest.txt -e .

`make test-lowest` runs tests with them. torch has the version of constraints.txt here: PyPI's older builds for Linux
bring 5 GB of CUDA.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping

from tests.support.paths import ROOT

_REQUIREMENT = re.compile(r"([\w.-]+)(\[[^]]*\])?(.*)")
_FLOOR = re.compile(r">=([\w.]+)")
_PINNED = re.compile(r"([\w.-]+)==(\S+)")


def ranges(project: str) -> dict[str, str]:
    """Versions that a pyproject.toml allows, by package: of its dependencies and of all extras."""
    table = tomllib.loads(project)["project"]
    extras = table.get("optional-dependencies", {}).values()
    found = {}
    for line in (*table["dependencies"], *(line for extra in extras for line in extra)):
        name, _, versions = _REQUIREMENT.fullmatch(line).groups()
        if name != table["name"]:
            found[name] = versions
    return found


def pinned(constraints: str) -> dict[str, str]:
    """Version of each package in a constraints.txt."""
    return {match[1]: match[2] for match in map(_PINNED.match, constraints.splitlines()) if match}


def lowest(allowed: Mapping[str, str], tested: Mapping[str, str]) -> list[str]:
    """Lines `name==floor`. Raises ValueError for a package without a floor."""
    floors = {name: _FLOOR.search(versions) for name, versions in allowed.items()}
    if missing := [name for name, floor in floors.items() if floor is None]:
        raise ValueError(f"pyproject.toml gives no lowest version (>=) of {', '.join(missing)}")
    return [f"{name}=={tested[name] if name == 'torch' else floor[1]}" for name, floor in floors.items() if floor]


if __name__ == "__main__":
    files = [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")]
    print("\n".join(lowest(ranges(files[0]), pinned(files[1]))))
