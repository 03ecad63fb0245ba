"""The cost of a config: parameters, FLOPs per token, cache bytes.

The model is built on the meta device, so parameters are counted and not estimated. Each mixer
declares the FLOPs of its mixing, the growth of its cache per token, and the size of its state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybrid.checkpoint_paths import refuse_unfinished
from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.options import ConfigError, did_you_mean
from hybrid.ffn import FeedForward
from hybrid.ffn.moe_options import MoEOptions
from hybrid.files import read_json
from hybrid.mixers import Mixer, ShortConvolution
from hybrid.modeling.canon import Canon
from hybrid.modeling.model import HybridForCausalLM
from hybrid.modeling.stack import HybridModel
from hybrid.nn.past import StateSpec, TokenSpec


@dataclass(frozen=True)
class ExpertPlan:
    """Numbers of a mixture of experts.

    Attributes:
        layers: number of layers with it.
        routed, shared, top_k: number of routed experts, of shared experts, and of routed experts
            per token.
        activation_ratio: experts per token divided by all experts, shared ones included in both.
        sparsity: the inverse of the activation ratio.
        granularity: G = 2 d_model / d_expert.
    """

    layers: int
    routed: int
    shared: int
    top_k: int
    activation_ratio: float
    sparsity: float
    granularity: float


@dataclass(frozen=True)
class Plan:
    """The cost of one model at one context length; FLOPs are forward only, a multiply-add is two.

    Attributes:
        parameters: all of them, tied ones once.
        active_parameters: those that one token uses at inference.
        mtp_parameters: of the multi-token prediction modules, which ``parameters`` includes.
        embedding_parameters: of the embedding and an untied head.
        context: N, in tokens.
        dtype: of keys and values, and of the tails of convolutions; states are float32.
        flops_per_token: forward, mean over a sequence of N tokens, the head included; without
            multi-token prediction.
        mtp_flops_per_token: of its modules, the head for each included.
        kv_bytes_per_token: what the cache grows by per token and sequence.
        state_bytes: what the cache holds whatever the length, per sequence.
        experts: of each feed-forward symbol that stands for a mixture of experts.
    """

    parameters: int
    active_parameters: int
    mtp_parameters: int
    embedding_parameters: int
    context: int
    dtype: str
    flops_per_token: float
    mtp_flops_per_token: float
    kv_bytes_per_token: int
    state_bytes: int
    experts: dict[str, ExpertPlan]

    @property
    def cache_bytes(self) -> int:
        """Cache bytes of one sequence of N tokens."""
        return self.kv_bytes_per_token * self.context + self.state_bytes

    @property
    def training_flops_per_token(self) -> float:
        """Forward and backward: three times the forward, with multi-token prediction."""
        return 3 * (self.flops_per_token + self.mtp_flops_per_token)


def plan(config: HybridConfig, context: int = 8192, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """Count the cost of ``config`` at ``context`` tokens, with weights and keys in ``dtype``.

    Raises:
        ValueError: a context below 1, or above ``max_position_embeddings``.
    """
    limit = config.max_position_embeddings
    if context < 1 or (limit is not None and context > limit):
        most = f" to max_position_embeddings {limit}" if limit is not None else ""
        raise ValueError(f"context: must be from 1{most} tokens, found {context}")
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    model.tie_weights()
    mixers = _mixers(model.model)
    parts = [*mixers, *(m for m in model.model.modules() if isinstance(m, Canon))]
    tokens = [spec for mixer in mixers for spec in mixer.tokens().values()]
    states = [spec for part in parts for spec in part.states().values()]
    ahead = 0 if model.mtp is None else count(model.mtp)
    head_flops = 2.0 * model.lm_head.weight.numel()
    return Plan(
        parameters=count(model),
        active_parameters=count(model) - ahead - _idle(model.model),
        mtp_parameters=ahead,
        embedding_parameters=_embedding(model),
        context=context,
        dtype=str(dtype).removeprefix("torch."),
        flops_per_token=_stack_flops(model.model, context) + head_flops,
        mtp_flops_per_token=sum(
            2.0 * depth.projection.weight.numel() + _stack_flops(depth.stack, context) + head_flops
            for depth in (() if model.mtp is None else model.mtp.depths)
        ),
        kv_bytes_per_token=sum(t.elements * _bytes(t, dtype) for t in tokens if t.window is None),
        state_bytes=sum(s.elements * _bytes(s, dtype) for s in states)
        + sum(
            t.elements * (t.window - 1) * _bytes(t, dtype) for t in tokens if t.window is not None
        ),
        experts=expert_plans(config),
    )


def mixer_cache_bytes(mixer: Mixer, context: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the cache bytes of one mixer for one sequence of ``context`` tokens."""
    kept = sum(
        t.elements * (context if t.window is None else t.window - 1) * _bytes(t, dtype)
        for t in mixer.tokens().values()
    )
    return kept + sum(s.elements * _bytes(s, dtype) for s in mixer.states().values())


def _bytes(spec: StateSpec | TokenSpec, dtype: torch.dtype) -> int:
    """Of one element."""
    return (spec.dtype or dtype).itemsize


def expert_plans(config: HybridConfig) -> dict[str, ExpertPlan]:
    """Symbol -> its experts, for the feed-forwards of the stack that have any."""
    used = Counter(layer.ffn.symbol for layer in config.stack if layer.ffn is not None)
    found = {}
    for symbol, layers in used.items():
        options = config.stack.feed_forwards[symbol].options
        if isinstance(options, MoEOptions):
            found[symbol] = ExpertPlan(
                layers=layers,
                routed=options.num_experts,
                shared=options.num_shared_experts,
                top_k=options.top_k,
                activation_ratio=options.activation_ratio,
                sparsity=options.sparsity,
                granularity=options.granularity(config.hidden_size),
            )
    return found


def count(module: nn.Module) -> int:
    """Parameters of a module, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def _idle(stack: nn.Module) -> int:
    """Parameters that one token does not use; layers that share weights are one."""
    parts = {id(next(m.parameters())): m for m in stack.modules() if isinstance(m, FeedForward)}
    return round(sum(count(m) * (1 - m.active_share()) for m in parts.values()))


def _embedding(model: HybridForCausalLM) -> int:
    embedding = model.get_input_embeddings().weight.numel()
    return embedding if model.config.tie_word_embeddings else 2 * embedding


def _stack_flops(stack: HybridModel, context: int) -> float:
    """Two per weight and token in every projection and short convolution, and what mixers declare.

    Weights that layers share count at each depth.
    """
    total = 0.0
    for layer in stack.layers:
        within = set(layer.ffn.modules()) if layer.ffn is not None else set()
        for module in layer.modules():
            if module not in within and isinstance(module, (nn.Linear, ShortConvolution)):
                total += 2.0 * module.weight.numel()
        if layer.ffn is not None:  # all of its matrices are projections, stacked ones too
            weights = sum(
                p.numel() for m in within for p in m.parameters(recurse=False) if p.ndim > 1
            )
            total += 2.0 * layer.ffn.active_share() * weights
    return total + sum(m.mixing_flops(context) for m in _mixers(stack))


def _mixers(stack: nn.Module) -> list[Mixer]:
    return [m for m in stack.modules() if isinstance(m, Mixer)]


def load_model_config(
    path: str,
    overrides: Sequence[str] = (),
    seen: tuple[Path, ...] = (),
    check: Callable[[Mapping[str, Any], str], None] | None = None,
) -> HybridConfig:
    """The model of a training YAML, of a YAML with the model's own keys, or of a checkpoint.

    A checkpoint may be ours or of a published family.

    Args:
        path: a YAML file, a folder with a config.json, or a config.json.
        overrides: ``key=value``, for YAML files and for checkpoints of hybrids.
        seen: files whose ``model.path`` led here.
        check: is given the keys of a YAML file with a model among others, and the path.

    Raises:
        ValueError: no such file, or a config with mistakes; each is named.
    """
    from hybrid.config import yaml

    if Path(path).is_dir() or path.endswith(".json"):
        file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            refuse_unfinished(file.parent)
            raise ConfigError([f"expected a config, got none at {file}; try a YAML file"], path)
        values = read_json(file, unique=True)
        if values.get("model_type") == HybridConfig.model_type:
            return HybridConfig(**yaml.apply_overrides(values, overrides))
        if overrides:
            raise ConfigError(
                [
                    f"{overrides[0]}: expected no key=value with a published config, got one; try"
                    " `hybrid import` with --layout, then the folder that it writes"
                ],
                path,
            )
        from hybrid.convert.configs import read_published, to_ours

        return to_ours(*read_published(values, file))
    values = yaml.apply_overrides(yaml.read(path), overrides)
    if not isinstance(values.get("model"), dict):
        return HybridConfig(**values)
    if check is not None:
        check(values, path)
    model = dict(values["model"])
    if "path" in model:
        here = Path(path).resolve()
        if here in seen:
            raise ConfigError([f"model.path: {path} leads back to itself"], path)
        return load_model_config(str(model["path"]), (), (*seen, here))
    if "vocab_size" not in model:
        from hybrid.tokenizer import load_tokenizer

        model["vocab_size"] = len(load_tokenizer(values.get("tokenizer", "bytes")))
    return HybridConfig(**model)


def parse_tokens(text: str, name: str = "context") -> int:
    """'8192', '8k' (8192), '1m' -> tokens; a ValueError that names ``name`` for anything else."""
    scale = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    digits = text[:-1] if scale > 1 else text
    if not digits.isdigit():
        raise ValueError(f"{name}: {text!r} is no number of tokens; write 8192, 8k or 1m")
    return int(digits) * scale


def parse_dtype(name: str) -> torch.dtype:
    """'bfloat16' -> torch.bfloat16. Raises ValueError with the nearest right name."""
    known = ("float32", "bfloat16", "float16", "float64")
    if name not in known:
        raise ValueError(f"dtype: unknown {name!r}, {did_you_mean(name, known)}")
    return getattr(torch, name)


def print_plan(cost: Plan, config: HybridConfig) -> None:
    """Print a plan as a table."""
    from rich.table import Table

    from hybrid.layout import parse
    from hybrid.terminal import console

    title = f"{parse(config.layout)}: {len(config.layers)} layers"
    table = Table("", "", title=title, show_header=False)
    share = cost.embedding_parameters / cost.parameters
    rows = [
        ("parameters", f"{cost.parameters:,}"),
        *(
            [("without multi-token prediction", f"{cost.parameters - cost.mtp_parameters:,}")]
            if cost.mtp_parameters
            else []
        ),
        ("active per token", f"{cost.active_parameters:,}"),
        ("of these, embedding", f"{cost.embedding_parameters:,} ({share:.1%})"),
        (f"forward FLOPs per token at {cost.context:,}", f"{cost.flops_per_token:,.0f}"),
        ("training FLOPs per token", f"{cost.training_flops_per_token:,.0f}"),
        ("cache bytes per token", f"{cost.kv_bytes_per_token:,}"),
        ("cache bytes whatever the length", f"{cost.state_bytes:,}"),
        ("keys and values in", cost.dtype),
        (f"cache at {cost.context:,} tokens", f"{human_bytes(cost.cache_bytes)} a sequence"),
    ]
    for symbol, experts in cost.experts.items():
        shared = f"+{experts.shared}" if experts.shared else ""
        active = f"{experts.top_k}{shared} of {experts.routed}{shared}"
        rows += [
            (f"{symbol}: experts of a token", f"{active}, in {experts.layers} layers"),
            (f"{symbol}: activation ratio", f"{experts.activation_ratio:.3%}"),
            (f"{symbol}: sparsity", f"{experts.sparsity:.3g}"),
            (f"{symbol}: granularity", f"{experts.granularity:.3g}"),
        ]
    for name, value in rows:
        table.add_row(name, value)
    console().print(table)


def human_bytes(number: int) -> str:
    """4294967296 -> '4 GiB'."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.4g} {unit}"
        value /= 1024
    raise AssertionError
