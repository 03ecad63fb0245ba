"""Models of placements, made of the modules of a teacher and of its all-linear student.

No weights are copied: a layer of a placement is the teacher's layer, or the teacher's layer with the
student's mixer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from hybrid.config.hybrid_config import HybridConfig
from hybrid.convert.stack import layout_of, on_meta
from hybrid.mixers import Mixer
from hybrid.modeling.model import HybridForCausalLM
from hybrid.modeling.residual import ParallelMixers
from hybrid.search.placement import Placement, Space

LinearMixers = dict[int, Mixer]
"""Layer -> the linear mixer that replaces its softmax attention."""


class Choice(ParallelMixers):
    """A softmax mixer and a linear one on the same input, of which one runs, or a mixture of both.

    Attributes:
        keep: whether the softmax mixer runs, if there is no gate.
        gate: scalar g in [0, 1]: the output is g * softmax + (1 - g) * linear; None for no gate.
    """

    def __init__(self, softmax: Mixer, linear: Mixer) -> None:
        nn.Module.__init__(self)
        self.branches = nn.ModuleList([softmax, linear])
        self.keep = True
        self.gate: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, branch_kwargs: list[dict[str, Any]]) -> torch.Tensor:
        """Map x (B, T, D) to (B, T, D); ``branch_kwargs`` has the keyword arguments of each mixer."""
        gate = self.gate
        if gate is None:
            place = 0 if self.keep else 1
            return self.branches[place](x, **branch_kwargs[place])[0]
        softmax, linear = (
            branch(x, **kwargs)[0]
            for branch, kwargs in zip(self.branches, branch_kwargs, strict=True)
        )
        return gate * softmax + (1 - gate) * linear


class Models:
    """Models between a teacher and its all-linear student.

    Args:
        teacher: the model with softmax attention in the searched layers, without gradients.
        student: the same with the linear mixer in all of them.
        space: the placements.

    The student's other modules are replaced by the teacher's, which they are equal to.
    """

    def __init__(
        self, teacher: HybridForCausalLM, student: HybridForCausalLM, space: Space
    ) -> None:
        self.teacher, self.student, self.space = teacher, student, space
        for i in space.layers:
            _share(teacher.model.layers[i], student.model.layers[i])
        self.linear: LinearMixers = {i: student.model.layers[i].mixer for i in space.layers}

    def build(self, kept: Placement, linear: LinearMixers | None = None) -> HybridForCausalLM:
        """Return the model of a placement; it shares all its modules.

        Args:
            kept: the layers whose softmax attention stays.
            linear: mixers of the other layers; None for the student's.
        """
        model = self._empty(self.space.letters(kept))
        for i, old in enumerate(self.teacher.model.layers):
            if i in self.space.layers and i not in kept:
                # a copy of the layer object, as the student's must keep its own mixer
                layer: Any = copy.copy(self.student.model.layers[i])
                layer._modules = dict(layer._modules)
                layer.mixer = (linear or self.linear)[i]
                model.model.layers[i] = layer
            else:
                model.model.layers[i] = old
        return model.eval()

    def supernet(self) -> HybridForCausalLM:
        """Return a model with a ``Choice`` in every searched layer.

        Its linear mixers are copies, which training may change. All other modules are shared.
        """
        letters = self.space.letters(self.space.complete)
        both = [
            (*word, self.space.linear) if i in self.space.layers else word
            for i, word in enumerate(letters)
        ]
        model = self._empty(both)
        for i, old in enumerate(self.teacher.model.layers):
            if i not in self.space.layers:
                model.model.layers[i] = old
                continue
            layer: Any = model.model.layers[i]
            _share(old, layer)
            layer.mixer = Choice(old.mixer, copy.deepcopy(self.linear[i]))
        return model

    def choices(self, supernet: HybridForCausalLM) -> dict[int, Choice]:
        """Return the ``Choice`` of every searched layer of a supernet."""
        layers: Any = supernet.model.layers
        return {i: layers[i].mixer for i in self.space.layers}

    def _empty(self, letters: list[tuple[str, ...]]) -> HybridForCausalLM:
        """Return a model with these mixers whose layers are still on the meta device."""
        old, new = self.teacher.config, self.student.config
        values = new.to_dict()
        words, ffns = ["".join(word) for word in letters], [layer.ffn or "" for layer in old.layers]
        values |= layout_of(words, ffns)
        values["mixers"] = {**(old.mixers or {}), **(new.mixers or {})}
        used = {symbol for word in letters for symbol in word} | set(values.get("mtp_layout") or "")
        values["mixers"] = {s: o for s, o in values["mixers"].items() if s in used}
        model = on_meta(HybridConfig.from_dict(values))
        for name, module in self.teacher.named_children():
            if name != "model":
                setattr(model, name, module)
        for name, module in self.teacher.model.named_children():
            if name not in ("layers", "rotary"):
                setattr(model.model, name, module)
        rotary = {
            **dict(self.student.model.rotary.items()),
            **dict(self.teacher.model.rotary.items()),
        }
        for symbol in model.model.rotary:
            model.model.rotary[symbol] = rotary[symbol]
        model.config.dtype = self.teacher.dtype
        model.generation_config = copy.deepcopy(self.teacher.generation_config)
        return model


def _share(old: nn.Module, new: nn.Module) -> None:
    """Give a layer all modules of another one but the mixer."""
    for name, module in old.named_children():
        if name != "mixer":
            setattr(new, name, module)
