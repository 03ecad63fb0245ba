"""From what a user names to a model that can be measured."""

import hashlib
import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .checkpoint_paths import check_folder
from .errors import nearest
from .tokens import ByteEncoder, Encoder


@dataclass
class Subject:
    """A model under test.

    Attributes:
        name: how the report calls it.
        model: the causal language model, in evaluation mode.
        tokenizer: its tokenizer, or None if none was found and none was asked for.
        source: path, hub name or "object".
        fingerprint: changes when the weights or the config change; keys the result cache.
    """

    name: str
    model: Any
    tokenizer: Encoder | None
    source: str
    fingerprint: str

    @property
    def layout(self) -> str | None:
        """The layout string of the config, if it has one."""
        layout = getattr(self.model.config, "layout", None)
        return layout if isinstance(layout, str) else None


def split_name(spec: str) -> tuple[str, str]:
    """Split ``NAME=PATH``; without a name the last part of the path is the name."""
    name, separator, path = spec.partition("=")
    if separator and name and path:
        return name, path
    if spec.endswith(".gguf"):
        return Path(spec).stem, spec
    return Path(spec.rstrip("/")).name or spec, spec


def _check_folder(path: Path) -> None:
    check_folder(path)
    config = path / "config.json"
    if not config.is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ValueError(f"{path} is no checkpoint: no config.json in it (found: {found})")
    weights = [*path.glob("*.safetensors"), *path.glob("*.bin")]
    if not weights:
        raise ValueError(f"{path} is no checkpoint: a config.json but no *.safetensors or *.bin")


def _check_code(path: Path, trust_remote_code: bool) -> None:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type", "")
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


def _resolve(source: str) -> tuple[str, dict[str, str]]:
    """Return the place to load from and extra arguments of from_pretrained."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        _check_folder(path)
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
        check_folder(folder)
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    gguf = "gguf_file" in options and wanted is None
    if folder.is_dir() and not gguf and not any((folder / name).is_file() for name in files):
        if wanted is not None:
            raise ValueError(f"{wanted}: no tokenizer in this folder (none of {', '.join(files)})")
        return None
    if wanted is not None:
        options.pop("gguf_file", None)
        # the hub is not asked for what is `bytes` misspelt, which takes long without a network
        near = get_close_matches(wanted.lower(), ["bytes"], cutoff=0.75)
        if near and "/" not in wanted and not folder.exists():
            raise ValueError(f"no tokenizer {wanted!r}; did you mean 'bytes'?")
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except OSError as error:
        raise ValueError(f"{place}: no tokenizer that could be loaded ({error})") from error


def _file_fingerprint(source: str, extra: dict[str, str]) -> str:
    """Hash the config and the names, sizes and times of the weight files."""
    digest = hashlib.sha256(source.encode())
    folder = Path(source)
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            wanted = extra.get("gguf_file")
            if path.is_file() and (wanted is None or path.name == wanted):
                stat = path.stat()
                digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _object_fingerprint(model: torch.nn.Module) -> str:
    """Hash names, shapes and sums of the parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        # two moments tell trained weights apart without hashing every byte
        values = parameter.detach().double()
        digest.update(
            f"{name} {tuple(values.shape)} {values.sum()} {values.square().sum()}".encode()
        )
    return digest.hexdigest()[:16]


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        known = ("auto", "float32", "bfloat16", "float16")
        raise ValueError(f"no dtype {dtype!r}{nearest(dtype, known)}")
    return found


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
    """Load what the user named.

    Args:
        spec: a model object, a checkpoint folder, a .gguf file, a hub name, or ``NAME=`` and one
            of the latter three.
        name: how the report calls it; None takes the folder's name.
        tokenizer: a tokenizer, where to load one from, or "bytes" (token id = byte value); None
            takes the one beside the model, if there is one.
        trust_remote_code: allow code that the checkpoint brings along.
        dtype: of the weights; "auto" keeps the checkpoint's.
        device: None takes a GPU if there is one.

    Raises:
        ValueError: nothing there, no checkpoint, no such tokenizer, a model type that needs code of
            its own, or a dtype or device that is not here.
    """
    device, dtype = _device(device), _dtype(dtype)
    if isinstance(spec, torch.nn.Module):
        label = name or type(spec).__name__
        encoder = None if tokenizer is None else _tokenizer("", tokenizer)
        return Subject(label, spec.eval(), encoder, "object", _object_fingerprint(spec))
    if isinstance(spec, Path):
        spec = str(spec)
    if not isinstance(spec, str):
        raise ValueError(f"a model is a path, a hub name or a module, got {type(spec).__name__}")
    # a folder may have '=' in its own name
    label, source = (Path(spec).name, spec) if Path(spec).exists() else split_name(spec)
    place, extra = _resolve(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **extra}
    if Path(place).is_dir() and not extra:
        _check_code(Path(place), trust_remote_code)
    try:
        AutoConfig.from_pretrained(place, **options)
    except OSError as error:
        raise ValueError(
            f"{source}: no checkpoint folder here and no model that could be reached ({error})"
        ) from error
    encoder = _tokenizer(place, tokenizer, **options)
    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
    return Subject(
        name or label, model.eval().to(device), encoder, source, _file_fingerprint(place, extra)
    )
