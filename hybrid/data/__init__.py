"""Training data: sources, tokenisation, packing with document boundaries, mixtures.

Row `i` of a training run is a function of the configuration and `i` alone, never of how far a
previous process got, so a run that is killed and started again sees the same rows in the same
order.

    open_source   one entry of a config's `data:` -> rows
    Mixture       several of them by weight -> one data set
    RowCollator   rows -> a batch with `position_ids` that restart at each document
    prepare       text -> tokenised shards on disk, memory-mapped afterwards
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid.data.collate import RowCollator
    from hybrid.data.documents import Documents
    from hybrid.data.mixture import Mixture
    from hybrid.data.packing import PackedRows
    from hybrid.data.preparation import prepare
    from hybrid.data.sources import RowFormat, SourceConfig, open_source, source_names

# Light on purpose: `import hybrid.data` loads neither torch nor datasets.
_HOMES = {
    "RowCollator": "collate",
    "Documents": "documents",
    "Mixture": "mixture",
    "PackedRows": "packing",
    "prepare": "preparation",
    "RowFormat": "sources",
    "SourceConfig": "sources",
    "open_source": "sources",
    "source_names": "sources",
}

__all__ = [
    "Documents",
    "Mixture",
    "PackedRows",
    "RowCollator",
    "RowFormat",
    "SourceConfig",
    "open_source",
    "prepare",
    "source_names",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
