"""vLLM's linear layers in place of torch's, split over processes with tensor parallelism.

``hybrid.config.parallel`` collects the splits that mixers and feed-forwards declare. Their projections
become ``ColumnParallelLinear`` and ``RowParallelLinear``. Stacked experts and sinks keep their modules;
each process loads its part. All other projections become ``ReplicatedLinear``. On a CPU vLLM packs their
weights for its own kernels.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from hybrid.config.parallel import PlacedSplit, tensor_splits
from hybrid.config.spec import StackSpec
from hybrid.ffn.moe import Experts
from hybrid.mixers.attention import SoftmaxMixer
from hybrid.mixers.multi_head_latent_attention import MultiHeadLatentAttention

logger = logging.getLogger(__name__)


LINEARS = {
    "colwise": ColumnParallelLinear,
    "rowwise": RowParallelLinear,
    "replicate": ReplicatedLinear,
}


def use_vllm_linears(model: nn.Module, stack: StackSpec) -> None:
    """Replace the linear layers of a model by vLLM's, and split the stack over vLLM's processes.

    A part that has no split, or whose sizes the number of processes does not divide, is whole in every
    process; layers without any split are logged.

    Args:
        model: ``HybridForCausalLM``, before its weights are tied and loaded.
        stack: its layers.
    """
    processes = get_tensor_model_parallel_world_size()
    if processes > 1:
        _split_stack(model.get_submodule("model"), stack, processes)
    for path, module in list(model.named_modules()):
        for name, part in list(module.named_children()):
            # latent attention multiplies by the weight itself (`plain_weight`)
            absorbed = isinstance(module, MultiHeadLatentAttention) and name == "kv_proj"
            if type(part) is nn.Linear and not absorbed:
                setattr(module, name, _vllm_linear(part, "replicate", f"{path}.{name}"))


def _split_stack(model: nn.Module, stack: StackSpec, processes: int) -> None:
    whole = {layer.layer_idx for layer in stack}
    for split in tensor_splits(stack, any_style=True):
        if any(size % processes for size in split.sizes.values()):
            continue
        whole.discard(split.layer_idx)
        _apply(model, split, processes)
    if whole:
        logger.warning(
            "tensor_parallel_size %d: no part of layer %s is split; each process has all of it",
            processes,
            ", ".join(map(str, sorted(whole))),
        )


def load(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy a tensor of a checkpoint, or this process's part of it, to a parameter."""
    loader = getattr(parameter, "weight_loader", None)
    if loader is None:
        parameter.data.copy_(tensor)
    else:
        loader(parameter, tensor)


def _apply(model: nn.Module, split: PlacedSplit, processes: int) -> None:
    for path, style in split.rules.items():
        parent = model.get_submodule(path.rpartition(".")[0])
        name = path.rpartition(".")[2]
        part = getattr(parent, name)
        if isinstance(part, nn.Linear):
            setattr(parent, name, _vllm_linear(part, style, path))
        elif isinstance(part, nn.Parameter):
            _split_parameter(parent, name, part, style, processes)
        elif isinstance(part, Experts):
            part.intermediate_dim //= processes
            part.register_forward_hook(_sum_output)
    owner = model.get_submodule(f"layers.{split.layer_idx}")
    for module in owner.modules():
        if isinstance(module, SoftmaxMixer) and isinstance(
            getattr(module, "q_proj", None), ColumnParallelLinear
        ):
            _take_heads(module, processes)


def _vllm_linear(linear: nn.Linear, style: str, path: str) -> nn.Module:
    return LINEARS[style](
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        params_dtype=linear.weight.dtype,
        return_bias=False,
        prefix=path,
    )


def _split_parameter(
    module: nn.Module, name: str, whole: nn.Parameter, style: str, processes: int
) -> None:
    """Replace a parameter by this process's part of it."""
    # stacked matrices (E, out, in), or one value for each head
    dim = {"colwise": -2, "packed_colwise": -2, "rowwise": -1}[style] if whole.ndim > 1 else 0
    packed = 2 if style == "packed_colwise" else 1
    shape = list(whole.shape)
    shape[dim] //= processes
    part = nn.Parameter(whole.new_empty(shape), requires_grad=False)
    part.weight_loader = _part_loader(dim, packed, processes)  # type: ignore[attr-defined]
    setattr(module, name, part)


def _part_loader(dim: int, packed: int, processes: int) -> Callable[..., None]:
    """Return a function that loads this process's part of each of ``packed`` matrices in one tensor."""
    rank = get_tensor_model_parallel_rank()

    def loader(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
        parts = [y.chunk(processes, dim)[rank] for y in tensor.chunk(packed, dim)]
        parameter.data.copy_(torch.cat(parts, dim))

    return loader


def _take_heads(mixer: Any, processes: int) -> None:
    """Set the sizes of a mixer to those of this process's heads, once."""
    if mixer.num_heads == mixer.options.num_heads:
        mixer.num_heads //= processes
        mixer.num_kv_heads //= processes


def _sum_output(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return tensor_model_parallel_all_reduce(output)
