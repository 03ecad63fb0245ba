"""Hook of mkdocs: a line `{{ keys module.Class }}` becomes the table of that class's keys."""

import importlib
import re
from typing import Any


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Fill in the tables of a page."""
    return re.sub(
        r"^\{\{ (keys|mixers|feed_forwards)(?: (\S+))? \}\}$", _fill, markdown, flags=re.M
    )


def _fill(match: re.Match) -> str:
    from hybrid.config import registry
    from hybrid.config.reference import table

    what, name = match.groups()
    if what == "keys":
        module, _, cls = name.rpartition(".")
        return table(getattr(importlib.import_module(module), cls))
    parts = [
        cls for cls in getattr(registry, what).classes() if cls.__module__.startswith("hybrid.")
    ]
    return "\n\n".join(f"### {cls.name}\n\n{table(cls.Options)}" for cls in parts)
