"""Checks of a checkpoint folder before transformers reads it, with one-line errors."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .checkpoint_paths import check_folder as check_paths

_LOG = logging.getLogger(__name__)
_JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_INDEX_SUFFIX = ".index.json"


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: not UTF-8, not JSON, or not an object; the message names the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply to be read") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(found).__name__}")
    return found


def _check_safetensors(path: Path) -> None:
    """Read the header, which detects an interrupted download or a Git LFS pointer."""
    try:
        with safe_open(str(path), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}; {size:,} bytes); download it again"
        ) from error


def _check_index(path: Path) -> None:
    shards = read_object(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise ValueError(f'{path}: expected "weight_map" with a file name for every tensor')
    for name in sorted(set(shards.values())):
        if not (path.parent / name).is_file():
            raise ValueError(f"{path}: shard {name!r} is not in the folder; download it again")


def _check_model_type(path: Path, trust_remote_code: bool) -> None:
    config = read_object(path / "config.json")
    kind = config.get("model_type", "")
    if not isinstance(kind, str):
        raise ValueError(f"{path / 'config.json'}: model_type must be a name, got {kind!r}")
    if kind in CONFIG_MAPPING or trust_remote_code:
        return
    if "auto_map" in config:
        raise ValueError(
            f"{path}: model type {kind!r} runs code from its own folder; allow it with "
            "trust_remote_code=True (--trust-remote-code), or import the package that registers it"
        )
    raise ValueError(
        f"{path}: transformers knows no model type {kind!r}; import the package that registers it "
        "before evaluating (`hybrid eval` does so for its own models)"
    )


def check_folder(path: Path, trust_remote_code: bool) -> None:
    """Refuse a folder that cannot be loaded as a checkpoint.

    Raises:
        ValueError: no config or no weights, a damaged file, a file that leaves the folder, or a
            model type that requires code from the folder.
    """
    check_paths(path)
    if not (path / "config.json").is_file():
        steps = [
            int(p.parent.name[11:])
            for p in path.glob("checkpoint-*/config.json")
            if p.parent.name[11:].isdecimal()
        ]
        if steps:
            newest = path / f"checkpoint-{max(steps)}"
            raise ValueError(f"{path}: not finished; try {newest}, or run the training again")
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ValueError(f"{path} is not a checkpoint: no config.json in it (found: {found})")
    weights = [*path.glob("*.safetensors"), *path.glob("*.bin")]
    if not weights:
        raise ValueError(
            f"{path} is not a checkpoint: no *.safetensors or *.bin beside config.json"
        )
    for name in _JSON_FILES:
        if (path / name).is_file():
            read_object(path / name)
    _check_model_type(path, trust_remote_code)
    for index in path.glob(f"*{_INDEX_SUFFIX}"):
        _check_index(index)
    for file in path.glob("*.safetensors"):
        _check_safetensors(file)


def check_loaded(source: str, loading: dict[str, Any]) -> None:
    """Refuse a model with weights that are missing in its checkpoint or have another shape.

    transformers initialises them at random, so results would be meaningless.

    Args:
        source: name of the checkpoint, for the message.
        loading: loading info of ``from_pretrained(..., output_loading_info=True)``.

    Raises:
        ValueError: with the names of the tensors.
    """
    for name, found, wanted in sorted(loading.get("mismatched_keys", [])):
        raise ValueError(
            f"{source}: tensor {name} has shape {list(found)}, but the config asks for "
            f"{list(wanted)}; weights and config.json are not of one checkpoint"
        )
    for message in loading.get("error_msgs", []):
        raise ValueError(f"{source}: {message.strip()}")
    unexpected = sorted(loading.get("unexpected_keys", []))
    if missing := sorted(loading.get("missing_keys", [])):
        hint = f"; tensors without a place in it: {_few(unexpected)}" if unexpected else ""
        raise ValueError(
            f"{source}: the checkpoint lacks {len(missing)} tensor(s) of the model, which would be "
            f"measured at random values: {_few(missing)}{hint}"
        )
    if unexpected:
        _LOG.warning("%s: tensors that the model does not use: %s", source, _few(unexpected))


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
