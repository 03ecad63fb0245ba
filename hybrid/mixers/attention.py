"""Building blocks of softmax attention that transformers' attention functions lack.

Shapes: B batch, T queries, S keys, H heads, H_kv key heads, K head dim, V value dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from hybrid.config.sizes import Sizes
from hybrid.mixers.base import Mixer
from hybrid.mixers.parts import to_float32
from hybrid.nn.cache import update_paged
from hybrid.nn.rotary import build_rotary

# Attention functions that support sinks and soft caps. Add a function registered elsewhere here.
CAPPED_FUNCTIONS = {"flex_attention"}
# Attention functions that `capped_attention` can replace: same result, same masks.
PLAIN_FUNCTIONS = ("eager", "sdpa")

LOW = 256  # positions are LOW * high + low, both exact in bfloat16 up to position 65,535


class SoftmaxMixer(Mixer):
    """Base class of mixers that use transformers' attention functions.

    Subclasses set ``scaling`` and have the options ``rope_parameters`` and ``dropout``. The config's
    ``attn_implementation`` selects the function (eager, sdpa, flash_attention_2, flex_attention, ...).
    """

    is_causal = True
    num_key_value_groups: int = 1
    scaling: float
    config: PreTrainedConfig | None = None
    """The model's config, which names the attention function; None for eager attention."""

    @classmethod
    def rotated_dim(cls, options: Any) -> int:
        """Return the dims of a head that can be rotated, before ``partial_rotary_factor``."""
        raise NotImplementedError

    @classmethod
    def rotary(cls, options: Any, sizes: Sizes) -> nn.Module | None:
        """Return the rotary embedding of these options; None without positions."""
        return build_rotary(options.rope_parameters, cls.rotated_dim(options), sizes)

    @property
    def attention_name(self) -> str:
        """Name of the config's attention function."""
        return getattr(self.config, "_attn_implementation", None) or "eager"

    @property
    def active_dropout(self) -> float:
        """Dropout probability of the attention weights; 0 in evaluation mode."""
        return self.options.dropout if self.training else 0.0

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        kwargs: dict[str, Any],
        *,
        soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply the config's attention function.

        Eager and sdpa attention are replaced by ``capped_attention`` if there are sinks or a soft cap.

        Args:
            q: (B, H, T, K).
            k, v: (B, H_kv, S, K) and (B, H_kv, S, V).
            mask: as returned by transformers' mask function for ``attn_implementation``.
            kwargs: keyword arguments that the model passes to attention functions.
            soft_cap, sinks: as in ``capped_attention``.

        Returns:
            o (B, T, H, V), and the weights (B, H, T, S) if the function returns them, else None.

        Raises:
            ValueError: sinks or a soft cap with a function that does not support them.
        """
        name = self.attention_name
        dropout = self.active_dropout
        extra: dict[str, Any] = {}
        if sinks is not None or soft_cap is not None:
            if name in PLAIN_FUNCTIONS:
                return capped_attention(
                    q, k, v, mask,
                    scaling=self.scaling, soft_cap=soft_cap, sinks=sinks, dropout=dropout,
                )  # fmt: skip
            if name not in CAPPED_FUNCTIONS:
                raise _unsupported(
                    name, "sinks and soft_cap", (*PLAIN_FUNCTIONS, *sorted(CAPPED_FUNCTIONS))
                )
            extra = {"softcap": soft_cap, "s_aux": sinks}
        k, v, kwargs = update_paged(k, v, self.layer_idx, kwargs)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        scaling = self.scaling
        return function(self, q, k, v, mask, dropout=dropout, scaling=scaling, **extra, **kwargs)

    def require_plain(self, feature: str) -> None:
        """Raise ValueError if ``capped_attention`` cannot replace the config's attention function."""
        name = self.attention_name
        if name not in PLAIN_FUNCTIONS:
            raise _unsupported(name, feature, PLAIN_FUNCTIONS)


class FullAttention(SoftmaxMixer):
    """Softmax mixer that caches the keys and values of all tokens."""

    layer_type = "full_attention"
    attends = "full"


def _unsupported(name: str, feature: str, supported: tuple[str, ...]) -> ValueError:
    return ValueError(
        f"attn_implementation: expected a function that supports {feature}, got {name!r}; try"
        f" {', '.join(supported)}"
    )


def capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with a soft cap on the logits and a sink per head, in plain PyTorch.

    o = sum_s exp(z_s) v_s / (sum_s exp(z_s) + exp(b)), where z = scaling q . k is capped to
    c tanh(z / c) and b is the sink of the head. Memory is O(T S).

    Args:
        q: (B, H, T, K).
        k, v: (B, H_kv, S, K) and (B, H_kv, S, V); H_kv divides H.
        mask: (B or 1, H or 1, T, S or more), bool (True: attend) or floating (added to the logits);
            None for ``causal_mask``.
        scaling: factor of the logits.
        soft_cap: c; None for no cap.
        sinks: (H,); None for no sinks.
        dropout: dropout probability of the weights.

    Returns:
        o (B, T, H, V) in v's dtype, and the weights (B, H, T, S).
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (y.repeat_interleave(groups, dim=1) if groups > 1 else y for y in (k, v))
    logits = to_float32(q @ k.transpose(-1, -2)) * scaling
    return weighted_values(logits, v, mask, soft_cap=soft_cap, sinks=sinks, dropout=dropout)


def weighted_values(
    logits: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Second half of ``capped_attention``, from logits (B, H, T, S) and v (B, H, S, V)."""
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    queries, keys = logits.shape[-2:]
    mask = causal_mask(queries, keys, v.device) if mask is None else mask[..., :keys]
    if mask.dtype == torch.bool:
        # not -inf: a row of padding is masked everywhere and must not become NaN
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    else:
        logits = logits + mask
    if sinks is not None:
        column = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., :keys].to(v.dtype)
    weights = F.dropout(weights, dropout)
    return (weights @ v).transpose(1, 2).contiguous(), weights


def causal_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Return the mask (T, S) that transformers means by no mask: causal, aligned at the top left.

    A single query sees all keys. More keys than queries occur only while a static cache is filled from
    its start. The keys after the queries are then empty.
    """
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return mask if queries == 1 else mask.tril()


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the ALiBi slope of each head (arXiv 2108.12409): 2^(-8h/H) if H is a power of two.

    Otherwise the slopes of the next lower power of two, followed by every second slope of the next
    higher one.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (h + 1) / below) for h in range(below)]
    return slopes + [2 ** (-4 * (2 * h + 1) / below) for h in range(num_heads - below)]


def add_positions(
    q: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    slopes: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append the ALiBi bias to q and k as two extra dims: scaling q' . k' = scaling q . k + slope p_k.

    The term - slope * p_q is left out: it is the same for all keys of a query, so softmax does not
    depend on it. The positions of keys are cached with the keys. Padding between tokens therefore has
    no effect, and any attention function can be used.

    Args:
        q, k: (B, H, T, K), (B, H_kv, S, K).
        position_ids: (B or 1, S), positions of the keys.
        slopes: (H,).
        scaling: factor of the logits.

    Returns:
        q (B, H, T, K + 2) and k (B, H_kv, S, K + 2).
    """
    weights = (slopes.to(q.dtype) / scaling)[:, None] * q.new_tensor([LOW, 1])
    q = torch.cat([q, weights[None, :, None].expand(*q.shape[:3], 2)], dim=-1)
    place = position_ids.expand(k.shape[0], -1)[:, None]
    high = torch.div(place, LOW, rounding_mode="floor")
    position = torch.stack([high, place - LOW * high], dim=-1)  # (B, 1, S, 2)
    return q, torch.cat([k, position.to(k.dtype).expand(-1, k.shape[1], -1, -1)], dim=-1)
