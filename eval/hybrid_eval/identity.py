"""Hashes of the inputs of a result: weights, config, code, tokenizer, and data files.

Only contents are hashed. Names, sizes and time stamps stay the same when a checkpoint is replaced
in place, when a hub name moves to another revision, or when files are copied with their times.
"""

import hashlib
import io
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_CHUNK = 1 << 24
# keys for the origin of a config or a tokenizer
_PROVENANCE = frozenset(
    {
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "is_local",
        "local_files_only",
        "_commit_hash",
    }
)


def digest(*parts: str | bytes | memoryview) -> str:
    """Return a hash of these parts, 32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        # include lengths, so that ("ab", "c") and ("a", "bc") differ
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """Return the hash of a file's contents."""
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            found.update(block)
    return found.hexdigest()


def path_digest(path: str | Path) -> str:
    """Return the hash of a file, or of all files below a folder with their relative paths."""
    root = Path(path).expanduser()
    if root.is_file():
        return file_digest(root)
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return digest(*(w for p in files for w in (p.relative_to(root).as_posix(), file_digest(p))))


def content(value: Any) -> Any:
    """Return a task option as a JSON value; a path with the hash of its content."""
    if isinstance(value, str | os.PathLike):
        path = Path(value).expanduser()
        return [str(value), path_digest(path)] if str(value) and _exists(path) else str(value)
    if isinstance(value, Mapping):
        return {str(key): content(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [content(item) for item in value]
    return value if isinstance(value, bool | int | float | None) else repr(value)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    # a text that is too long for a path, or contains a zero byte
    except (OSError, ValueError):
        return False


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _hash_value(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        # packed weights of quantized modules, and extra state
        return digest(_saved(value))
    head = f"{value.dtype} {tuple(value.shape)}"
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_quantized:
        return digest(head, _saved(value))
    flat = value.detach().cpu().contiguous().reshape(-1)
    values: Any = flat.view(torch.uint8).numpy()
    return digest(head, memoryview(values))


def _tensors(model: torch.nn.Module) -> dict[str, Any]:
    """Return the state dict, and the buffers that are not saved with it."""
    return {**dict(model.named_buffers()), **model.state_dict()}


def _sources(classes: Iterable[type]) -> Iterator[str]:
    """Yield the source files of these classes, except torch's."""
    files = set()
    for kind in classes:
        module = sys.modules.get(kind.__module__)
        file = getattr(module, "__file__", None)
        if file is not None and not kind.__module__.startswith("torch."):
            files.add(file)
    yield from sorted(files)


def code_digest(classes: Iterable[type]) -> str:
    """Return the hash of the source files of classes, which includes custom mixers."""
    paths = [Path(file) for file in _sources(classes)]
    return digest(*(file_digest(path) for path in paths if path.is_file()))


def _config_text(config: Any) -> str:
    if config is None:
        return ""
    fields = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    kept = {key: value for key, value in fields.items() if key not in _PROVENANCE}
    return json.dumps(kept, sort_keys=True, default=str)


def model_digest(model: torch.nn.Module) -> str:
    """Return the hash of a model: config, structure, code, and every tensor with its dtype.

    Raises:
        ValueError: weights that are not in memory (meta tensors of an offloaded model).
    """
    tensors = _tensors(model)
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            raise ValueError(
                f"{name}: weights on the meta device cannot be hashed, so results of this model "
                "cannot be kept; load it without offloading, or evaluate with out=None"
            )
    # hashing releases the GIL, so several tensors are hashed in parallel
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_hash_value, tensors.values()))
    config = getattr(model, "config", None)
    return digest(
        _config_text(config),
        repr(model),
        code_digest({type(module) for module in model.modules()}),
        *(word for pair in zip(tensors, hashes, strict=True) for word in pair),
    )


def _tokenizer_files(folder: Path) -> Iterator[str | bytes]:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        yield path.relative_to(folder).as_posix()
        if path.name == "tokenizer_config.json":
            fields = json.loads(path.read_text(encoding="utf-8"))
            kept = {key: value for key, value in fields.items() if key not in _PROVENANCE}
            yield json.dumps(kept, sort_keys=True)
        else:
            yield path.read_bytes()


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Return the hash of the behaviour of a tokenizer, or None without one.

    Raises:
        ValueError: a custom encoder that can neither be saved nor pickled.
    """
    if tokenizer is None:
        return None
    code = code_digest([type(tokenizer)])
    if hasattr(tokenizer, "save_pretrained"):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return digest(code, *_tokenizer_files(Path(folder)))
    try:
        return digest(code, pickle.dumps(tokenizer))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__}: cannot be pickled ({error}), so results with "
            "it cannot be kept; evaluate with out=None"
        ) from error
