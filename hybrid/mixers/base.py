"""The mixer contract, and what linear mixers share.

Shapes: B batch, T time, H heads, K key dim, V value dim, D model dim.

A mixer is one class in one file. It turns x (B, T, D) into y (B, T, D); tokens meet one another
nowhere else in the model. `Mixer` is the contract that the stack relies on. `LinearMixer` is the
shared body of every mixer that is a parameterisation of `hybrid_kernels.linear_attention`: it
projects x to (q, k, v, decay, beta), calls the op, and projects what comes back. A new mixer of that
kind overrides a hook or two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.config.parallel import Split
from hybrid.config.sizes import Sizes
from hybrid.nn.arguments import MIXER_ARGUMENTS, check_arguments
from hybrid.nn.norms import build_norm
from hybrid.nn.packing import WHOLE_ROWS, Segments
from hybrid.nn.past import Slot, StateSpec, TokenSpec
from hybrid_kernels import causal_conv1d, linear_attention, split


@dataclass(frozen=True)
class MixerOptions:
    """Base of every mixer's options dataclass."""

    def complete(self, hidden_size: int) -> MixerOptions:
        """These options with every default that depends on the model dim D filled in."""
        return self

    def scaled_from(self, base: Any) -> MixerOptions:
        """These options under muP, where `base` are those of the same mixer at the base width."""
        return self

    def problems(self, sizes: Sizes) -> list[str]:
        """What is wrong with the completed options, a line each ('num_heads: ...')."""
        return []


class Mixer(nn.Module, ABC):
    """One token mixer of one layer.

    Class attributes:
        name, symbol: set by `register_mixer`.
        Options: the options dataclass.
        layer_type: the mask it wants, by transformers' name: `full_attention` (keys and values are
            cached) or `linear_attention` (only states are).
        attends: "full" or "local" (a window, a chunk) if it weighs keys of earlier tokens by softmax, ""
            if what it knows of them is a state. `hybrid_eval` knocks out branches by it; None lets it
            go by `layer_type`.
        paper: where it comes from.
        formula: one line, in the notation S_t = G_t * S_{t-1} + v_t k_t^T.
        used_by: published models that have it.
        kind: mixers of one kind are counted together (`Sizes.kind_idx`): the name of the first
            registered class among the bases.
        shared_by_stack: names of parameters that are one for all layers of the mixer in a stack.
        continues_packed: whether it can go on from a cache with several documents in a row.
    """

    name: ClassVar[str]
    symbol: ClassVar[str | None]
    kind: ClassVar[str]
    Options: ClassVar[type[MixerOptions]] = MixerOptions
    layer_type: ClassVar[str] = "linear_attention"
    attends: ClassVar[str | None] = None
    paper: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    used_by: ClassVar[str] = ""
    shared_by_stack: ClassVar[tuple[str, ...]] = ()
    continues_packed: ClassVar[bool] = True

    def __init__(self, options: Any, sizes: Sizes, layer_idx: int) -> None:
        super().__init__()
        self.options = options
        self.sizes = sizes
        self.layer_idx = layer_idx

    @abstractmethod
    def forward(
        self,
        x: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        segments: Segments = WHOLE_ROWS,
        cache: Slot | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mix tokens.

        Args:
            x: (B, T, D).
            attention_mask: the mask of `layer_type` as transformers' mask functions make it.
            position_embeddings: (cos, sin) of the layer's rotary embedding, or None.
            segments: documents and padding, for mixers with a state.
            cache: the slot to continue from and to write to, or None.

        Returns:
            (y, weights): y (B, T, D); weights (B, H, T, T_total) where the mixer has them and the
            attention implementation returns them, else None.
        """

    def check_arguments(self, kwargs: dict[str, Any]) -> None:
        """Refuse keyword arguments of `forward` that no mixer takes."""
        known = MIXER_ARGUMENTS | {"attention_mask", "position_embeddings"}
        check_arguments(type(self).__name__, Mixer.forward, kwargs, known)

    @classmethod
    def uses_state(cls, options: Any) -> bool:
        """Whether the cache holds a recurrent or a convolution state for it."""
        return cls.layer_type == "linear_attention"

    @classmethod
    def fits_paged(cls, options: Any) -> bool:
        """Whether keys and values are all it remembers, and of one size, as paged caches want them."""
        return False

    @classmethod
    def tensor_splits(cls, options: Any) -> tuple[Split, ...]:
        """How tensor parallelism may split it; empty: each process has the whole mixer."""
        return ()

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Sets of options, small enough for D = 32, that the tests build this mixer with.

        Every test of an invariant runs on each of them, so list one for each branch of the code.
        """
        return [{"num_heads": 2}]

    @classmethod
    def rotary(cls, options: Any, sizes: Sizes) -> nn.Module | None:
        """The rotary embedding that this mixer wants for these options, shared per symbol."""
        return None

    def init_parameters(self, std: float) -> None:
        """Initialise parameters and buffers of this module itself; Linear ones are done already."""

    def mixing_flops(self, context: int) -> float:
        """Forward FLOPs per token of the mixing alone (no projections), mean over `context` tokens."""
        return 0.0

    def tokens(self) -> dict[str, TokenSpec]:
        """What `forward` appends to its slot for each token, by name."""
        return {}

    def states(self) -> dict[str, StateSpec]:
        """The states that `forward` keeps in its slot, by name."""
        return {}


def residual_projection(d_in: int, d_out: int, bias: bool = False) -> nn.Linear:
    """A Linear that writes into the residual stream; depth-scaled initialisation scales these."""
    linear = nn.Linear(d_in, d_out, bias=bias)
    linear.is_residual_projection = True  # type: ignore[assignment]
    return linear


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, x (B, T, D) -> (B, T, D), with state and boundaries.

    As before q, k, v in Mamba (arXiv 2312.00752) and DeltaNet (arXiv 2406.06484).
    """

    def __init__(
        self, channels: int, width: int, bias: bool = False, activation: str | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.activation = activation
        self.residual = False
        """Whether x is added to its convolution, before the activation: a canon layer."""

    def init_parameters(self, std: float) -> None:
        """Uniform with variance 1 / (3 W), torch's own default for a depthwise Conv1d; bias 0."""
        bound = self.weight.shape[1] ** -0.5
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Convolve packed x, continuing from and writing to the cache slot where there is one."""
        y, tail = causal_conv1d(
            x,
            self.weight.to(x.dtype),
            None if self.bias is None else self.bias.to(x.dtype),
            activation=None if self.residual else self.activation,
            initial_state=None if cache is None else cache.state("conv"),
            cu_seqlens=cu_seqlens,
            output_final_state=cache is not None,
        )
        if cache is not None and tail is not None:
            cache.set_state("conv", tail)
        if not self.residual:
            return y
        return F.silu(x + y) if self.activation == "silu" else x + y

    def split(
        self, parts: list[torch.Tensor], cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> tuple[torch.Tensor, ...]:
        """Convolve several tensors (B, T, ...) whose channels add up to D, in one call."""
        y = self(torch.cat(parts, dim=-1), cu_seqlens, cache)
        return split(y, [part.shape[-1] for part in parts])

    def states(self) -> dict[str, StateSpec]:
        """The last W - 1 inputs, (D, W - 1), under the name that `forward` has for them."""
        channels, width = self.weight.shape
        return {"conv": StateSpec((channels, width - 1))}


class StateMixer(Mixer):
    """A mixer whose memory of the past is a state: it sees documents one after the other.

    Subclasses give `mix`, which never meets padding: the real tokens come packed.
    """

    layer_type = "linear_attention"
    attends = ""

    def forward(
        self,
        x: torch.Tensor,
        *,
        segments: Segments = WHOLE_ROWS,
        cache: Slot | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """See `Mixer.forward`; the mask is not used, padding comes in `segments`."""
        self.check_arguments(kwargs)
        batch, time, _ = x.shape
        if cache is not None:
            cache.begin(x, segments, lambda again: self.mix(again, None, cache))
        y = self.mix(segments.pack(x), segments.cu_seqlens, cache)
        return segments.unpack(y, batch, time), None

    @abstractmethod
    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """x (B, T, D), or (1, tokens, D) with `cu_seqlens`, to y of the same shape."""


class LinearMixer(StateMixer):
    """A mixer that is a parameterisation of `linear_attention`.

    Subclasses set the sizes with `build`, and override `gates` (decay, beta) and `read` (what happens
    to the output) as their paper has it; where q, k, v and the gates depend on each other, `mix`.
    """

    scale: float = 1.0

    def build(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        conv_size: int | None,
        bias: bool = False,
        *,
        key_heads: int | None = None,
        conv_bias: bool = False,
        conv_activation: str | None = None,
    ) -> None:
        """Create the projections of q, k (H_k x K) and v (H x V), the convolution, and the output.

        Args:
            num_heads: H, heads of v and of the state.
            key_dim: K.
            value_dim: V.
            conv_size: W of a short convolution on q, k, v; None for none.
            bias: biases on the projections.
            key_heads: H_k, heads of q and k, each serving H / H_k heads; default H.
            conv_bias: a bias on the convolution.
            conv_activation: `silu` or None, after the convolution.
        """
        d_model = self.sizes.hidden_size
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.key_heads = num_heads if key_heads is None else key_heads
        inner_key, inner = self.key_heads * key_dim, num_heads * value_dim
        self.q_proj = nn.Linear(d_model, inner_key, bias=bias)
        self.k_proj = nn.Linear(d_model, inner_key, bias=bias)
        self.v_proj = nn.Linear(d_model, inner, bias=bias)
        self.o_proj = residual_projection(inner, d_model, bias=bias)
        self.conv = None
        if conv_size:
            self.conv = ShortConvolution(
                2 * inner_key + inner, conv_size, conv_bias, conv_activation
            )

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Project, run the recurrence, read."""
        q, k, v = self.project(x, cu_seqlens, cache)
        o = self.recur(q, k, v, cu_seqlens, cache, **self.gates(x))
        return self.o_proj(self.read(o, x))

    def recur(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        cache: Slot | None,
        carry: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **gates: Any,
    ) -> torch.Tensor:
        """The op, continuing from and writing to the cache slot where there is one: o (B, T, H, V).

        Values too wide for the op are cut into parts, each with a state of its own: the columns of a
        state do not meet. `carry` maps the final state (N, H, K, V) to what is stored.
        """
        parts = value_parts(v.shape[-1])
        before = None if cache is None else cache.state("recurrent")
        if parts > 1:
            v, gates = _split_values(v, gates, parts)
            before = None if before is None else _split_state(before, parts)
        o, state = linear_attention(
            q,
            k,
            v,
            **gates,
            scale=self.scale,
            initial_state=before,
            cu_seqlens=cu_seqlens,
            output_final_state=cache is not None,
            overwrite_state=before is not None and not torch.is_grad_enabled(),
        )
        if cache is not None and state is not None:
            state = state if parts == 1 else _join_state(state, parts)
            cache.set_state("recurrent", state if carry is None else carry(state))
        return o if parts == 1 else o.unflatten(2, (-1, parts)).flatten(-2)

    def project(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, T, D) -> q, k (B, T, H_k, K), v (B, T, H, V), convolved and through `features`."""
        q, k, v = self.read_in(x)
        if self.conv is not None:
            q, k, v = self.conv.split([q, k, v], cu_seqlens, cache)
        q, k = (y.unflatten(-1, (self.key_heads, -1)) for y in (q, k))
        return self.features(q, k, v.unflatten(-1, (self.num_heads, -1)))

    def read_in(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, T, D) -> q, k (B, T, H_k * K), v (B, T, H * V), as they enter the convolution."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def features(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Activations or normalisation of q, k, v; none by default."""
        return q, k, v

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """`log_decay` and `beta` of the op, from x (B, T, D); none by default."""
        return {}

    def read(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """o (B, T, H, V) -> (B, T, H * V), normalised and gated as the paper has it."""
        return o.flatten(-2)

    def mixing_flops(self, context: int) -> float:
        """Decay, write and read of a K x V state per head: 1 + 2 + 2 FLOPs an element."""
        return 5.0 * self.num_heads * self.key_dim * self.value_dim

    def states(self) -> dict[str, StateSpec]:
        """One K x V state per head, and W - 1 inputs of the convolution."""
        conv = self.conv.states() if self.conv is not None else {}
        shape = (self.num_heads, self.key_dim, self.value_dim)
        return {"recurrent": StateSpec(shape, torch.float32), **conv}


MAX_HEAD_DIM = 256


def value_parts(value_dim: int) -> int:
    """Parts that values are cut into, so that each is at most what the op takes."""
    return -(-value_dim // MAX_HEAD_DIM)


def _split_values(
    v: torch.Tensor, gates: dict[str, Any], parts: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """v (B, T, H, V) -> (B, T, H * parts, V / parts), and each head's gates for all of its parts."""
    heads_dim = {"log_decay": 2, "beta": 2, "write_scale": 2, "bonus": 0}
    split = dict(gates)
    for name, dim in heads_dim.items():
        gate = gates.get(name)
        if gate is not None:
            split[name] = gate.repeat_interleave(parts, dim=0 if gate.ndim == 1 else dim)
    if gates.get("value_log_decay") is not None:
        split["value_log_decay"] = gates["value_log_decay"].unflatten(-1, (parts, -1)).flatten(2, 3)
    return v.unflatten(-1, (parts, -1)).flatten(2, 3), split


def _split_state(state: torch.Tensor, parts: int) -> torch.Tensor:
    """(N, H, K, V) -> (N, H * parts, K, V / parts)."""
    return state.unflatten(-1, (parts, -1)).transpose(2, 3).flatten(1, 2)


def _join_state(state: torch.Tensor, parts: int) -> torch.Tensor:
    """The inverse of `_split_state`."""
    return state.unflatten(1, (-1, parts)).transpose(2, 3).flatten(-2)


class OutputNorm(nn.Module):
    """RMSNorm of o (B, T, H, V): over all heads together (`layer`) or over each (`head`).

    `layer` is MiniMax-01's, `head` the grouped norm of Ring-linear and RetNet.
    """

    def __init__(self, kind: str, num_heads: int, value_dim: int, eps: float) -> None:
        super().__init__()
        self.per_head = kind == "head"
        self.norm = build_norm(
            "rmsnorm", value_dim if self.per_head else num_heads * value_dim, eps
        )

    def forward(self, o: torch.Tensor) -> torch.Tensor:
        """(B, T, H, V) -> (B, T, H * V)."""
        return self.norm(o).flatten(-2) if self.per_head else self.norm(o.flatten(-2))


FEATURE_MAPS = {
    "identity": lambda x: x,
    "silu": F.silu,
    "relu": F.relu,
    "elu+1": lambda x: F.elu(x) + 1,
}


def head_problems(hidden_size: int, num_heads: int) -> list[str]:
    """A line for a D that the heads do not divide, where nothing else gives the size of a head."""
    if hidden_size % num_heads == 0:
        return []
    near = nearest_divisors(hidden_size, num_heads)
    return [
        f"num_heads: expected a divisor of hidden_size {hidden_size}, got {num_heads}; try {near}, or"
        " give head_dim"
    ]


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` on both sides of `wanted`, as text: '8 or 16'."""
    below = max((d for d in range(1, min(wanted, number) + 1) if number % d == 0), default=None)
    above = next((d for d in range(wanted + 1, number + 1) if number % d == 0), None)
    return " or ".join(str(d) for d in (below, above) if d is not None)
