"""Safe reading of the pickles in torch's distributed checkpoints.

A sharded FSDP2 checkpoint has an index ``.metadata``, which torch reads with plain ``pickle``, and
values that are not tensors (learning rates, steps), which it reads with
``torch.load(weights_only=False)``. Both can run arbitrary code. This module reads both first and
allows only the plain classes that torch writes; a file with any other class or function is refused
before torch opens it.
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

# What a file may name. Some of these names are private to torch, but a checkpoint is stored with them:
# torch 2.11 to 2.13 write the same ones. One that a later torch lacks is left out, so that a file with
# it is refused by name, and all others are read.
_NAMES = {
    metadata: (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    filesystem: ("_StorageInfo",),
    torch: ("Size",),
    torch.serialization: ("_get_layout",),
    pathlib: ("PosixPath", "WindowsPath"),
}


def _plain() -> dict[tuple[str, str], Any]:
    """Classes and functions that a file may name, by module and name."""
    found = {
        (module.__name__, name): getattr(module, name)
        for module, names in _NAMES.items()
        for name in names
        if hasattr(module, name)
    }
    # pathlib's classes from Python 3.13 on
    later = {("pathlib._local", name): getattr(pathlib, name) for name in _NAMES[pathlib]}
    return {**found, **later, ("collections", "OrderedDict"): dict}


_PLAIN = _plain()


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler that reads records, numbers, text, paths and dtypes, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(
            f"expected classes of an index of tensors, got {module}.{name}"
        )


def refuse_code(checkpoint: Path) -> None:
    """Refuse a checkpoint whose pickles contain more than tensors, numbers and text.

    Args:
        checkpoint: the folder. Every index in it and its data files are checked. Checkpoints of
            DeepSpeed are not checked: DeepSpeed reads them with plain pickle.

    Raises:
        ConfigError: with the file and the class or function in it.
    """
    for index in sorted(checkpoint.rglob("*.metadata")):
        try:
            with index.open("rb") as file:
                found = _PlainUnpickler(file).load()
            if not isinstance(found, metadata.Metadata):
                raise pickle.UnpicklingError(f"expected Metadata, got {type(found).__name__}")
            _read_values(index.parent, found)
        except Exception as error:  # a damaged or malicious pickle can raise any error
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ConfigError(
                [
                    f"expected a checkpoint as torch writes it, got a pickle that may run code"
                    f" ({reason}); remove {checkpoint}, and continue only from your own runs"
                ],
                str(index),
            ) from error


def _read_values(folder: Path, found: metadata.Metadata) -> None:
    """Read every value that is not a tensor without running code.

    Raises:
        pickle.UnpicklingError: a value contains a class or a function, or is outside the folder.
    """
    stored: dict[Any, Any] = found.storage_data or {}
    for key, info in stored.items():
        path = (folder / info.relative_path).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise pickle.UnpicklingError(
                f"expected a file in the folder, got {info.relative_path!r}"
            )
        what = found.state_dict_metadata.get(key.fqn)
        if isinstance(what, metadata.TensorStorageMetadata):
            continue  # torch reads these with weights_only=True
        if getattr(info, "transform_descriptors", None):
            raise pickle.UnpicklingError(
                f"{key.fqn}: expected the format of torch.save, got another"
            )
        with path.open("rb") as file:
            file.seek(info.offset)
            torch.load(io.BytesIO(file.read(info.length)), "cpu", weights_only=True)
