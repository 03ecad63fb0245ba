"""Protocol of the config fields that describe the stack."""

from __future__ import annotations

from typing import Any, Literal, Protocol

NormName = Literal["rmsnorm", "layernorm", "zero_centered_rmsnorm", "weightless_rmsnorm"]
LossBackend = Literal["chunked", "liger", "full"]
Init = Literal["fixed", "depth_scaled", "xavier", "deepnorm"]
Combine = Literal["mean", "sum", "concat", "learned", "learned_scalar"]


class StackFields(Protocol):
    """Fields that the stack follows from: what resolution reads."""

    hidden_size: int
    layout: str
    num_hidden_layers: int | None
    ffn: Any
    mixers: dict[str, dict] | None
    feed_forwards: dict[str, dict] | None
    norm: NormName
    norm_eps: float
    norm_position: Any
    residuals: dict[str, dict] | None
    init: Init
    parallel_combine: Combine
    canon: Any
    canon_width: int
    shared: dict[str, dict] | None
    mup_base_width: int | None
    max_position_embeddings: int | None


class ConfigFields(StackFields, Protocol):
    """Fields that validation reads; ``HybridConfig`` implements them."""

    model_type: str
    vocab_size: int
    embedding_multiplier: Any
    logits_multiplier: float
    initializer_range: float
    z_loss: float
    logit_softcap: float | None
    num_mtp_layers: int
    mtp_layout: str | None
    mtp_loss_weight: float
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    dtype: Any


def width_ratio(fields: StackFields) -> float:
    """Return D / w, where w is the base width of muP (arXiv 2203.03466); 1 without muP."""
    base = fields.mup_base_width
    return 1.0 if base is None else fields.hidden_size / base
