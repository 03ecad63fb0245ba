"""Load the models that a user names."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from .checkpoint import check_folder, check_loaded
from .checkpoint_paths import check_folder as check_paths
from .errors import nearest
from .tokens import ByteEncoder, Encoder

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class Subject:
    """A model to evaluate.

    Attributes:
        name: name in the report.
        model: the causal language model, in evaluation mode.
        tokenizer: its tokenizer, or None.
        source: path, hub name or "object".
    """

    name: str
    model: Any
    tokenizer: Encoder | None
    source: str

    @property
    def layout(self) -> str | None:
        """The layout string of the config, if it has one."""
        layout = getattr(self.model.config, "layout", None)
        return layout if isinstance(layout, str) else None


def split_name(spec: str) -> tuple[str, str]:
    """Split ``NAME=PATH``; the default name is the last part of the path.

    A folder ``LAYOUT/seed-0`` of an ablation is called "LAYOUT seed 0".
    """
    name, separator, path = spec.partition("=")
    if separator and name and path:
        return name, path
    if spec.endswith(".gguf"):
        return Path(spec).stem, spec
    folder = Path(spec.rstrip("/"))
    seed = re.fullmatch(r"seed[-_](\d+)", folder.name)
    if seed is not None and folder.parent.name:
        return f"{folder.parent.name} seed {seed[1]}", spec
    return folder.name or spec, spec


def _resolve(source: str) -> tuple[str, dict[str, str]]:
    """Return the place to load from and extra arguments of from_pretrained."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return str(path), {}
    if path.exists():
        raise ValueError(f"{source} is a file; give a checkpoint folder or a .gguf file")
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local or (path.parent.is_dir() and path.parent != Path(".")):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else ""
        raise ValueError(f"{source}: no such checkpoint folder{hint}")
    return source, {}


def _tokenizer(source: str, wanted: str | Encoder | None, **options: Any) -> Encoder | None:
    if wanted == "bytes":
        return ByteEncoder()
    if wanted is not None and not isinstance(wanted, str):
        return wanted
    place = source if wanted is None else wanted
    folder = Path(place)
    if folder.is_dir():
        check_paths(folder)
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    gguf = "gguf_file" in options and wanted is None
    if folder.is_dir() and not gguf and not any((folder / name).is_file() for name in files):
        if wanted is not None:
            raise ValueError(f"{wanted}: no tokenizer in this folder (none of {', '.join(files)})")
        return None
    if wanted is not None:
        options.pop("gguf_file", None)
        # before the request to the hub, which is slow without a network
        near = get_close_matches(wanted.lower(), ["bytes"], cutoff=0.75)
        if near and "/" not in wanted and not folder.exists():
            raise ValueError(f"no tokenizer {wanted!r}; did you mean 'bytes'?")
    with _naming(f"{place}: no tokenizer that could be loaded"):
        return AutoTokenizer.from_pretrained(place, **options)


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" or dtype in _DTYPES.values():
        return dtype
    if dtype not in _DTYPES:
        raise ValueError(f"no dtype {str(dtype)!r}{nearest(str(dtype), ['auto', *_DTYPES])}")
    return _DTYPES[str(dtype)]


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Convert errors of libraries on a damaged or unknown checkpoint to a one-line ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what} ({error})") from error
    # KeyError, TypeError, RuntimeError, OverflowError ..., depending on the damage
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        raise ValueError(f"{what} ({type(error).__name__}: {words[0]})") from error


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Suppress transformers' table of missing and unexpected tensors; ours is one line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _weights(place: str, gguf_file: str | None = None) -> str:
    """Return the names of the weight files, for a message."""
    names = [gguf_file] if gguf_file else []
    for pattern in ("*.safetensors", "*.bin"):
        names = names or sorted(path.name for path in Path(place).glob(pattern))
    shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return f" from {shown}" if names else ""


def _load_model(source: str, place: str, **options: Any) -> torch.nn.Module:
    files = _weights(place, options.get("gguf_file"))
    with _naming(f"{source}: cannot be loaded as a checkpoint{files}"), _without_report():
        # mismatches are reported by check_loaded
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    model, loading = loaded
    check_loaded(source, loading)
    return model


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"no device {device!r}; write cpu, cuda, cuda:1 ...") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this torch ({torch.__version__}) finds no GPU")
    return device


def load(
    spec: Any,
    *,
    name: str | None = None,
    tokenizer: str | Encoder | None = None,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
) -> Subject:
    """Load a model.

    Args:
        spec: a model object, a checkpoint folder, a .gguf file, a hub name, or ``NAME=`` and one
            of the latter three.
        name: name in the report; None for the name of the folder.
        tokenizer: a tokenizer, its path or name, or "bytes" (token id = byte value); None
            for that of the model, if any.
        trust_remote_code: run code of the checkpoint.
        dtype: dtype of the weights; "auto" for that of the checkpoint.
        device: the device; None for a GPU if there is one.

    Raises:
        ValueError: the checkpoint does not exist, is damaged, lacks weights or requires code from
            its folder; or the tokenizer, dtype or device is not available.
    """
    device, dtype = _device(device), _dtype(dtype)
    if isinstance(spec, torch.nn.Module):
        label = name or type(spec).__name__
        encoder = None if tokenizer is None else _tokenizer("", tokenizer)
        return Subject(label, spec.eval(), encoder, "object")
    if isinstance(spec, Path):
        spec = str(spec)
    if not isinstance(spec, str):
        raise ValueError(f"a model is a path, a hub name or a module, got {type(spec).__name__}")
    # the name of a folder may contain '='
    label, source = (Path(spec).name, spec) if Path(spec).exists() else split_name(spec)
    place, extra = _resolve(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **extra}
    if Path(place).is_dir() and not extra:
        check_folder(Path(place), trust_remote_code)
        wrong = f"{Path(place) / 'config.json'}: not a config that can be read"
    else:
        wrong = f"{source}: no checkpoint folder here and no model that could be reached"
    with _naming(wrong):
        AutoConfig.from_pretrained(place, **options)
    encoder = _tokenizer(place, tokenizer, **options)
    model = _load_model(source, place, dtype=dtype, **options)
    with _naming(f"{source}: cannot be moved to {device}"):
        model = model.eval().to(device)
    return Subject(name or label, model, encoder, source)
