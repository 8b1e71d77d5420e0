"""Extension of griffe: in the reference, each argument of a docstring is a paragraph of its own."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

_ENTRY = re.compile(r"\n(?=(?:\w+: |Raises |Returns ))")


class Paragraphs(Extension):
    """Set lines that begin with `name: `, Raises or Returns apart."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _ENTRY.sub("\n\n", obj.docstring.value)
