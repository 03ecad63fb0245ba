"""Opening of a source of weights: a folder, a hub name or a model, published or ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hybrid.checkpoint_paths import check_folder, inside
from hybrid.config.hybrid_config import HybridConfig
from hybrid.convert.checkpoint import COMPANIONS, Checkpoint
from hybrid.convert.configs import read_published
from hybrid.convert.family import Family, get_family
from hybrid.convert.gguf import SUFFIX as GGUF
from hybrid.convert.quantized import plain
from hybrid.convert.stack import on_meta
from hybrid.convert.tensor_checks import check_ours
from hybrid.convert.tensor_sources import Held, Respelt, TensorSource
from hybrid.files import read_json
from hybrid.modeling.model import HybridForCausalLM


@contextmanager
def open_published(
    source: str | Path | PreTrainedModel,
    hub_options: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[Family, Any, TensorSource, Path | None]]:
    """Return the family, their config, their tensors as stored, and the folder if there is one.

    Quantized tensors are read as ``dtype``, or as bfloat16.
    """
    if isinstance(source, PreTrainedModel):
        if any(p.itemsize < 2 for p in source.parameters()):
            raise ValueError("the model is quantized; give the result of its dequantize()")
        theirs = source.config
        family = get_family(theirs.model_type)
        if theirs.model_type in family.wrapped_in:
            theirs = theirs.get_text_config()
        yield family, theirs, Respelt(Held(on_disk(source)), family.spellings), None
        return
    folder = _folder(source, hub_options)
    config = read_json(folder / "config.json")
    if config.get("model_type") == HybridConfig.model_type:
        raise ValueError(f"{folder}: this is a hybrid already; load it with from_pretrained")
    family, theirs = read_published(config, folder / "config.json")
    with Checkpoint(folder) as files:
        weights = plain(files, config, folder, dtype)
        yield family, theirs, Respelt(weights, family.spellings), folder


@contextmanager
def open_ours(
    source: str | Path | HybridForCausalLM,
) -> Iterator[tuple[HybridForCausalLM, TensorSource, Path | None]]:
    """Return our model (on the meta device if from a folder), its tensors, and its folder."""
    if isinstance(source, HybridForCausalLM):
        yield source, Held(source.state_dict()), None
        return
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"{source}: no such folder")
    check_folder(folder)
    config = read_json(folder / "config.json")
    if config.get("model_type") != HybridConfig.model_type:
        raise ValueError(f"{folder}: no hybrid of ours, model_type is {config.get('model_type')!r}")
    model = on_meta(HybridConfig.from_dict(config))
    with Checkpoint(folder) as weights:
        check_ours(model, weights)
        yield model, weights, folder


def on_disk(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a model's tensors with the names and shapes that ``save_pretrained`` writes."""
    held = remove_tied_weights_from_state_dict(model.state_dict(), model)
    # as the class writes them, not as in the original file, which may be quantized
    anew = copy(model)
    anew.__dict__.pop("_weight_conversions", None)
    return revert_weight_conversion(anew, held)


def gguf_path(
    source: str | Path | PreTrainedModel, gguf_file: str | None
) -> tuple[str | Path | PreTrainedModel, str | None]:
    """Return the folder and the name of a GGUF file in any form; other sources unchanged."""
    if isinstance(source, PreTrainedModel):
        return source, gguf_file
    path = Path(source)
    if gguf_file is None and path.suffix == GGUF:
        if not path.is_file():
            raise ValueError(f"{path}: expected an existing file, got none")
        return path.parent, path.name
    if gguf_file is not None and path.is_dir():
        inside(path, gguf_file)
    return source, gguf_file


def _folder(source: str | Path, hub_options: Mapping[str, Any]) -> Path:
    path = Path(source)
    if path.is_dir():
        check_folder(path)
        return path
    if path.is_file():
        raise ValueError(f"{source}: is a file; give the folder that it is in")
    if isinstance(source, Path) or str(source).count("/") > 1:
        raise ValueError(f"{source}: no such folder")
    patterns = ["*.safetensors", "*.json", *(name for name in COMPANIONS if "json" not in name)]
    try:
        path = Path(snapshot_download(str(source), allow_patterns=patterns, **hub_options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{source}: no such folder, and not to be had from the hub: {reason}"
        ) from error
    check_folder(path)
    return path
