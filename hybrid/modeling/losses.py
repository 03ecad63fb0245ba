"""Cross entropy of next tokens from hidden states, without the logits of a whole batch.

The head and the loss run on one chunk of tokens at a time. No float32 copy of all logits exists, neither
in forward nor in backward. The z-loss lambda log^2 Z (PaLM, arXiv 2204.02311, section 5) is computed on
the same chunk. The config key ``loss_backend`` selects one of three backends:

    chunked   this module. The gradient of a chunk is computed while its logits exist, so that nothing is
              recomputed. There is no second derivative. A head that is more than its weight (with an
              adapter or hooks, quantised, sharded) is called as a module, with checkpointing.
    liger     the Triton kernels of liger-kernel, if installed; for a plain head, on an accelerator.
    full      all logits at once, as transformers' loss.

Shapes: B batch, T time, N = B * T tokens, m tokens of a chunk, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hybrid.config.block_options import scaled
from hybrid.config.fields import LossBackend
from hybrid.mixers.parts import to_float32

IGNORED = -100
"""Label of positions that are not predicted."""

CHUNK_ELEMENTS = 2**26
"""Number of logits in a chunk: 256 MiB in float32, or 2,048 tokens with a vocabulary of 32,768."""


def next_tokens(labels: torch.Tensor, shift_labels: torch.Tensor | None = None) -> torch.Tensor:
    """Return the target of each position, (B, T): the next label, or ``shift_labels`` unchanged."""
    if shift_labels is not None:
        return shift_labels
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def transform_logits(
    products: torch.Tensor, multiplier: float = 1.0, cap: float | None = None
) -> torch.Tensor:
    """Compute logits from the output of the head: multiply, then soft-cap.

    The head stays a plain Linear, so that other code can resize it, replace it, or read its weight.

    Args:
        products: head(hidden), (..., V).
        multiplier: ``config.logit_scale``.
        cap: c of c * tanh(logits / c), which bounds absolute values by c (Gemma 2, arXiv 2408.00118,
            section 2); None for no cap.
    """
    logits = scaled(products, multiplier)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def cross_entropy(
    hidden: torch.Tensor,
    head: nn.Module,
    targets: torch.Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    multiplier: float = 1.0,
    cap: float | None = None,
    backend: LossBackend = "chunked",
    chunk_elements: int = CHUNK_ELEMENTS,
) -> torch.Tensor:
    """Compute the summed cross entropy of the targets, with z-loss and label smoothing.

    The loss is the sum over targets of -log softmax(x)_target + z_loss * (log Z)^2 in nats, with
    x = transform_logits(head(hidden)). With label smoothing e the first term is
    -sum_v y_v log softmax(x)_v, where y is 1 - e at the target plus e / V everywhere (Szegedy et al.,
    arXiv 1512.00567, section 7).

    Args:
        hidden: (..., D), inputs of the head.
        head: module that maps D to V.
        targets: (...) int64, -100 for none.
        z_loss: lambda; 0.0001 in PaLM, 0.00001 in OLMo 2.
        label_smoothing: e, 0 <= e < 1.
        multiplier, cap: transform of the logits, see ``transform_logits``.
        backend: see the module docstring.
        chunk_elements: maximum of m * V, for ``chunked``.

    Returns:
        Scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: ``liger`` is not installed, or the head is not a plain linear map.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(hidden.device)
    if backend == "full":
        logits = transform_logits(head(hidden), multiplier, cap)
        return summed(logits, targets, z_loss, label_smoothing)
    plain = is_plain(head)
    if backend == "liger":
        # its kernels have no multiplier; a plain head is linear, so multiply its input
        hidden = scaled(hidden, multiplier)
        return _by_liger(hidden, head, targets, z_loss, label_smoothing, cap, plain)
    size = max(1, chunk_elements // _vocabulary(head, hidden))
    if plain:
        hidden, weight = _at_working_precision(hidden, head)
        wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
        terms = (z_loss, label_smoothing, multiplier, cap)
        return _chunked(hidden, weight, targets, *terms, size, *wanted)[0]
    return _by_module(hidden, head, targets, z_loss, label_smoothing, multiplier, cap, size)


def of_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> torch.Tensor:
    """Compute ``cross_entropy`` from logits (..., V), one chunk at a time.

    Raises:
        ValueError: logits exist for only some positions.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"labels: expected logits for {tuple(targets.shape)} positions, got"
            f" {tuple(logits.shape[:-1])}; leave logits_to_keep out if there are labels"
        )
    logits, targets = logits.flatten(0, -2), targets.reshape(-1).to(logits.device)
    size = max(1, chunk_elements // logits.shape[-1])
    pieces = _chunks(size, logits, targets)
    return torch.stack([summed(x, t, z_loss, label_smoothing) for x, t in pieces]).sum()


def summed(
    logits: torch.Tensor,
    targets: torch.Tensor,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Compute the loss of logits (m, V), summed over targets (m,), without transform or chunks."""
    logits = to_float32(logits)
    total = F.cross_entropy(
        logits,
        targets,
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    if z_loss:
        log_z = logits.logsumexp(dim=-1)
        total = total + z_loss * torch.where(targets != IGNORED, log_z.square(), 0.0).sum()
    return total


def is_plain(head: nn.Module) -> bool:
    """Return whether a head is only its weight: no bias, adapter, hook, shard or other code."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(head.weight) in (nn.Parameter, torch.Tensor)
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and "forward" not in vars(head)
    )


def in_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_loss: float,
    label_smoothing: float,
    multiplier: float,
    cap: float | None,
    size: int,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute ``cross_entropy`` of the products hidden @ weight^T, and its gradients in the same pass.

    With p = softmax(x): d loss / d x = p (1 + 2 lambda log Z) - y, in float32. y is onehot(target), or
    (1 - e) onehot(target) + e / V with label smoothing e.

    Args:
        hidden, weight: (N, D) and (V, D), of equal dtype.
        targets, z_loss, label_smoothing, multiplier, cap: as in ``cross_entropy``.
        size: tokens per chunk.
        for_hidden, for_weight: whether to compute the gradient; it is empty otherwise.

    Returns:
        The loss (scalar) and the gradients of ``hidden`` (N, D) and ``weight`` (V, D).
    """
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=kind, device=hidden.device)
    of_hidden = torch.empty_like(hidden) if for_hidden else hidden.new_empty(0)
    # sum over many chunks in float32, as bfloat16 has only 8 bits of precision
    of_weight = torch.zeros_like(weight if for_weight else weight[:0], dtype=kind)
    outs = of_hidden.split(size) if for_hidden else [None] * len(hidden.split(size))
    for (h, t), out in zip(_chunks(size, hidden, targets), outs, strict=True):
        terms = (z_loss, label_smoothing, multiplier, cap)
        loss, slope = _loss_and_slope(h @ weight.t(), t, *terms, for_hidden or for_weight)
        total += loss
        if slope is None:
            continue
        slope = slope.to(h.dtype)
        if out is not None:
            torch.mm(slope, weight, out=out)
        if for_weight:
            of_weight += slope.t() @ h
    return total, of_hidden, of_weight


# A custom op, so that a compiler does not unroll the chunks or run them in parallel.
_chunked = torch.library.custom_op("hybrid::chunked_cross_entropy", in_chunks, mutates_args=())


@_chunked.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_loss: float,
    label_smoothing: float,
    multiplier: float,
    cap: float | None,
    size: int,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    of_hidden = torch.empty_like(hidden) if for_hidden else hidden.new_empty(0)
    of_weight = torch.empty_like(weight if for_weight else weight[:0], dtype=kind)
    return hidden.new_empty((), dtype=kind), of_hidden, of_weight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.wanted = inputs[-2:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _differentiate(ctx: Any, grad: torch.Tensor | None, *again: Any) -> tuple[Any, ...]:
    """Multiply the gradients of the sum by ``grad``: gradients of a mean could underflow in float16."""
    if any(g is not None for g in again):
        raise NotImplementedError(
            "loss_backend: expected 'full' for second derivatives, got 'chunked'; try"
            " loss_backend 'full'"
        )
    if grad is None:
        return (None,) * 10
    grads = zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    return *((x * grad).to(dtype) if want else None for x, dtype, want in grads), *[None] * 8


_chunked.register_autograd(_differentiate, setup_context=_keep)


def _loss_and_slope(
    products: torch.Tensor,
    targets: torch.Tensor,
    z_loss: float,
    label_smoothing: float,
    multiplier: float,
    cap: float | None,
    slope: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the summed loss of one chunk, and its gradient for ``products``, float32 (m, V)."""
    x = transform_logits(to_float32(products), multiplier, cap)
    real = targets != IGNORED
    # no clamp, so that gather raises an error for any other negative label
    index = torch.where(real, targets, 0).unsqueeze(-1)
    log_p = x.log_softmax(dim=-1)
    losses, factor = -log_p.gather(-1, index).squeeze(-1), real.to(x.dtype)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_p.mean(dim=-1)
    if z_loss:
        # from the largest logit, as the difference for a much smaller one would cancel
        log_z = x.amax(dim=-1) - log_p.amax(dim=-1)
        losses = losses + z_loss * log_z.square()
        factor = factor * (1 + 2 * z_loss * log_z)
    loss = torch.where(real, losses, 0.0).sum()
    if not slope:
        return loss, None
    gradient = log_p.exp_().mul_(factor.unsqueeze(-1))
    ignored = ~real.unsqueeze(-1)
    real = real.to(gradient.dtype).unsqueeze(-1)
    if label_smoothing:
        gradient.sub_(real * (label_smoothing / x.shape[-1]))
    gradient.scatter_add_(-1, index, (label_smoothing - 1) * real)
    if cap is not None:
        gradient.mul_(1 - (x / cap).square_())
    if multiplier != 1:
        gradient.mul_(multiplier)
    # fill instead of multiply: logits of an ignored position may be NaN
    return loss, gradient.masked_fill_(ignored, 0.0)


def _by_module(
    hidden: torch.Tensor,
    head: nn.Module,
    targets: torch.Tensor,
    z_loss: float,
    label_smoothing: float,
    multiplier: float,
    cap: float | None,
    size: int,
) -> torch.Tensor:
    """Call the head as a module on one chunk at a time, and recompute its logits in backward."""

    def piece(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return summed(transform_logits(head(h), multiplier, cap), t, z_loss, label_smoothing)

    pieces = _chunks(size, hidden, targets)
    if torch.is_grad_enabled():
        losses = [checkpoint(piece, h, t, use_reentrant=False) for h, t in pieces]
    else:
        losses = [piece(h, t) for h, t in pieces]
    return torch.stack(losses).sum()


def _by_liger(
    hidden: torch.Tensor,
    head: nn.Module,
    targets: torch.Tensor,
    z_loss: float,
    label_smoothing: float,
    cap: float | None,
    plain: bool,
) -> torch.Tensor:
    try:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyLoss,
        )
    except ImportError as error:
        raise ValueError(
            "loss_backend: expected liger-kernel to be installed for 'liger', got an ImportError; try"
            " pip install liger-kernel, or 'chunked'"
        ) from error
    if not plain:
        raise ValueError(
            "loss_backend: expected a plain Linear without bias, adapters or hooks as the output head"
            f" of 'liger', got {type(head).__name__}; try 'chunked'"
        )
    hidden, weight = _at_working_precision(hidden, head)
    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED,
        lse_square_scale=z_loss,
        label_smoothing=label_smoothing,
        reduction="sum",
        softcap=cap,
        accum_dtype=torch.float32,
    )
    return loss(weight, hidden, targets)


def _at_working_precision(
    hidden: torch.Tensor, head: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert hidden states and weight to the dtype in which ``head(hidden)`` would multiply them."""
    weight: Any = head.weight
    device = hidden.device.type
    dtype = weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def _vocabulary(head: nn.Module, hidden: torch.Tensor) -> int:
    """Return V. If the head has no ``out_features``, call it on zero tokens."""
    size = getattr(head, "out_features", None)
    if isinstance(size, int):
        return size
    with torch.no_grad():
        return head(hidden[:0]).shape[-1]


def _chunks(size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield views of ``size`` rows of each tensor; one empty view if there are no rows."""
    return zip(*(x.split(size) for x in tensors), strict=True)
