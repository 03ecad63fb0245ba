"""Base classes of token mixers.

Shapes: B batch, T time, H heads, K key dim, V value dim, D model dim.

A mixer is one class in one file. It maps x (B, T, D) to y (B, T, D). Only mixers exchange information
between tokens. ``Mixer`` is the interface that the model relies on. ``LinearMixer`` is the base class
of all parameterisations of ``hybrid_kernels.linear_attention``: it projects x to
(q, k, v, decay, beta), calls the op, and projects the output. A new linear mixer overrides one or two
methods.
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
    """Base class of the options of all mixers."""

    def complete(self, hidden_size: int) -> MixerOptions:
        """Return these options with all defaults that depend on the model dim D filled in."""
        return self

    def scaled_from(self, base: Any) -> MixerOptions:
        """Return these options under muP; ``base`` are those of the same mixer at the base width."""
        return self

    def problems(self, sizes: Sizes) -> list[str]:
        """Return the mistakes in the completed options, one line each ('num_heads: ...')."""
        return []


class Mixer(nn.Module, ABC):
    """Base class of token mixers.

    Class attributes:
        name, symbol: set by ``register_mixer``.
        Options: the options dataclass.
        layer_type: transformers' name of the required mask: ``full_attention`` (keys and values are
            cached) or ``linear_attention`` (only states are cached).
        attends: "full" or "local" (window, chunk) for softmax over the keys of earlier tokens; "" for a
            state. ``hybrid_eval`` selects the branches to knock out by this value; None: by
            ``layer_type``.
        paper: paper of the mixer.
        formula: one line, in the notation S_t = G_t * S_{t-1} + v_t k_t^T.
        used_by: published models that use the mixer.
        kind: name of the first registered class among the bases. Mixers of one kind are counted
            together (``Sizes.kind_idx``).
        shared_by_stack: names of parameters shared by all layers of the mixer in a stack.
        residual_projections: names of its Linear modules that write to the residual stream; ``init``
            scales their weights.
        continues_packed: whether packed documents can continue from a cache.
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
    residual_projections: ClassVar[tuple[str, ...]] = ("o_proj",)
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
        """Mix the tokens of x.

        Args:
            x: (B, T, D).
            attention_mask: mask of ``layer_type`` as returned by transformers' mask functions.
            position_embeddings: (cos, sin) of the layer's rotary embedding, or None.
            segments: document boundaries and padding, for mixers with a state.
            cache: cache slot to continue from and to write to, or None.

        Returns:
            (y, weights): y (B, T, D); weights (B, H, T, T_total) if the mixer has attention weights and
            the attention implementation returns them, else None.
        """

    def check_arguments(self, kwargs: dict[str, Any]) -> None:
        """Raise TypeError for keyword arguments of ``forward`` that no mixer accepts."""
        known = MIXER_ARGUMENTS | {"attention_mask", "position_embeddings"}
        check_arguments(type(self).__name__, Mixer.forward, kwargs, known)

    @classmethod
    def uses_state(cls, options: Any) -> bool:
        """Return whether the cache holds a recurrent or convolution state of the mixer."""
        return cls.layer_type == "linear_attention"

    @classmethod
    def fits_paged(cls, options: Any) -> bool:
        """Return whether paged caches fit: only keys and values are cached, and of equal size."""
        return False

    @classmethod
    def tensor_splits(cls, options: Any) -> tuple[Split, ...]:
        """Return how tensor parallelism may split the mixer; empty: every process has all of it."""
        return ()

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return sets of options for the tests, small enough for D = 32.

        Every invariant test runs on each set. List one set per branch of the code.
        """
        return [{"num_heads": 2}]

    @classmethod
    def rotary(cls, options: Any, sizes: Sizes) -> nn.Module | None:
        """Return the rotary embedding for these options, shared per symbol; None for none."""
        return None

    def init_parameters(self, std: float) -> None:
        """Initialise parameters and buffers of this module. Linear modules are initialised already."""

    def mixing_flops(self, context: int) -> float:
        """Return forward FLOPs per token without projections, as a mean over ``context`` tokens."""
        return 0.0

    def tokens(self) -> dict[str, TokenSpec]:
        """Return the per-token entries that ``forward`` appends to its cache slot, by name."""
        return {}

    def states(self) -> dict[str, StateSpec]:
        """Return the states that ``forward`` keeps in its cache slot, by name."""
        return {}


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, x (B, T, D) -> (B, T, D).

    Supports a state and document boundaries. Mamba (arXiv 2312.00752) and DeltaNet (arXiv 2406.06484)
    apply it before the recurrence.
    """

    def __init__(
        self, channels: int, width: int, bias: bool = False, activation: str | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.activation = activation
        self.residual = False
        """Whether to add x to its convolution before the activation (canon layers)."""

    def init_parameters(self, std: float) -> None:
        """Initialise uniformly with variance 1 / (3 W), as torch's depthwise Conv1d; bias 0."""
        bound = self.weight.shape[1] ** -0.5
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Convolve packed x, and continue from and write to the cache slot if there is one."""
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
        """Convolve several tensors (B, T, ...), whose channels add up to D, in one call."""
        y = self(torch.cat(parts, dim=-1), cu_seqlens, cache)
        return split(y, [part.shape[-1] for part in parts])

    def states(self) -> dict[str, StateSpec]:
        """Return the shape (D, W - 1) of the last W - 1 inputs, under the name used by ``forward``."""
        channels, width = self.weight.shape
        return {"conv": StateSpec((channels, width - 1))}


class StateMixer(Mixer):
    """Mixer that keeps a state in place of keys and values, and sees documents one after the other.

    Subclasses implement ``mix``. Its input has no padding: the real tokens are packed.
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
        """See ``Mixer.forward``. The mask is not used; ``segments`` describes the padding."""
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
        """Map x (B, T, D), or (1, tokens, D) with ``cu_seqlens``, to y of the same shape."""


class LinearMixer(StateMixer):
    """Base class of parameterisations of ``linear_attention``.

    Subclasses set the sizes with ``build`` and override ``gates`` (decay, beta) and ``read`` (the
    output). If q, k, v and the gates depend on each other, override ``mix``.
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
        writes: int = 1,
    ) -> None:
        """Create the projections of q, k (H_k x K) and v (H x V), the convolution, and the output.

        Args:
            num_heads: H, heads of v and of the state.
            key_dim: K.
            value_dim: V.
            conv_size: W, width of a short convolution on q, k, v; None for no convolution.
            bias: add biases to the projections.
            key_heads: H_k, heads of q and k, each shared by H / H_k heads of v; default H.
            conv_bias: add a bias to the convolution.
            conv_activation: ``silu`` or None, after the convolution.
            writes: keys and values per token. Those of one write follow those of the write before: k has
                writes x H_k x K channels, v writes x H x V. Subclasses use them in ``mix``.
        """
        d_model = self.sizes.hidden_size
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.key_heads = num_heads if key_heads is None else key_heads
        inner_key, inner = self.key_heads * key_dim, num_heads * value_dim
        self.q_proj = nn.Linear(d_model, inner_key, bias=bias)
        self.k_proj = nn.Linear(d_model, writes * inner_key, bias=bias)
        self.v_proj = nn.Linear(d_model, writes * inner, bias=bias)
        self.o_proj = nn.Linear(inner, d_model, bias=bias)
        self.conv = None
        if conv_size:
            channels = inner_key + writes * (inner_key + inner)
            self.conv = ShortConvolution(channels, conv_size, conv_bias, conv_activation)

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Project x, run the recurrence, and project the output."""
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
        state: str = "recurrent",
        **gates: Any,
    ) -> torch.Tensor:
        """Call the op, and continue from and write to the cache slot if there is one: o (B, T, H, V).

        Values that are too wide for the op are split into parts, each with its own state. The result is
        the same, because the columns of a state do not interact. ``carry`` maps the final state
        (N, H, K, V) to the state that is stored, under the name ``state``.
        """
        parts = value_parts(v.shape[-1])
        before = None if cache is None else cache.state(state)
        if parts > 1:
            v, gates = _split_values(v, gates, parts)
            before = None if before is None else _split_state(before, parts)
        o, after = linear_attention(
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
        if cache is not None and after is not None:
            after = after if parts == 1 else _join_state(after, parts)
            cache.set_state(state, after if carry is None else carry(after))
        return o if parts == 1 else o.unflatten(2, (-1, parts)).flatten(-2)

    def project(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project x (B, T, D) to q, k (B, T, H_k, K), v (B, T, H, V); convolve; apply ``features``.

        With several writes per token, k and v have ``writes`` times as many heads.
        """
        q, k, v = self.read_in(x)
        if self.conv is not None:
            q, k, v = self.conv.split([q, k, v], cu_seqlens, cache)
        q, k = (y.unflatten(-1, (-1, self.key_dim)) for y in (q, k))
        return self.features(q, k, v.unflatten(-1, (-1, self.value_dim)))

    def read_in(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project x (B, T, D) to the convolution's input: q, k (B, T, H_k * K), v (B, T, H * V)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def features(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Apply activations or normalisation to q, k, v; identity by default."""
        return q, k, v

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """Return the op's ``log_decay`` and ``beta`` for x (B, T, D); none by default."""
        return {}

    def read(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Map o (B, T, H, V) to (B, T, H * V); subclasses normalise and gate."""
        return o.flatten(-2)

    def mixing_flops(self, context: int) -> float:
        """Count decay, write and read of a K x V state per head: 1 + 2 + 2 FLOPs per element."""
        return 5.0 * self.num_heads * self.key_dim * self.value_dim

    def states(self) -> dict[str, StateSpec]:
        """Return one K x V state per head, and the last W - 1 inputs of the convolution."""
        conv = self.conv.states() if self.conv is not None else {}
        shape = (self.num_heads, self.key_dim, self.value_dim)
        return {"recurrent": StateSpec(shape, torch.float32), **conv}


MAX_HEAD_DIM = 256


def value_parts(value_dim: int) -> int:
    """Return the number of parts to split values into, so that the op supports the width of each."""
    return -(-value_dim // MAX_HEAD_DIM)


def _split_values(
    v: torch.Tensor, gates: dict[str, Any], parts: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Split v (B, T, H, V) into (B, T, H * parts, V / parts), and repeat each head's gates."""
    heads_dim = {"log_decay": 2, "beta": 2, "write_scale": 2, "bonus": 0}
    heads_dim |= {"erase_key": 2, "erase_query": 2}
    split = dict(gates)
    for name, dim in heads_dim.items():
        gate = gates.get(name)
        if gate is not None:
            split[name] = gate.repeat_interleave(parts, dim=0 if gate.ndim == 1 else dim)
    if gates.get("value_log_decay") is not None:
        split["value_log_decay"] = gates["value_log_decay"].unflatten(-1, (parts, -1)).flatten(2, 3)
    return v.unflatten(-1, (parts, -1)).flatten(2, 3), split


def _split_state(state: torch.Tensor, parts: int) -> torch.Tensor:
    """Split states (N, H, K, V) into (N, H * parts, K, V / parts)."""
    return state.unflatten(-1, (parts, -1)).transpose(2, 3).flatten(1, 2)


def _join_state(state: torch.Tensor, parts: int) -> torch.Tensor:
    """Invert ``_split_state``."""
    return state.unflatten(1, (-1, parts)).transpose(2, 3).flatten(-2)


class OutputNorm(nn.Module):
    """RMSNorm of o (B, T, H, V), over all heads together (``layer``) or over each head (``head``).

    MiniMax-01 uses ``layer``. Ring-linear and RetNet use ``head``.
    """

    def __init__(self, kind: str, num_heads: int, value_dim: int, eps: float) -> None:
        super().__init__()
        self.per_head = kind == "head"
        self.norm = build_norm(
            "rmsnorm", value_dim if self.per_head else num_heads * value_dim, eps
        )

    def forward(self, o: torch.Tensor) -> torch.Tensor:
        """Normalise (B, T, H, V) and flatten to (B, T, H * V)."""
        return self.norm(o).flatten(-2) if self.per_head else self.norm(o.flatten(-2))


FEATURE_MAPS = {
    "identity": lambda x: x,
    "silu": F.silu,
    "relu": F.relu,
    "elu+1": lambda x: F.elu(x) + 1,
}


def head_problems(hidden_size: int, num_heads: int) -> list[str]:
    """Return an error line if the heads do not divide D and no option sets the head dim."""
    if hidden_size % num_heads == 0:
        return []
    near = nearest_divisors(hidden_size, num_heads)
    return [
        f"num_heads: expected a divisor of hidden_size {hidden_size}, got {num_heads}; try {near}, or"
        " set head_dim"
    ]


def nearest_divisors(number: int, wanted: int) -> str:
    """Return the divisors of ``number`` next to ``wanted``, as text: '8 or 16'."""
    below = max((d for d in range(1, min(wanted, number) + 1) if number % d == 0), default=None)
    above = next((d for d in range(wanted + 1, number + 1) if number % d == 0), None)
    return " or ".join(str(d) for d in (below, above) if d is not None)
