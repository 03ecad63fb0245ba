"""Initialisation of all parameters and buffers.

A module initialises its own tensors in ``init_parameters(std)`` with the functions of
``transformers.initialization``, which do not change tensors loaded from a checkpoint. ``initialize`` is
called once for every module, children first, after transformers' own defaults (normal weights, zero
biases, norm weights of one).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from hybrid.config.fields import StackFields
from hybrid.config.sizes import Sizes
from hybrid.ffn.router import Router
from hybrid.modeling.layer import HybridLayer
from hybrid.modeling.mup import Growth, find_growth

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Role:
    """What the initial values of a module depend on beside the module itself.

    Attributes:
        is_residual_projection: whether the module is a Linear that writes to the residual stream.
        is_value_path: whether DeepNorm scales it: values, outputs and feed-forwards (arXiv 2203.00555,
            figure 2).
        growth: growth of each of its matrices under muP, by parameter name.
    """

    is_residual_projection: bool
    is_value_path: bool
    growth: Mapping[str, Growth]


NO_ROLE = Role(False, False, {})


def prepare(model: Any) -> None:
    """Find the role of each module of a model. Called once, after all modules have been built."""
    outputs = {
        child
        for module in model.modules()
        for name in getattr(module, "residual_projections", ())
        if isinstance(child := getattr(module, name, None), nn.Linear)
    }
    grown = find_growth(model)
    layers = (module for module in model.modules() if isinstance(module, HybridLayer))
    values = outputs.union(*map(_value_paths, layers))
    for module in values | grown.keys():
        module.role = Role(module in outputs, module in values, grown.get(module, {}))  # type: ignore[assignment]


def _value_paths(layer: HybridLayer) -> set[nn.Module]:
    """Return the projections of values and the modules of the feed-forward, routers excepted."""
    return {
        module
        for name, module in layer.named_modules()
        if name.rpartition(".")[2] == "v_proj"
        or (name.startswith("ffn.") and not isinstance(module, Router))
    }


def growths(model: nn.Module) -> dict[str, Growth]:
    """Return the growth of the parameters whose learning rate muP changes, by name."""
    return {
        f"{name}.{key}" if name else key: growth
        for name, module in model.named_modules()
        for key, growth in getattr(module, "role", NO_ROLE).growth.items()
        if growth.rate_factor != 1
    }


def initialize(module: nn.Module, config: StackFields, sizes: Sizes, *, is_head: bool) -> None:
    """Initialise one module beyond transformers' defaults.

    Args:
        module: any module of the model, whose children are initialised.
        config: config with ``initializer_range``.
        sizes: sizes of the stack, with ``init`` and the depth.
        is_head: whether the module is the output head, which ``xavier`` and ``deepnorm`` do not change.
    """
    role = getattr(module, "role", NO_ROLE)
    if isinstance(module, nn.Linear) and not is_head:
        _initialize_linear(module, role, sizes, config.initializer_range)
    if hasattr(module, "init_parameters"):
        module.init_parameters(config.initializer_range)
    for name, growth in role.growth.items():
        parameter = getattr(module, name)
        init.copy_(parameter, parameter * growth.std_factor)


def _initialize_linear(linear: nn.Linear, role: Role, sizes: Sizes, std: float) -> None:
    if sizes.init == "xavier":
        init.xavier_normal_(linear.weight)
    if sizes.init == "deepnorm":
        gain = sizes.deepnorm_beta if role.is_value_path else 1.0
        init.xavier_normal_(linear.weight, gain=gain)
    if sizes.init == "depth_scaled" and role.is_residual_projection:
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
