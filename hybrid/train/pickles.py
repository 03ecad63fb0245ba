"""Pickles of torch's distributed checkpoints, read so that they cannot run code.

A checkpoint of sharded FSDP2 has an index `.metadata`, which torch reads with plain `pickle`, and values
that are no tensors (learning rates, steps), which it reads with `torch.load(weights_only=False)`. Either
runs whatever code the file names. Both are read here first, with nothing allowed but the plain classes
that torch itself writes; a file that names anything else is refused before torch opens it.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from hybrid.config.options import ConfigError

_PLAIN = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    **{("pathlib", name): getattr(pathlib, name) for name in ("PosixPath", "WindowsPath")},
    # pathlib's classes from Python 3.13 on
    **{("pathlib._local", name): getattr(pathlib, name) for name in ("PosixPath", "WindowsPath")},
}


class _PlainUnpickler(pickle.Unpickler):
    """Reads records, numbers, text, paths and dtypes; refuses any other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors needs")


def refuse_code(checkpoint: Path) -> None:
    """Refuse a checkpoint whose pickles name more than tensors, numbers and text.

    Args:
        checkpoint: the folder; every index in it is looked at, and what lies beside it.
            Checkpoints of DeepSpeed are not: DeepSpeed itself reads them, with plain pickle.

    Raises:
        ConfigError: the file and what it names.
    """
    for index in sorted(checkpoint.rglob("*.metadata")):
        try:
            with index.open("rb") as file:
                found = _PlainUnpickler(file).load()
            if not isinstance(found, metadata.Metadata):
                raise pickle.UnpicklingError(f"it holds {type(found).__name__}")
            _read_values(index.parent, found)
        except Exception as error:  # whatever a damaged or hostile pickle ends in
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ConfigError(
                [
                    f"expected a checkpoint as torch writes it, got a pickle that may run code"
                    f" ({reason}); remove {checkpoint}, and continue only from your own runs"
                ],
                str(index),
            ) from error


def _read_values(folder: Path, found: metadata.Metadata) -> None:
    """Read every value that is no tensor the way that allows no code.

    Raises:
        pickle.UnpicklingError: one names a class or a function, or lies outside the folder.
    """
    stored: dict[Any, Any] = found.storage_data or {}
    for key, info in stored.items():
        path = (folder / info.relative_path).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise pickle.UnpicklingError(f"it names the file {info.relative_path!r} elsewhere")
        what = found.state_dict_metadata.get(key.fqn)
        if isinstance(what, metadata.TensorStorageMetadata):
            continue  # torch reads these with weights_only=True
        if getattr(info, "transform_descriptors", None):
            raise pickle.UnpicklingError(f"{key.fqn} is stored in a form that is not read here")
        with path.open("rb") as file:
            file.seek(info.offset)
            torch.load(io.BytesIO(file.read(info.length)), "cpu", weights_only=True)
