"""Initial values of every parameter and buffer.

A module sets those it knows about in `init_parameters(std)`, with the functions of
`transformers.initialization`, which leave alone what a checkpoint has filled. `initialize` is called
once for every module, children first, after transformers' own defaults (normal weights, zero biases,
norms of one).
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from hybrid.config.fields import StackFields
from hybrid.config.sizes import Sizes
from hybrid.modeling import mup

logger = logging.get_logger(__name__)


def initialize(module: nn.Module, config: StackFields, sizes: Sizes, *, is_head: bool) -> None:
    """Initialise one module beyond transformers' defaults.

    Args:
        module: any module of the model; its children are done already.
        config: its `initializer_range`.
        sizes: of the stack, with `init` and the depth.
        is_head: whether it is the output head, which `xavier` and `deepnorm` leave alone.
    """
    if hasattr(module, "init_parameters"):
        module.init_parameters(config.initializer_range)
    elif isinstance(module, nn.Linear):
        _initialize_linear(module, sizes, config.initializer_range, is_head)
    mup.scale_initial(module)


def _initialize_linear(linear: nn.Linear, sizes: Sizes, std: float, is_head: bool) -> None:
    if sizes.init in ("xavier", "deepnorm") and not is_head:
        gain = sizes.deepnorm_beta if hasattr(linear, "is_value_path") else 1.0
        init.xavier_normal_(linear.weight, gain=gain)
    if hasattr(linear, "starts_at_zero"):
        init.zeros_(linear.weight)
    elif sizes.init == "depth_scaled" and hasattr(linear, "is_residual_projection"):
        scaled = std / max(1, sizes.num_residual_branches) ** 0.5
        init.normal_(linear.weight, mean=0.0, std=scaled)


def has_say(module: nn.Module) -> bool:
    """Whether a module has `init_parameters` to call, and there is something that it may still set."""
    if not hasattr(module, "init_parameters") or is_set(module):
        return False
    return not all(map(is_set, itertools.chain(module.parameters(), module.buffers())))


def is_set(thing: nn.Module | torch.Tensor) -> bool:
    """Whether transformers has marked a tensor as loaded, or a module as initialised."""
    return getattr(thing, "_is_hf_initialized", False)


def unset_tensors(module: nn.Module) -> dict[str, int]:
    """Names of a module's own tensors that no checkpoint filled, and how often each was written to."""
    own = itertools.chain(
        module.named_parameters(recurse=False), module.named_buffers(recurse=False)
    )
    return {
        name: tensor._version
        for name, tensor in own
        if not (is_set(tensor) or tensor.is_meta or tensor.is_inference())
    }


def fill_untouched(module: nn.Module, before: dict[str, int], std: float) -> None:
    """Initialise parameters that a checkpoint lacks and nothing has set: normal, biases zero.

    Args:
        module: whose `unset_tensors` were `before`.
        before: name -> number of writes.
        std: of the normal distribution.

    Raises:
        ValueError: a buffer is left without a value.
    """
    for name, version in before.items():
        tensor = getattr(module, name)
        if tensor._version != version or not tensor.numel():
            continue
        kind = type(module).__name__
        if not isinstance(tensor, nn.Parameter):
            raise ValueError(
                f"{kind}.{name}: expected a value from the checkpoint or from"
                f" {kind}.init_parameters, got neither; set the buffer in init_parameters(std), as"
                " memory that a constructor filled is lost on loading"
            )
        logger.warning_once(
            f"{kind}.{name} is not in the checkpoint, and {kind}.init_parameters does not set it; it"
            " starts as any weight does (biases 0)"
        )
        if name.endswith("bias"):
            init.zeros_(tensor)
        else:
            init.normal_(tensor, mean=0.0, std=std)
