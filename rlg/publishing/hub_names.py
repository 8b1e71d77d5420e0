"""Names on the Hugging Face hub, checked before anything is loaded."""

from __future__ import annotations

import re


def check_license(license: str | None) -> None:
    """Raise ValueError for a text that is no hub license id."""
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(f"the license must be an id of the hub's, such as apache-2.0, got {license!r}")


def check_repo(repo: str) -> None:
    """Raise ValueError for a text that is no name of a repository."""
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo)
