"""Student and teacher: new mixers, inputs and outputs of the teacher's mixers, and frozen parts.

Shapes: B batch, T time, D model dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from hybrid.modeling.model import HybridForCausalLM
from hybrid.nn.local_rows import LocalRows


class Seen(NamedTuple):
    """Input and output of a mixer of the teacher.

    Attributes:
        x: its input, after the norm (B, T, D).
        y: its output (B, T, D).
        keywords: its other arguments.
    """

    x: torch.Tensor
    y: torch.Tensor
    keywords: Mapping[str, Any]


def replaced_layers(teacher: HybridForCausalLM, student: HybridForCausalLM) -> tuple[int, ...]:
    """Return the layers whose mixer has another letter in the student."""
    pairs = zip(teacher.config.layers, student.config.layers, strict=True)
    return tuple(i for i, (was, now) in enumerate(pairs) if was != now)


@torch.no_grad()
def watch(
    teacher: HybridForCausalLM, layers: Sequence[int], inputs: Mapping[str, torch.Tensor]
) -> dict[int, Seen]:
    """Run the teacher up to the last of these layers, and record inputs and outputs of their mixers."""
    seen: dict[int, Seen] = {}

    def note(i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: Any, output: Any) -> None:
            seen[i] = Seen(args[0], output[0], keywords)
            if i == layers[-1]:
                raise _Enough

        return hook

    hooks = [
        teacher.model.layers[i].mixer.register_forward_hook(note(i), with_kwargs=True)
        for i in layers
    ]
    try:
        teacher.model(**inputs, use_cache=False)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen


class _Enough(Exception):
    """Raised after the last required mixer has run."""


def mix_as_seen(student: HybridForCausalLM, layer: int, seen: Seen) -> torch.Tensor:
    """Return the output (B, T, D) of a student's mixer for the input of the teacher's."""
    mixer: Any = student.model.layers[layer].mixer
    letter = student.config.layers[layer].mixers[0]
    keywords = dict(seen.keywords)
    positions = keywords.get("position_ids")
    rotary: Any = dict(student.model.rotary.items()).get(letter)
    keywords["position_embeddings"] = None if rotary is None else rotary(seen.x, positions)
    full = mixer.layer_type == "full_attention"
    if not full or isinstance(keywords.get("attention_mask"), LocalRows):
        keywords["attention_mask"] = None  # the student's mixer needs another kind of mask
    return mixer(seen.x, **keywords)[0]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return |found - wanted|^2 / |wanted|^2 over all elements, in float32: 0 if equal (both may be
    zero), 1 for all zeros.
    """
    difference = (found - wanted).float().square().sum()
    return difference / wanted.float().square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def hold_still(student: HybridForCausalLM, replaced: Sequence[int], parts: Sequence[str]) -> None:
    """Freeze the parameters of these parts; see ``PARTS``."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(part_of(name, replaced) not in parts)


def part_of(name: str, replaced: Sequence[int]) -> str:
    """Return the part of a parameter of a hybrid."""
    words = name.split(".")
    if words[:2] == ["model", "layers"]:
        if words[3] == "mixer":
            return "replaced" if int(words[2]) in replaced else "kept"
        return "ffn" if words[3] == "ffn" else "norms"
    return "norms" if words[:2] == ["model", "norm"] else "embeddings"


@contextmanager
def silenced(model: HybridForCausalLM, layers: Sequence[int]) -> Iterator[None]:
    """Set the outputs of the mixers of these layers to zero."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:])

    hooks = [model.model.layers[i].mixer.register_forward_hook(hook) for i in layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
