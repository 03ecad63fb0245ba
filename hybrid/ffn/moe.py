"""Mixture of experts: each token passes k of E feed-forwards, and the shared ones.

Shapes: B batch, T time, N tokens, D model dim, E experts, k experts per token, I width of an
expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from hybrid.config.parallel import Split
from hybrid.config.registry import register_feed_forward
from hybrid.config.sizes import Sizes
from hybrid.ffn.base import FeedForward
from hybrid.ffn.dense import ACTIVATIONS, Dense
from hybrid.ffn.moe_options import MoEOptions
from hybrid.ffn.router import build_router


class Experts(nn.Module):
    """E feed-forwards as stacked matrices, in the format of transformers' experts backends.

    ``config._experts_implementation`` selects the backend: ``grouped_mm`` (the default),
    ``batched_mm``, ``eager``, or any other backend of transformers. ``forward`` is ``eager``.
    torch's grouped product does not support float64, for which ``batched_mm`` replaces
    ``grouped_mm``.
    """

    gated: bool
    has_bias: bool
    down_proj: torch.Tensor
    config: PreTrainedConfig
    """Config of the model, which names the backend."""

    def __init__(self, sizes: Sizes, options: MoEOptions) -> None:
        super().__init__()
        self.sizes = sizes
        inner = options.intermediate_size
        assert inner is not None
        self.options = options
        self.num_experts = options.num_experts
        # names that the backends read
        self.hidden_dim, self.intermediate_dim = options.latent_size or sizes.hidden_size, inner
        self.first = "gate_up_proj" if self.gated else "up_proj"
        self._add(self.first, 2 * inner if self.gated else inner, self.hidden_dim)
        self._add("down_proj", self.hidden_dim, inner)
        self.act_fn = ACT2FN[ACTIVATIONS[options.dense_activation][1]]

    def _add(self, name: str, size_out: int, size_in: int) -> None:
        weight = torch.empty(self.num_experts, size_out, size_in)
        self.register_parameter(name, nn.Parameter(weight))
        bias = torch.empty(self.num_experts, size_out) if self.options.bias else None
        self.register_parameter(f"{name}_bias", None if bias is None else nn.Parameter(bias))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Map tokens (N, D), with experts (N, k) and weights (N, k), to (N, D), expert by expert."""
        y = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue  # an expert of another process, with expert parallelism
            tokens, slots = (top_k_index == expert).nonzero(as_tuple=True)
            h = self._project(self.first, hidden_states[tokens], expert)
            h = self._apply_gate(h) if self.gated else self.act_fn(h)
            h = self._project("down_proj", h, expert)
            y.index_add_(0, tokens, (h * top_k_weights[tokens, slots, None]).to(y.dtype))
        return y

    def _project(self, name: str, x: torch.Tensor, expert: int) -> torch.Tensor:
        bias = getattr(self, f"{name}_bias")
        return F.linear(x, getattr(self, name)[expert], None if bias is None else bias[expert])

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Apply the gate between the projections of gated experts: (..., 2 I) -> (..., I)."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.options.activation != "clamped_swiglu":
            return self.act_fn(gate) * up
        limit = self.options.swiglu_limit
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return (up + 1) * gate * torch.sigmoid(self.options.swiglu_alpha * gate)

    def no_weight_decay(self) -> list[str]:
        """Return the names of the stacked biases, which have the shape of matrices."""
        return [name for name, _ in self.named_parameters() if name.endswith("_bias")]

    def init_parameters(self, std: float) -> None:
        """Initialise each expert like a ``dense`` feed-forward of its size."""
        sizes = self.sizes
        std_in = std_out = std
        if sizes.init in ("xavier", "deepnorm"):
            gain = sizes.deepnorm_beta if sizes.init == "deepnorm" else 1.0
            std_in = std_out = gain * (2 / (self.hidden_dim + self.intermediate_dim)) ** 0.5
        elif sizes.init == "depth_scaled" and self.options.latent_size is None:
            std_out = std / max(1, sizes.num_residual_branches) ** 0.5
        for name in self.no_weight_decay():
            init.zeros_(getattr(self, name))
        init.normal_(getattr(self, self.first), mean=0.0, std=std_in)
        init.normal_(self.down_proj, mean=0.0, std=std_out)


class ExpertsBackends:
    """transformers' experts backends by name, with support for float64 and expert parallelism.

    With expert parallelism, this process has ``module.num_experts`` experts. The choice of any
    other expert has this number as its index, and the weight 0.
    """

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """Return the backend of this name; ``default`` is the function of ``eager``."""
        named = ALL_EXPERTS_FUNCTIONS.get_interface(name, default)

        def run(module: Any, x: torch.Tensor, indices: Any, weights: Any, **kwargs: Any) -> Any:
            function = named
            if name == "grouped_mm" and x.dtype == torch.float64:
                function = ALL_EXPERTS_FUNCTIONS["batched_mm"]
            if module.num_experts != module.options.num_experts:
                # in transformers 5.17 the router would get the gradient of another expert's output
                weights = weights.masked_fill(indices >= module.num_experts, 0)
            return function(module, x, indices, weights, **kwargs)

        return run


EXPERTS_BACKENDS: Any = ExpertsBackends()


@use_experts_implementation(experts_interface=EXPERTS_BACKENDS)
class GatedExperts(Experts):
    """Gated experts, W_down(act(W_gate x) * W_up x); ``gate_up_proj`` (E, 2 I, D), gate first."""

    gated = True


@use_experts_implementation(experts_interface=EXPERTS_BACKENDS, has_gate=False)
class PlainExperts(Experts):
    """Experts without a gate, W_down act(W_up x); ``up_proj`` (E, I, D)."""

    gated = False


@register_feed_forward("mixture_of_experts", symbol="E")
class MixtureOfExperts(FeedForward):
    """Mixture of experts, sum_{i in top k} w_i FFN_i(x) + FFN_shared(x) (arXiv 1701.06538).

    The model calls ``hybrid.ffn.balance`` to balance the load.
    """

    Options = MoEOptions
    residual_projections = ("latent_out",)
    paper = "arXiv 1701.06538"
    formula = "sum_{i in top k} w_i FFN_i(x) + FFN_shared(x)"

    def __init__(self, options: MoEOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        gated, _ = ACTIVATIONS[options.dense_activation]
        self.router = build_router(options, sizes.hidden_size)
        self.experts = (GatedExperts if gated else PlainExperts)(sizes, options)
        # the decorator sets this per class, but here it depends on the options
        vars(self.experts)["has_bias"] = options.bias
        self.latent_in = self.latent_out = None
        if options.latent_size is not None:
            self.latent_in = nn.Linear(sizes.hidden_size, options.latent_size, bias=False)
            self.latent_out = nn.Linear(options.latent_size, sizes.hidden_size, bias=False)
        self.shared_experts = self._build_shared()
        self.shared_gate = (
            nn.Linear(sizes.hidden_size, 1, bias=False) if options.shared_gate else None
        )

    def _build_shared(self) -> FeedForward | None:
        if not self.options.num_shared_experts:
            return None
        return Dense(self.options.shared_options, self.sizes, self.layer_idx)

    @classmethod
    def tensor_splits(cls, options: Any) -> tuple[Split, ...]:
        """Return splits by channels of the inner width; routed experts with biases are not split."""
        splits = []
        if not options.bias:
            gated, _ = ACTIVATIONS[options.dense_activation]
            first = ("gate_up_proj", "packed_colwise") if gated else ("up_proj", "colwise")
            rules = dict([first]) | {"down_proj": "rowwise", "": "moe_tp_experts"}
            named = {f"experts.{name}".rstrip("."): style for name, style in rules.items()}
            splits.append(Split(named, {"intermediate_size": options.intermediate_size}))
        if options.num_shared_experts:
            (shared,) = Dense.tensor_splits(options.shared_options)
            named = {f"shared_experts.{name}": style for name, style in shared.rules.items()}
            width = options.shared_options.width
            splits.append(Split(named, {"num_shared_experts * shared_intermediate_size": width}))
        return tuple(splits)

    @classmethod
    def expert_splits(cls, options: Any) -> tuple[Split, ...]:
        """Return a split by routed experts; every process has the router and the shared experts."""
        gated, _ = ACTIVATIONS[options.dense_activation]
        names = ["gate_up_proj" if gated else "up_proj", "down_proj"]
        names += [f"{name}_bias" for name in names] if options.bias else []
        rules = {f"experts.{name}": "grouped_gemm" for name in names}
        rules["experts"] = "ep_dispatch_experts"
        return (Split(rules, {"num_experts": options.num_experts}),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        flat = x.reshape(-1, x.shape[-1])
        _, weights, indices = self.router(flat)
        if self.latent_in is not None:
            flat = self.latent_in(flat)
        y = self.experts(flat, indices, weights)
        if self.latent_out is not None:
            y = self.latent_out(y)
        y = y.view_as(x)
        if self.shared_experts is None:
            return y
        shared = self.shared_experts(x)
        if self.shared_gate is not None:
            shared = self.shared_gate(x).sigmoid() * shared
        return y + shared

    def active_share(self) -> float:
        """Return the share of parameters that one token uses: k of E experts, and all others."""
        total = sum(p.numel() for p in self.parameters())
        routed = sum(p.numel() for p in self.experts.parameters())
        idle = routed // self.options.num_experts * (self.options.num_experts - self.options.top_k)
        return (total - idle) / total
