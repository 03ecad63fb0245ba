"""Query heads and grouped key heads: options, projections and output shared by softmax mixers.

Shapes: B batch, T time, H query heads, H_kv key heads, K head dim, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import initialization as init

from hybrid.config.declare import Below1, Positive, Size
from hybrid.config.fields import NormName
from hybrid.config.parallel import Split
from hybrid.config.sizes import Sizes
from hybrid.mixers.attention import alibi_slopes
from hybrid.mixers.base import Mixer, MixerOptions, head_problems
from hybrid.mixers.parts import divides
from hybrid.nn.norms import build_norm
from hybrid.nn.rotary import rope_problems

Options = TypeVar("Options", bound="HeadSizeOptions")


@dataclass(frozen=True)
class HeadSizeOptions(MixerOptions):
    """Options of all softmax mixers with grouped heads.

    Attributes:
        num_heads: query heads H; default D / 64, at least 1.
        num_kv_heads: key and value heads; default H (MHA); 1 for MQA; must divide H.
        head_dim: K; default D / H.
        rope_parameters: RoPE dictionary of transformers (``rope_type``, ``rope_theta``,
            ``partial_rotary_factor``, and the keys of the type); null for no positions (NoPE).
        scale: factor of the logits; default K ** -0.5.
    """

    num_heads: Size | None = None
    num_kv_heads: Size | None = None
    head_dim: Size | None = None
    rope_parameters: dict | None = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    scale: Positive | None = None

    def complete(self: Options, hidden_size: int) -> Options:
        """Return these options with heads and dims filled in."""
        heads = self.num_heads
        if heads is None:
            heads = max(1, hidden_size // (self.head_dim or 64))
        return replace(
            self,
            num_heads=heads,
            num_kv_heads=heads if self.num_kv_heads is None else self.num_kv_heads,
            head_dim=hidden_size // max(1, heads) if self.head_dim is None else self.head_dim,
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """H, H_kv, K of completed options."""
        assert self.num_heads is not None
        assert self.num_kv_heads is not None
        assert self.head_dim is not None
        return self.num_heads, self.num_kv_heads, self.head_dim

    @property
    def scaling(self) -> float:
        """Factor of the logits, of completed options."""
        return self.sizes[2] ** -0.5 if self.scale is None else self.scale

    def scaled_from(self: Options, base: Options) -> Options:
        """Return options whose logits scale as 1 / d if the head dim d differs from the base (muP)."""
        return replace(self, scale=base.scaling / (self.sizes[2] / base.sizes[2]))

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of sizes."""
        heads, kv_heads, head_dim = self.complete(sizes.hidden_size).sizes
        lines = head_problems(sizes.hidden_size, heads) if self.head_dim is None else []
        lines = lines or divides("num_kv_heads", kv_heads, "num_heads", heads)
        if self.rope_parameters is not None:
            rope = rope_problems(self.rope_parameters, max(2, head_dim), sizes)
            # if the heads do not fit, an error about their size would repeat the first one
            lines += [line for line in rope if not lines or line.startswith("rope_parameters.")]
        return lines


@dataclass(frozen=True)
class GroupedHeadOptions(HeadSizeOptions):
    """Options of attention with grouped heads, in addition to those of ``HeadSizeOptions``.

    Attributes:
        qk_norm: norm of q and k: ``head`` (over K, one weight for all heads, Qwen3), ``layer`` (over all
            heads together, OLMo 2), or null for no norm.
        qk_norm_type: type of that norm: ``rmsnorm``, ``zero_centered_rmsnorm`` (Gemma 3, Qwen3-Next),
            ``weightless_rmsnorm`` (Llama 4) or ``layernorm``.
        qk_norm_eps: epsilon of that norm; default the model's ``norm_eps``.
        bias: add biases to q, k, v.
        output_bias: add a bias to the output projection.
        dropout: dropout probability of the attention weights in training.
        output_gate: multiply the output by sigmoid(x W_g), per channel (arXiv 2505.06708; Qwen3-Next).
        sinks: add a learned logit per head to the softmax, without a value (GPT-OSS). A head can then
            attend to nothing.
        soft_cap: c; logits z become c tanh(z / c) (Gemma 2, arXiv 2408.00118); null for no cap.
        alibi: add -m_h (t - s) to the logits (arXiv 2108.12409); requires ``rope_parameters: null``.
    """

    qk_norm: Literal["head", "layer"] | None = None
    qk_norm_type: NormName = "rmsnorm"
    qk_norm_eps: Positive | None = None
    bias: bool = False
    output_bias: bool = False
    dropout: Below1 = 0.0
    output_gate: bool = False
    sinks: bool = False
    soft_cap: Positive | None = None
    alibi: bool = False

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of sizes and for options that exclude each other."""
        lines = super().problems(sizes)
        if self.alibi and self.rope_parameters is not None:
            lines.append(
                "alibi: expected rope_parameters null, as ALiBi replaces rotary positions, got"
                f" {self.rope_parameters}; try rope_parameters: null"
            )
        if self.alibi and (self.sinks or self.soft_cap is not None):
            lines.append(
                "alibi: expected neither sinks nor soft_cap, got both alibi and one of them; try"
                " alibi: false"
            )
        return lines


class GroupedHeads(Mixer):
    """Mixer with H query heads of dim K, in groups that share H_kv key heads (arXiv 2305.13245)."""

    def build(self, options: GroupedHeadOptions) -> None:
        """Create the projections, norms, gate, sinks and slopes set by the options."""
        d_model = self.sizes.hidden_size
        self.num_heads, self.num_kv_heads, self.head_dim = options.sizes
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.scaling = options.scaling
        inner, inner_kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, inner, bias=options.bias)
        self.k_proj = nn.Linear(d_model, inner_kv, bias=options.bias)
        self.v_proj = nn.Linear(d_model, inner_kv, bias=options.bias)
        self.o_proj = nn.Linear(inner, d_model, bias=options.output_bias)
        self.gate_proj = (
            nn.Linear(d_model, inner, bias=options.bias) if options.output_gate else None
        )
        if options.sinks:  # paged eager attention uses this attribute if it exists
            self.sinks = nn.Parameter(torch.empty(self.num_heads))
        self.slopes = nn.Buffer(self._slopes(), persistent=False) if options.alibi else None
        self.q_norm = self.k_norm = None
        if options.qk_norm:
            sizes = (self.head_dim,) * 2 if options.qk_norm == "head" else (inner, inner_kv)
            kind = options.qk_norm_type
            eps = self.sizes.norm_eps if options.qk_norm_eps is None else options.qk_norm_eps
            self.q_norm, self.k_norm = (build_norm(kind, size, eps) for size in sizes)

    @classmethod
    def tensor_splits(cls, options: Any) -> tuple[Split, ...]:
        """Return a split by heads; empty with ALiBi or if heads interact before the output."""
        if options.qk_norm == "layer" or options.alibi or getattr(options, "conv_size", None):
            return ()
        rules = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise") | {"o_proj": "rowwise"}
        if options.output_gate:
            rules["gate_proj"] = "colwise"
        if options.qk_norm:
            # each process normalises its own heads: weight gradients are summed over processes
            rules |= dict.fromkeys(("q_norm", "k_norm"), "replicated_with_grad_allreduce")
        if options.sinks:
            rules |= {"sinks": "colwise", "": "local_params"}
        return (Split(rules, {"num_kv_heads": options.sizes[1]}),)

    @property
    def sink_logits(self) -> torch.Tensor | None:
        """The sinks (H,), or None without sinks."""
        return getattr(self, "sinks", None)

    def _slopes(self) -> torch.Tensor:
        return torch.tensor(alibi_slopes(self.num_heads))

    def init_parameters(self, std: float) -> None:
        """Draw sinks from a normal distribution; compute slopes from the config."""
        if self.sink_logits is not None:
            init.normal_(self.sinks, mean=0.0, std=std)
        if self.slopes is not None:
            init.copy_(self.slopes, self._slopes())

    def split_heads(self, y: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
        """Map (B, T, H * K) to (B, H, T, K), normalised per layer or per head."""
        if norm is not None and self.options.qk_norm == "layer":
            y = norm(y)
        y = y.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.options.qk_norm == "head":
            y = norm(y)
        return y.transpose(1, 2)

    def output(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Project o (B, T, H * K) to (B, T, D), gated by x (B, T, D) if there is a gate."""
        if self.gate_proj is not None:
            o = o * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(o)

    def logits_flops(self, keys: float) -> float:
        """Return the FLOPs of one token's logits and weighted sum over ``keys`` keys."""
        return 2.0 * 2.0 * self.num_heads * self.head_dim * keys
