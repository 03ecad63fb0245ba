"""Softmax mixers on vLLM's paged attention, as an attention function of transformers by the name `NAME`.

Shapes: T tokens of a step, H query heads, H_kv key heads, K head dim, V value dim.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention

from hybrid.mixers.attention import CAPPED_FUNCTIONS, SoftmaxMixer, alibi_slopes
from hybrid.mixers.forgetting_attention import ForgettingAttention
from hybrid.mixers.local_attention import LocalAttention
from hybrid.mixers.multi_head_latent_attention import MultiHeadLatentAttention
from hybrid.mixers.softmax_attention import SoftmaxAttention

NAME = "hybrid_paged"

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vLLM's attention back-ends (512 on a CPU alone); heads of other sizes are filled up with zeros."""


PAGED = (SoftmaxAttention, LocalAttention, MultiHeadLatentAttention, ForgettingAttention)
"""Mixers that run on vLLM's attention."""


class PagedAttention(nn.Module):
    """vLLM's `Attention` for the sizes of one mixer.

    Args:
        num_heads, num_kv_heads: H and H_kv.
        key_dim: of q and k as they arrive, K.
        marks: dims at the end of q and k that vLLM does not need (positions of ALiBi).
        vllm_config, prefix: of vLLM's layer.
        kind: `Attention` or a class of its kind.
        options: further arguments of `Attention`.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        key_dim: int,
        *,
        scale: float,
        marks: int = 0,
        vllm_config: VllmConfig,
        prefix: str,
        kind: type[Attention] = Attention,
        **options: Any,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.key_dim = num_heads, num_kv_heads, key_dim
        self.marks = marks
        size = padded_size(key_dim)
        assert size is not None
        self.head_size: int = size
        self.attention = kind(
            num_heads=num_heads,
            head_size=self.head_size,
            scale=scale,
            num_kv_heads=num_kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=prefix,
            **options,
        )

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend to all earlier tokens of each request.

        Args:
            q: (B, H, t, K + marks), B t = T.
            k, v: (B, H_kv or more, t, K + marks) and (B, H_kv or more, t, V), V at most K; of more
                heads the first H_kv are taken, which stand for the others.

        Returns:
            (B, t, H, V).
        """
        batch, _, time, width = q.shape
        values = v.shape[-1]
        keys = width - self.marks
        q, k = q[..., :keys], k[:, : self.kv_heads, :, :keys]
        rows = (self._rows(y) for y in (q, k, v[:, : self.kv_heads]))
        o = self.attention(*rows)
        return o.view(batch, time, self.heads, self.head_size)[..., :values]

    def _rows(self, y: torch.Tensor) -> torch.Tensor:
        """(B, h, t, d) -> (T, h head_size), filled up with zeros."""
        y = F.pad(y.transpose(1, 2), (0, self.head_size - y.shape[-1]))
        return y.flatten(0, 1).flatten(1).contiguous()


def padded_size(head_dim: int) -> int | None:
    """The smallest head size of vLLM's that holds so many dims; None where there is none."""
    return next((size for size in HEAD_SIZES if size >= head_dim), None)


def attach(mixer: SoftmaxMixer, vllm_config: VllmConfig, prefix: str) -> None:
    """Give a softmax mixer its `PagedAttention`.

    Raises:
        ValueError: what vLLM's attention cannot do.
    """
    if isinstance(mixer, MultiHeadLatentAttention):
        sizes: dict[str, Any] = _latent_sizes(mixer)
        options: dict[str, Any] = {}
    elif isinstance(mixer, SoftmaxAttention | LocalAttention):
        sizes = {"num_heads": mixer.num_heads, "num_kv_heads": mixer.num_kv_heads,
                 "key_dim": mixer.head_dim}  # fmt: skip
        options = (
            _softmax_options(mixer) if isinstance(mixer, SoftmaxAttention) else _options(mixer)
        )
        if isinstance(mixer, LocalAttention):
            options |= _local_options(mixer, vllm_config.cache_config.block_size)
    elif isinstance(mixer, ForgettingAttention):
        sizes = {"num_heads": mixer.num_heads, "num_kv_heads": mixer.num_kv_heads,
                 "key_dim": mixer.tokens()["k"].dim}  # fmt: skip
        options = {}
    else:
        raise ValueError(f"{mixer.name}: not served by vLLM, which has no attention of its kind")
    if padded_size(sizes["key_dim"]) is None:
        raise ValueError(
            f"{mixer.name}: expected a head dim of at most {HEAD_SIZES[-1]} in vLLM, got"
            f" {sizes['key_dim']}"
        )
    mixer.paged = PagedAttention(
        **sizes, scale=mixer.scaling, vllm_config=vllm_config, prefix=prefix, **options
    )


def _softmax_options(mixer: SoftmaxAttention) -> dict[str, Any]:
    if mixer.options.dual_chunk is not None and mixer.has_positions:
        raise ValueError(
            "softmax_attention.dual_chunk_size: not served by vLLM, whose attention has no dual chunks;"
            " set it to null for plain positions, or use generate()"
        )
    return _options(mixer, mixer.has_positions)


def _options(mixer: SoftmaxAttention | LocalAttention, positions: bool = True) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if mixer.options.soft_cap is not None:
        options["logits_soft_cap"] = mixer.options.soft_cap
    if mixer.sink_logits is not None:
        options["sinks"] = mixer.sink_logits
    if mixer.slopes is not None and positions:
        options |= {"alibi_slopes": alibi_slopes(mixer.num_heads), "marks": 2}
    return options


def _local_options(mixer: LocalAttention, block_size: int) -> dict[str, Any]:
    width = mixer.reach.width
    if not mixer.reach.chunked:
        return {"per_layer_sliding_window": width}
    if width % block_size:
        raise ValueError(
            f"chunked_attention.chunk_size: expected a multiple of vLLM's block size {block_size}, got"
            f" {width}; use generate(), or another --block-size"
        )
    if mixer.sink_logits is not None or mixer.options.soft_cap is not None:
        raise ValueError(
            "chunked_attention: sinks and soft_cap are not served by vLLM, whose attention in chunks has"
            " neither; use generate()"
        )
    return {"kind": ChunkedLocalAttention, "attention_chunk_size": width}


def _latent_sizes(mixer: MultiHeadLatentAttention) -> dict[str, int]:
    """One key of the latent for all heads, where a head of vLLM's holds it; else keys of every head."""
    latent = mixer.latent_dim + mixer.rope_dim
    if padded_size(latent) is not None:
        mixer.absorb = True
        return {"num_heads": mixer.num_heads, "num_kv_heads": 1, "key_dim": latent}
    mixer.absorb = False
    width = max(mixer.head_dim + mixer.rope_dim, mixer.value_dim)
    return {"num_heads": mixer.num_heads, "num_kv_heads": mixer.num_heads, "key_dim": width}


def _paged(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    """An attention function: q, k, v (B, heads, t, dim) of new tokens -> (B, t, H, V)."""
    return module.paged(q, k, v), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _paged)
CAPPED_FUNCTIONS.add(NAME)
