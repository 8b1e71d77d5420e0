"""Hooks of mkdocs: links out of docs/ lead to a file, and the site asks nothing of another server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_UP = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")
_ASSET = re.compile(r"""<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Show links to files outside of docs/ as the file's path. Raises ValueError for a file that is not there."""
    root, docs = Path(config.config_file_path).parent.resolve(), Path(config.docs_dir).resolve()

    def path(match: re.Match[str]) -> str:
        target = (docs / page.file.src_path).parent.joinpath(match[2]).resolve()
        if target.is_relative_to(docs):
            return match[0]
        if not (target.exists() and target.is_relative_to(root)):
            raise ValueError(f"{page.file.src_path}: no file {match[2]} in the repository")
        return f"`{target.relative_to(root)}`"

    return _UP.sub(path, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Raises ValueError for a script, a picture or a style sheet of another server."""
    if found := _ASSET.search(output):
        raise ValueError(f"{page.file.src_path} loads {found[1]}")
    return output
