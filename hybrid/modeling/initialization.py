"""Initialisation of all parameters and buffers.

A module initialises its own tensors in ``init_parameters(std)`` with the functions of
``transformers.initialization``, which do not change tensors loaded from a checkpoint. ``initialize`` is
called once for every module, children first, after transformers' own defaults (normal weights, zero
biases, norm weights of one).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from hybrid.config.fields import StackFields
from hybrid.config.sizes import Sizes
from hybrid.ffn.router import Router
from hybrid.modeling import mup
from hybrid.modeling.layer import HybridLayer

logger = logging.get_logger(__name__)


def prepare(model: Any) -> None:
    """Record on the modules of a hybrid model what their initial values depend on beside themselves.

    Called once, when the model is built: the growth of matrices under muP (`mup.mark`), and for
    DeepNorm which layers' projections start smaller.
    """
    mup.mark(model)
    if model.config.stack.sizes.init == "deepnorm":
        for layer in model.modules():
            if isinstance(layer, HybridLayer):
                _mark_value_paths(layer)


def _mark_value_paths(layer: HybridLayer) -> None:
    """Mark what DeepNorm scales: values, outputs and feed-forwards (arXiv 2203.00555, figure 2)."""
    for name, module in layer.named_modules():
        in_ffn = name.startswith("ffn.") and not isinstance(module, Router)
        is_value = name.rpartition(".")[2] == "v_proj"
        if in_ffn or is_value or hasattr(module, "is_residual_projection"):
            module.is_value_path = True  # type: ignore[assignment]


def initialize(module: nn.Module, config: StackFields, sizes: Sizes, *, is_head: bool) -> None:
    """Initialise one module beyond transformers' defaults.

    Args:
        module: any module of the model, whose children are initialised.
        config: config with ``initializer_range``.
        sizes: sizes of the stack, with ``init`` and the depth.
        is_head: whether the module is the output head, which ``xavier`` and ``deepnorm`` do not change.
    """
    if isinstance(module, nn.Linear):
        _initialize_linear(module, sizes, config.initializer_range, is_head)
    if hasattr(module, "init_parameters"):
        module.init_parameters(config.initializer_range)
    mup.scale_initial(module)


def _initialize_linear(linear: nn.Linear, sizes: Sizes, std: float, is_head: bool) -> None:
    if sizes.init in ("xavier", "deepnorm") and not is_head:
        gain = sizes.deepnorm_beta if hasattr(linear, "is_value_path") else 1.0
        init.xavier_normal_(linear.weight, gain=gain)
    if sizes.init == "depth_scaled" and hasattr(linear, "is_residual_projection"):
        scaled = std / max(1, sizes.num_residual_branches) ** 0.5
        init.normal_(linear.weight, mean=0.0, std=scaled)


def has_say(module: nn.Module) -> bool:
    """Return whether a module has ``init_parameters`` and any tensor left to initialise."""
    if not hasattr(module, "init_parameters") or is_set(module):
        return False
    return not all(map(is_set, itertools.chain(module.parameters(), module.buffers())))


def is_set(thing: nn.Module | torch.Tensor) -> bool:
    """Return whether transformers has marked a tensor as loaded, or a module as initialised."""
    return getattr(thing, "_is_hf_initialized", False)


def unset_tensors(module: nn.Module) -> dict[str, int]:
    """Return the names of a module's own tensors not loaded from a checkpoint, with version counters."""
    own = itertools.chain(
        module.named_parameters(recurse=False), module.named_buffers(recurse=False)
    )
    return {
        name: tensor._version
        for name, tensor in own
        if not (is_set(tensor) or tensor.is_meta or tensor.is_inference())
    }


def fill_untouched(module: nn.Module, before: dict[str, int], std: float) -> None:
    """Initialise parameters missing in the checkpoint that nothing has set: normal, biases zero.

    Args:
        module: module with the result ``before`` of ``unset_tensors``.
        before: name -> version counter.
        std: standard deviation of the normal distribution.

    Raises:
        ValueError: a buffer has no value.
    """
    for name, version in before.items():
        tensor = getattr(module, name)
        if tensor._version != version or not tensor.numel():
            continue
        kind = type(module).__name__
        if not isinstance(tensor, nn.Parameter):
            raise ValueError(
                f"{kind}.{name}: expected a value from the checkpoint or from"
                f" {kind}.init_parameters, got neither; try setting the buffer in init_parameters(std),"
                " as loading discards values set in a constructor"
            )
        logger.warning_once(
            f"{kind}.{name} is not in the checkpoint, and {kind}.init_parameters does not set it; it is"
            " initialised with the default (weights normal, biases 0)"
        )
        if name.endswith("bias"):
            init.zeros_(tensor)
        else:
            init.normal_(tensor, mean=0.0, std=std)
