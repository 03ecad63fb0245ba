"""Import and export published checkpoints: a folder, a hub name or a model to a model or a folder."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hybrid import hub
from hybrid.config.hybrid_config import HybridConfig
from hybrid.convert.checkpoint import (
    DEFAULT_SHARD_SIZE,
    Spec,
    copy_companions,
    new_folder,
    some,
    write_weights,
)
from hybrid.convert.configs import to_ours, to_theirs
from hybrid.convert.family import Family, get_family
from hybrid.convert.family_choice import only_fit
from hybrid.convert.gguf import read_gguf, save_tokenizer
from hybrid.convert.opening import gguf_path, open_ours, open_published
from hybrid.convert.published import alias_words, wrap
from hybrid.convert.replace_mixers import MixerReplacement
from hybrid.convert.stack import fill, on_meta
from hybrid.convert.tensor_checks import check_copies, check_modules, check_theirs
from hybrid.convert.tensor_plan import Step, as_filed, as_published, steps
from hybrid.convert.tensor_sources import TensorSource, Without
from hybrid.convert.tensor_streams import our_specs, read_steps, their_specs, write_steps
from hybrid.files import read_json, write_json
from hybrid.modeling.model import HybridForCausalLM
from hybrid.terminal import console, text_column

logger = logging.getLogger(__name__)

Named = Iterator[tuple[str, torch.Tensor]]


def from_published(
    source: str | Path | PreTrainedModel,
    *,
    dtype: torch.dtype | str | None = None,
    gguf_file: str | None = None,
    layout: str | None = None,
    mixers: Mapping[str, Mapping[str, Any]] | None = None,
    mtp: bool = True,
    **hub_options: Any,
) -> HybridForCausalLM:
    """Read a published model as a hybrid, with the same or another layout.

    Args:
        source: a folder with ``config.json`` and safetensors, a hub name, a GGUF file, or a model
            of transformers. The weights are copied and never shared with a given model.
        dtype: dtype of the floating-point weights, such as ``torch.bfloat16`` or its name; None
            keeps the dtype of each tensor. Quantized weights (``mxfp4``, or ``fp8`` in blocks) then
            become bfloat16.
        gguf_file: a GGUF file in the folder, which transformers reads.
        layout: another layout, such as ``SSSL``, which cycles over the depth. Unchanged layers keep
            their weights; new mixers are initialised from the softmax layers that they replace (see
            ``hybrid.convert.replace_mixers``).
        mixers: with ``layout``: letter -> options of its mixer, which override the inherited ones.
        mtp: whether to read multi-token prediction modules (``hybrid.modeling.mtp``), if there are
            any.
        hub_options: arguments of the hub's ``snapshot_download``, such as ``revision`` or
            ``token``.

    Raises:
        ValueError: a family without a map, options that cannot be expressed (all are listed), or
            weights whose names or shapes do not fit (each is named).
    """
    cast = _dtype(dtype)
    source, gguf_file = gguf_path(source, gguf_file)
    if gguf_file is not None:
        source = read_gguf(str(source), gguf_file, cast)
    with open_published(source, hub_options, cast) as (family, theirs, weights, folder):
        weights, mtp = _modules(family, theirs, weights, mtp)
        model = on_meta(to_ours(family, theirs, mtp))
        planned = _planned_import(family, theirs, model, weights)
        tensors = _tracked("reading", planned, read_steps(planned, weights, cast))
        if layout is not None:
            plan = MixerReplacement(model, layout, mixers)
            model, tensors = plan.model, plan.tensors(tensors)
        fill(model, tensors)
    model.config.dtype = model.dtype
    model.generation_config = _generation_config(source, folder, model.config)
    return model.eval()


def import_published(
    source: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    layout: str | None = None,
    mixers: Mapping[str, Mapping[str, Any]] | None = None,
    mtp: bool = True,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    **hub_options: Any,
) -> HybridConfig:
    """Convert a published checkpoint to one of ours, tensor by tensor, without building a model.

    Args:
        source: a folder, a hub name, or a GGUF file. A GGUF file is read whole, with its tokenizer.
        out: the new folder; it must not exist or must be empty. It is written only on success.
        dtype, layout, mixers, mtp, hub_options: see ``from_published``.
        max_shard_size: bytes of one file, such as ``5GB``.

    Returns:
        The config of the new checkpoint.

    Raises:
        ValueError: see ``from_published``; or ``out`` exists.
    """
    cast = _dtype(dtype)
    path, gguf_file = gguf_path(source, None)
    with ExitStack() as stack:
        made = stack.enter_context(new_folder(out))  # first, for a GGUF file is read whole
        opened: Any = path if gguf_file is None else read_gguf(str(path), gguf_file, cast)
        family, theirs, weights, folder = stack.enter_context(
            open_published(opened, hub_options, cast)
        )
        weights, mtp = _modules(family, theirs, weights, mtp)
        model = on_meta(to_ours(family, theirs, mtp))
        planned = _planned_import(family, theirs, model, weights)
        specs = our_specs(planned, weights, cast)

        def tensors() -> Named:
            return _tracked("importing", planned, read_steps(planned, weights, cast))

        if layout is None:
            config = model.config
            write_weights(made, specs, tensors, max_shard_size)
        else:
            plan = MixerReplacement(model, layout, mixers)
            config, specs = plan.config, plan.specs(specs)
            write_weights(made, specs, lambda: plan.tensors(tensors()), max_shard_size)
        config.dtype, config.architectures = _main_dtype(specs), [HybridForCausalLM.__name__]
        config.save_pretrained(made)
        if folder is not None:
            copy_companions(folder, made)
        elif gguf_file is not None:
            save_tokenizer(str(path), gguf_file, made)
            opened.generation_config.save_pretrained(made)
        hub.add_loading_files(made)
    return config


def export(
    source: str | Path | HybridForCausalLM,
    out: str | Path,
    family: str | None = None,
    *,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
) -> str:
    """Write a model of ours as a checkpoint of a published architecture.

    Args:
        source: a model, or the folder of one; weights of a folder are streamed.
        out: the new folder; it must not exist or must be empty. It is written only on success.
        family: the architecture, by its ``model_type`` or by an alias (``kimi_k2``; the export
            then has the type of transformers' class, ``deepseek_v3``). None: the family in
            ``imported_from`` of the config, if the model still fits it; otherwise the family that
            fits. If several families fit, the one whose layer types all occur in the model
            (``llama`` for plain softmax).
        max_shard_size: bytes of one file, such as ``5GB``.

    Returns:
        The name of the family.

    Raises:
        ValueError: layers or options that the family cannot express, all listed with what it can
            express; ``family`` is None and several or no families fit; or ``out`` exists.
    """
    with open_ours(source) as (model, weights, folder):
        if family is not None:
            chosen = get_family(family)
            config, again = to_theirs(chosen, model)
        else:
            chosen, config, again = only_fit(model)
        planned = as_published(chosen, steps(chosen, model, again))
        specs = their_specs(planned, weights)
        with new_folder(out) as made:
            write_weights(
                made,
                specs,
                lambda: _tracked("exporting", planned, write_steps(planned, weights)),
                max_shard_size,
            )
            if folder is not None:
                copy_companions(folder, made)
            elif isinstance(source, PreTrainedModel) and source.generation_config is not None:
                source.generation_config.save_pretrained(made)
            config.dtype = _main_dtype(weights.specs)
            config.architectures = [chosen.architecture]
            content = published_config(chosen, config)
            write_json(made / "config.json", content, indent=2, sort_keys=True)
            for line in _limits(model, made):
                logger.warning("%s: %s", chosen.name, line)
    return chosen.name


def published_config(family: Family, config: PreTrainedConfig) -> dict[str, Any]:
    """Return their config as exported: with the keys of transformers and the published ones."""
    values = json.loads(config.to_json_string(use_diff=False))
    values |= {"torch_dtype": values["dtype"], "model_type": family.model_type or family.name}
    for line in family.limits(values):
        logger.warning("%s: %s", family.name, line)
    values |= family.legacy_rope(values)
    values |= family.published(values)
    values |= alias_words(values, config.attribute_map)
    return dict(wrap(values, family.wrap_as)) if family.wrap_as else values


def _limits(model: HybridForCausalLM, out: Path) -> list[str]:
    """Return what servers do not support in exports of any family."""
    lines = []
    if model.config.num_mtp_layers:
        lines.append(
            "num_mtp_layers: the modules for multi-token prediction are written; mlx-lm leaves them"
            " out, and llama.cpp's converter may refuse them (import with --no-mtp leaves them out)"
        )
    if (out / "tokenizer.json").is_file():
        vocabulary = (read_json(out / "tokenizer.json").get("model") or {}).get("vocab") or {}
        if vocabulary.keys() == set(bytes_to_unicode().values()):
            lines.append("tokenizer: bytes; llama.cpp does not know it, and needs a published one")
    return lines


def _planned_import(
    family: Family, theirs: Any, model: HybridForCausalLM, weights: TensorSource
) -> list[Step]:
    planned = as_filed(steps(family, model), weights)
    check_modules(family, planned, weights, theirs.num_hidden_layers)
    unread = check_theirs(family, planned, weights, model.config.tie_word_embeddings)
    check_copies(planned, weights)
    if unread:
        logger.warning("left out, for their own class does not read them either: %s", some(unread))
    return planned


def _modules(
    family: Family, theirs: Any, weights: TensorSource, wanted: bool
) -> tuple[TensorSource, bool]:
    """Return whether to read multi-token prediction modules, and the tensors without them if not."""
    if family.mtp is None:
        return weights, False
    depth = theirs.num_hidden_layers
    found = sorted(name for name in weights.specs if family.mtp.owns(name, depth))
    spoken_of = family.mtp.count(theirs)
    if found and wanted and spoken_of:
        return weights, True
    if found and wanted:
        logger.warning("left out, for %s is 0: %s", family.mtp.key, some(found))
    elif wanted and spoken_of and getattr(theirs, family.mtp.key, None):
        logger.warning(
            "%s is %d, and there are no weights of such a module: read without multi-token prediction",
            family.mtp.key,
            spoken_of,
        )
    return (Without(weights, set(found)) if found else weights), False


def _generation_config(
    source: str | Path | PreTrainedModel, folder: Path | None, config: HybridConfig
) -> GenerationConfig:
    if isinstance(source, PreTrainedModel) and source.generation_config is not None:
        return GenerationConfig.from_dict(source.generation_config.to_dict())
    if folder is not None and (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def _tracked(what: str, planned: Sequence[Step], tensors: Named) -> Named:
    """Yield the tensors with a progress bar, if there is a terminal."""
    description = text_column("{task.description}")
    columns = (description, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    screen = console(stderr=True)
    with Progress(*columns, console=screen, disable=not sys.stderr.isatty()) as bar:
        total = sum(len(step.ours if what != "exporting" else step.theirs) for step in planned)
        task = bar.add_task(what, total=total)
        for name, tensor in tensors:
            bar.update(task, description=f"{what} {name}")
            yield name, tensor
            bar.advance(task)


def _main_dtype(specs: Mapping[str, Spec]) -> torch.dtype:
    """Return the dtype with the most bytes."""
    sizes: Counter[torch.dtype] = Counter()
    for spec in specs.values():
        sizes[spec.dtype] += spec.nbytes
    return sizes.most_common(1)[0][0]


def _dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    if name is None or isinstance(name, torch.dtype):
        return name
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, found {name!r}")
    return found
