"""Tensor and expert parallelism: transformers' plans, applied layer by layer, with checks.

transformers looks up a rule by a module's name with ``*`` in place of every number, so that a rule
cannot distinguish the layers of a mixed stack. While transformers distributes a model, its modules
therefore have names whose numbers are not replaced, and the plans list every module.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

from hybrid.config.options import did_you_mean
from hybrid.config.parallel import PlacedSplit, expert_splits, known_styles, tensor_splits

MARK = "_"
"""Suffix of a module's number while transformers distributes the model: ``layers.3_.mixer``."""

WHOLE = ("colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep", "replicate")
"""Styles that keep the input and output of a module whole; any Linear may have them."""

SPLIT_DIMS = (
    frozenset({"colwise", "colwise_gather_output", "colwise_rep", "embedding_rowwise"}),
    frozenset({"rowwise", "rowwise_split_input", "rowwise_rep", "embedding_colwise"}),
)
"""Styles that split the first dim of a matrix, and styles that split the second."""

SUMMED = "replicated_with_grad_allreduce"
"""Style of whole weights that each process uses for its part of the heads."""

Plan = dict[str, str]


def is_split(distributed_config: Any) -> bool:
    """Return whether a ``DistributedConfig`` enables tensor or expert parallelism."""
    if distributed_config is None:
        return False
    return (distributed_config.tp_size or 1) > 1 or _expert_size(distributed_config) > 1


@contextlib.contextmanager
def applied_by_layer(model: Any, distributed_config: Any) -> Iterator[Any]:
    """Resolve the plans of a model, and rename its modules so that transformers applies them.

    Args:
        model: model on the meta device, before its weights are loaded.
        distributed_config: see ``resolve_plans``.

    Yields:
        A copy of the config without plans. The resolved plans are on the model.

    Raises:
        ValueError: see ``resolve_plans``.
    """
    tp_plan, ep_plan = resolve_plans(model, distributed_config)
    by_layer = copy.copy(distributed_config)
    by_layer.tp_plan = "auto"
    if _merges():
        by_layer.ep_plan = None
    if isinstance(getattr(by_layer, "fsdp_plan", None), dict):
        by_layer.fsdp_plan = _marked(_matched("fsdp_plan", by_layer.fsdp_plan, _names(model)))
    if not tp_plan and "replicate" in known_styles():
        # transformers 5.23 and 5.24 reject an empty plan, although `tp_plan={}` creates one
        tp_plan = {name: "replicate" for name in _names(model) if name.endswith("embed_tokens")}
    summed = [name for name, style in tp_plan.items() if style == SUMMED]
    model._tp_plan = _marked({name: tp_plan[name] for name in tp_plan if name not in summed})
    model._ep_plan = _marked(ep_plan)
    with _numbers_marked(model):
        yield by_layer
    mesh = model._device_mesh
    for name in summed:
        sum_gradients(model.get_submodule(name), mesh.get_group("tp" if mesh.ndim > 1 else None))
    model._tp_plan, model._ep_plan = _general(tp_plan), _general(ep_plan)


def resolve_plans(model: Any, distributed_config: Any) -> tuple[Plan, Plan]:
    """Return the tensor plan and the expert plan of a model: module or parameter name -> style.

    Args:
        model: stack, or model with a stack.
        distributed_config: transformers' ``DistributedConfig``. A plan that is a dictionary is merged
            with the model's own plan (before transformers 5.19: replaces it).

    Raises:
        ValueError: nothing can be split; the number of processes does not divide a size; rules match
            nothing, or split only a part of a mixer or feed-forward.
    """
    names, given = _names(model), distributed_config.tp_plan
    own = model._tp_plan or {}
    experts = _expert_size(distributed_config)
    if not own and experts == 1 and not isinstance(given, dict):
        raise ValueError(
            f"tp_plan: layout {model.config.layout!r} has nothing to split: expected softmax attention"
            " with independent heads, dense feed-forwards, or experts; try data parallelism"
        )
    if isinstance(given, dict):
        own = {**own, **given} if given and _merges() else given
    tp_plan, ep_plan = _matched("tp_plan", own, names), {}
    if experts > 1:
        override = getattr(distributed_config, "ep_plan", None) or {}
        ep_plan = _matched("ep_plan", {**(model._ep_plan or {}), **override}, names)
        tp_plan = _beside_experts(tp_plan, ep_plan, model.config.layout, given)
    sizes = check_rules("tp_plan", tp_plan, model, distributed_config.tp_size or 1)
    check_sizes(sizes + check_rules("ep_plan", ep_plan, model, experts))
    return tp_plan, ep_plan


def _beside_experts(tp_plan: Plan, ep_plan: Plan, layout: str, given: Any) -> Plan:
    """Return the tensor plan without the modules that ``ep_plan`` splits."""
    if not ep_plan:
        raise ValueError(
            f"ep_plan: expected a layout with experts, got {layout!r}; try tp_plan='auto' without"
            " expert parallelism"
        )
    if not _merges():
        if isinstance(given, dict):
            raise ValueError(
                "tp_plan: expected no dictionary with enable_expert_parallel=True, as transformers"
                " before 5.19 splits only experts, got one; try without tp_plan, or a later transformers"
            )
        return {}
    inside = tuple(f"{name}." for name in ep_plan)
    return {n: style for n, style in tp_plan.items() if not f"{n}.".startswith(inside)}


class Size(NamedTuple):
    """Size that the number of processes must divide; ``layer_idx`` is None if it is not of a layer."""

    key: str
    value: int
    layer_idx: int | None
    processes: int


def check_rules(key: str, plan: Plan, model: Any, processes: int) -> list[Size]:
    """Raise ValueError for a plan with inconsistent rules; return the sizes that it splits.

    Args:
        key: ``tp_plan`` or ``ep_plan``.
        plan: name of a module or parameter -> style, without ``*``.
        model: stack, or model with a stack.
        processes: number of processes that share the split tensors.
    """
    config = model.config
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    splits = tensor_splits(config.stack) if key == "tp_plan" else expert_splits(config.stack)
    left = {name: style for name, style in plan.items() if style not in WHOLE}
    sizes: list[Size] = []
    for split in splits:
        rules = {prefix + name: style for name, style in split.rules.items()}
        applied = {name: left.pop(name) for name in rules if name in left}
        if applied and applied != rules:
            raise ValueError(_in_part(key, split, applied, rules))
        for option, value in split.sizes.items() if applied else ():
            sizes.append(Size(f"{split.key}.{option}", value, split.layer_idx, processes))
    for name, style in left.items():
        if name.startswith(f"{prefix}layers."):
            raise ValueError(
                f"{key}.{name}: expected a style that leaves the input and output of the module whole"
                f" ({', '.join(WHOLE)}), as this part of the layer cannot be split, got {style!r}; try"
                " without this rule, so that every process has all of it"
            )
    for name, source in model.all_tied_weights_keys.items():
        pair = [plan.get(n.rpartition(".")[0], plan.get(n)) for n in (name, source)]
        if [pair[0] in styles for styles in SPLIT_DIMS] != [
            pair[1] in styles for styles in SPLIT_DIMS
        ]:
            raise ValueError(
                f"{key}: {name} and {source} are one tensor: expected both split alike, got"
                f" {pair[0]!r} and {pair[1]!r}; try a rule for both, or for neither"
            )
    if "embedding_rowwise" in plan.values() and "embedding_colwise" not in known_styles():
        sizes.append(Size("vocab_size", config.vocab_size, None, processes))  # before 5.21
    return sizes


def check_sizes(sizes: list[Size]) -> None:
    """Raise one ValueError for all sizes that the number of processes does not divide."""
    wrong: dict[str, list[str]] = {}
    for key, value, layer_idx, processes in sizes:
        if value % processes:
            message = f"{key}: expected a multiple of the {processes} processes, got {value}"
            wrong.setdefault(message, []).extend([] if layer_idx is None else [str(layer_idx)])
    if not wrong:
        return
    lines = [f"{text} (layer {', '.join(at)})" if at else text for text, at in wrong.items()]
    common = math.gcd(*(size.value for size in sizes))
    fit = [str(n) for n in range(2, common + 1) if common % n == 0]
    advice = f"try {' or '.join(fit)} processes" if fit else "no number above 1 divides all sizes"
    raise ValueError("; ".join([*lines, advice]))


def _in_part(key: str, split: PlacedSplit, applied: Plan, rules: Plan) -> str:
    missing = ", ".join(f"{n}: {s}" for n, s in rules.items() if applied.get(n) != s)
    return (
        f"{key}: expected all rules that split {split.key} of layer {split.layer_idx}, or none; add"
        f" {missing}, or try 'replicate' for {', '.join(applied)}"
    )


class _SumInBackward(torch.autograd.Function):
    """Identity whose gradient is summed over all processes of a group."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_gradients(module: nn.Module, group: Any) -> None:
    """Sum the gradients of a module's own parameters over processes, in each backward pass.

    transformers' style of this name sums accumulated gradients. Those of earlier backward passes of an
    optimizer step would then count once per process.
    """
    forward = module.forward

    def summing(*args: Any, **kwargs: Any) -> Any:
        own = dict(module.named_parameters(recurse=False))
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in own.values())):
            return forward(*args, **kwargs)
        try:
            for name, parameter in own.items():
                # a tensor that is not an nn.Parameter cannot be assigned as an attribute
                module._parameters[name] = _SumInBackward.apply(parameter, group)  # type: ignore[assignment]
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(own)

    module.forward = summing


def without_tied(model: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict without the parameters that are tied to another one in it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {
        name
        for name, source in model.all_tied_weights_keys.items()
        if source in state_dict and parameters.get(name) is parameters.get(source)
    }
    return {name: tensor for name, tensor in state_dict.items() if name not in tied}


def _merges() -> bool:
    """Return whether this version of transformers merges a user's plan with the model's (from 5.19)."""
    return any(field.name == "ep_plan" for field in dataclasses.fields(DistributedConfig))


def _expert_size(distributed_config: Any) -> int:
    """Return the number of processes with different experts; 1 without expert parallelism."""
    if _merges():
        return distributed_config.ep_size or 1
    return (distributed_config.tp_size or 1) if distributed_config.enable_expert_parallel else 1


def _names(model: nn.Module) -> list[str]:
    """Return the names that a rule may have, those of modules first."""
    modules = [name for name, _ in model.named_modules()]
    return modules + [name for name, _ in model.named_parameters(remove_duplicate=False)]


def _matched(key: str, plan: Mapping[str, str], names: Iterable[str]) -> Plan:
    """Return the style of each matched name; a rule for one layer takes precedence over ``*``."""
    matched, used = {}, set()
    for name in names:
        for rule in (name, replace_layer_number_by_wildcard(name)):
            if rule in plan:
                matched.setdefault(name, plan[rule])
                used.add(rule)
    unused = [rule for rule in plan if rule not in used]
    if unused:
        known = {replace_layer_number_by_wildcard(name) for name in names if name}
        raise ValueError(f"{key}.{unused[0]}: matches no module; {did_you_mean(unused[0], known)}")
    return matched


def _marked(plan: Plan) -> Plan:
    """Return the plan for a model whose modules have marked numbers."""
    pieces = {name: name.split(".") for name in plan}
    return {
        ".".join(f"{p}{MARK}" if p.isdigit() else p for p in pieces[name]): style
        for name, style in plan.items()
    }


def _general(plan: Plan) -> Plan:
    """Return the plan with ``*`` for numbers, which transformers compares in its loading report."""
    return {replace_layer_number_by_wildcard(name): style for name, style in plan.items()}


@contextlib.contextmanager
def _numbers_marked(model: nn.Module) -> Iterator[None]:
    """Rename the modules of lists inside the block: ``3`` becomes ``3_``."""
    lists = [m for m in model.modules() if any(name.isdigit() for name in m._modules)]
    for module in lists:
        items = module._modules.items()
        module._modules = {f"{n}{MARK}" if n.isdigit() else n: child for n, child in items}
    try:
        yield
    finally:
        for module in lists:
            items = module._modules.items()
            module._modules = {n.removesuffix(MARK): child for n, child in items}
