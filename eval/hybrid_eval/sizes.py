"""Sizes of a measurement as text: lengths, pairs and counts."""

from collections.abc import Mapping
from typing import Any


def sizes(result: Mapping[str, Any]) -> str:
    """Return the sizes of a result, e.g. ``n 800 in 25 cells, 32/64/128 tokens``."""
    cells = [cell for cell in result.get("cells") or () if "length" in cell]
    words = []
    if result.get("n") is not None:
        count = len(result.get("cells") or ())
        words.append(f"n {result['n']:,}" + (f" in {count} cells" if count > 1 else ""))
    if cells:
        lengths = dict.fromkeys(cell["length"] for cell in cells)
        words.append(f"{'/'.join(map(str, lengths))} tokens")
    elif tokens := result.get("tokens"):
        least, most = tokens["min"], tokens["max"]
        words.append(f"{most:,} tokens" if least == most else f"{least:,} to {most:,} tokens")
    if "pairs" in result:
        words.append(f"{result['pairs']} pairs")
    return ", ".join(words)
