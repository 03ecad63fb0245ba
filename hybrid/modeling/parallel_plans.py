"""Tensor and expert parallelism: transformers' plans, applied layer by layer, and checked.

transformers looks up a rule by a module's name with `*` for every number in it, so that a rule cannot
tell the layers of a mixed stack apart. While it distributes a model, the modules here have names whose
numbers it does not replace, and the plans name each of them.
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
"""Behind the number of a module while transformers distributes it: `layers.3_.mixer`."""

WHOLE = ("colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep", "replicate")
"""Styles after which a module has its whole input and output, so that any Linear may have them."""

SPLIT_DIMS = (
    frozenset({"colwise", "colwise_gather_output", "colwise_rep", "embedding_rowwise"}),
    frozenset({"rowwise", "rowwise_split_input", "rowwise_rep", "embedding_colwise"}),
)
"""Styles that split the first, and the second, dim of a matrix."""

SUMMED = "replicated_with_grad_allreduce"
"""The style of weights that are whole, and used for a part of the heads by each process."""

Plan = dict[str, str]


def is_split(distributed_config: Any) -> bool:
    """Whether a `DistributedConfig` asks for tensor or expert parallelism."""
    if distributed_config is None:
        return False
    return (distributed_config.tp_size or 1) > 1 or _expert_size(distributed_config) > 1


@contextlib.contextmanager
def applied_by_layer(model: Any, distributed_config: Any) -> Iterator[Any]:
    """Resolve the plans of a model, and name its modules so that transformers follows them.

    Args:
        model: a model on the meta device, before its weights are loaded.
        distributed_config: see `resolve_plans`.

    Yields:
        a copy of the config without plans: the model has them, rule by rule.

    Raises:
        ValueError: see `resolve_plans`.
    """
    tp_plan, ep_plan = resolve_plans(model, distributed_config)
    by_layer = copy.copy(distributed_config)
    by_layer.tp_plan = "auto"
    if _merges():
        by_layer.ep_plan = None
    if isinstance(getattr(by_layer, "fsdp_plan", None), dict):
        by_layer.fsdp_plan = _marked(_matched("fsdp_plan", by_layer.fsdp_plan, _names(model)))
    if not tp_plan and "replicate" in known_styles():
        # transformers 5.23 and 5.24 refuse the empty plan that their own `tp_plan={}` is
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
    """The tensor and the expert plan of a model, rule by rule: module or parameter -> style.

    Args:
        model: a stack, or a model with a stack.
        distributed_config: transformers' `DistributedConfig`; a plan that is a dictionary is merged
            with the model's own (before transformers 5.19: takes its place).

    Raises:
        ValueError: nothing can be split; sizes that the processes do not divide; rules that match
            nothing, or that split a mixer or a feed-forward in part.
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
    """What tensor parallelism splits where the experts are split by `ep_plan`."""
    if not ep_plan:
        raise ValueError(
            f"ep_plan: expected a layout with experts, got {layout!r}; try tp_plan='auto' without"
            " expert parallelism"
        )
    if not _merges():
        if isinstance(given, dict):
            raise ValueError(
                "tp_plan: expected no dictionary with enable_expert_parallel=True: transformers before"
                " 5.19 splits experts alone; leave tp_plan out, or try a later transformers"
            )
        return {}
    inside = tuple(f"{name}." for name in ep_plan)
    return {n: style for n, style in tp_plan.items() if not f"{n}.".startswith(inside)}


class Size(NamedTuple):
    """A size that processes have to divide; `layer_idx` is None where it is not of a layer."""

    key: str
    value: int
    layer_idx: int | None
    processes: int


def check_rules(key: str, plan: Plan, model: Any, processes: int) -> list[Size]:
    """Raise ValueError for a plan whose rules do not fit together; return the sizes that it splits.

    Args:
        key: `tp_plan` or `ep_plan`.
        plan: name of a module or parameter -> style, without `*`.
        model: a stack, or a model with a stack.
        processes: that share what is split.
    """
    config = model.config
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    splits = tensor_splits(config.stack) if key == "tp_plan" else expert_splits(config.stack)
    left = {name: style for name, style in plan.items() if style not in WHOLE}
    sizes: list[Size] = []
    for split in splits:
        rules = {prefix + name: style for name, style in split.rules.items()}
        found = {name: left.pop(name) for name in rules if name in left}
        if found and found != rules:
            raise ValueError(_in_part(key, split, found, rules))
        for option, value in split.sizes.items() if found else ():
            sizes.append(Size(f"{split.key}.{option}", value, split.layer_idx, processes))
    for name, style in left.items():
        if name.startswith(f"{prefix}layers."):
            raise ValueError(
                f"{key}.{name}: expected a style that leaves the input and output of the module whole"
                f" ({', '.join(WHOLE)}), got {style!r}: this part of the layer cannot be split; leave"
                " it out, and every process has it"
            )
    for name, source in model.all_tied_weights_keys.items():
        pair = [plan.get(n.rpartition(".")[0], plan.get(n)) for n in (name, source)]
        if [pair[0] in styles for styles in SPLIT_DIMS] != [
            pair[1] in styles for styles in SPLIT_DIMS
        ]:
            raise ValueError(
                f"{key}: {name} and {source} are one tensor: expected both split alike, got"
                f" {pair[0]!r} and {pair[1]!r}; give both a rule, or neither"
            )
    if "embedding_rowwise" in plan.values() and "embedding_colwise" not in known_styles():
        sizes.append(Size("vocab_size", config.vocab_size, None, processes))  # before 5.21
    return sizes


def check_sizes(sizes: list[Size]) -> None:
    """Raise ValueError, one line for all, where processes do not divide a size."""
    wrong: dict[str, list[str]] = {}
    for key, value, layer_idx, processes in sizes:
        if value % processes:
            what = f"{key}: expected a multiple of the {processes} processes, got {value}"
            wrong.setdefault(what, []).extend([] if layer_idx is None else [str(layer_idx)])
    if not wrong:
        return
    lines = [f"{what} (layer {', '.join(at)})" if at else what for what, at in wrong.items()]
    common = math.gcd(*(size.value for size in sizes))
    fit = [str(n) for n in range(2, common + 1) if common % n == 0]
    way_out = f"try {' or '.join(fit)} processes" if fit else "no number above 1 divides all sizes"
    raise ValueError("; ".join([*lines, way_out]))


def _in_part(key: str, split: PlacedSplit, found: Plan, rules: Plan) -> str:
    missing = ", ".join(f"{n}: {s}" for n, s in rules.items() if found.get(n) != s)
    return (
        f"{key}: expected all rules that split {split.key} of layer {split.layer_idx}, or none; add"
        f" {missing}, or try 'replicate' for {', '.join(found)}"
    )


class _SumInBackward(torch.autograd.Function):
    """The identity, whose gradient is the sum of those of all processes of a group."""

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

    transformers' style of this name sums what has accumulated: the gradients of earlier backward
    passes of an optimizer step would count once for each process.
    """
    forward = module.forward

    def summing(*args: Any, **kwargs: Any) -> Any:
        own = dict(module.named_parameters(recurse=False))
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in own.values())):
            return forward(*args, **kwargs)
        try:
            for name, parameter in own.items():
                # what is no nn.Parameter cannot be assigned as an attribute
                module._parameters[name] = _SumInBackward.apply(parameter, group)  # type: ignore[assignment]
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(own)

    module.forward = summing


def without_tied(model: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict less the parameters that are tied to another one in it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {
        name
        for name, source in model.all_tied_weights_keys.items()
        if source in state_dict and parameters.get(name) is parameters.get(source)
    }
    return {name: tensor for name, tensor in state_dict.items() if name not in tied}


def _merges() -> bool:
    """Whether this transformers merges a plan that is given with that of the model (5.19 on)."""
    return any(field.name == "ep_plan" for field in dataclasses.fields(DistributedConfig))


def _expert_size(distributed_config: Any) -> int:
    """Processes that have different experts; 1 without expert parallelism."""
    if _merges():
        return distributed_config.ep_size or 1
    return (distributed_config.tp_size or 1) if distributed_config.enable_expert_parallel else 1


def _names(model: nn.Module) -> list[str]:
    """Names that a rule may have, those of modules first."""
    modules = [name for name, _ in model.named_modules()]
    return modules + [name for name, _ in model.named_parameters(remove_duplicate=False)]


def _matched(key: str, plan: Mapping[str, str], names: Iterable[str]) -> Plan:
    """Rules by the names that they match; a rule that names a layer goes before one with `*`."""
    found, used = {}, set()
    for name in names:
        for rule in (name, replace_layer_number_by_wildcard(name)):
            if rule in plan:
                found.setdefault(name, plan[rule])
                used.add(rule)
    unused = [rule for rule in plan if rule not in used]
    if unused:
        known = {replace_layer_number_by_wildcard(name) for name in names if name}
        raise ValueError(f"{key}.{unused[0]}: matches no module; {did_you_mean(unused[0], known)}")
    return found


def _marked(plan: Plan) -> Plan:
    """The plan for a model whose modules have marked numbers."""
    pieces = {name: name.split(".") for name in plan}
    return {
        ".".join(f"{p}{MARK}" if p.isdigit() else p for p in pieces[name]): style
        for name, style in plan.items()
    }


def _general(plan: Plan) -> Plan:
    """The plan with `*` for numbers, which transformers' report on loading compares."""
    return {replace_layer_number_by_wildcard(name): style for name, style in plan.items()}


@contextlib.contextmanager
def _numbers_marked(model: nn.Module) -> Iterator[None]:
    """Rename the modules of lists: `3` is `3_` inside the block."""
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
