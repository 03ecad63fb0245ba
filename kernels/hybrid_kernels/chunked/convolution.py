"""Short causal convolution: shifted multiply-adds over stretches of time that fit in a cache.

Shapes: B batch, T time, D channels, W filter width, N packed documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.arguments import CausalConv1d
from hybrid_kernels.chunked.decode import causal_conv1d_step, is_single_step
from hybrid_kernels.custom_ops import BackwardInputs, Wanted, custom_op
from hybrid_kernels.packing import documents

# Elements that one stretch of time holds over all rows and channels.
STRETCH_ELEMENTS = 1 << 16
STRETCH_STEPS = 16


def causal_conv1d(a: CausalConv1d) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.causal_conv1d`` stretch by stretch, on any device."""
    if is_single_step(a):
        return causal_conv1d_step(a)
    if a.cu_seqlens is not None:
        return _packed(a, a.cu_seqlens)
    x, history = a.x, a.weight.shape[1] - 1
    y = _convolution(a)
    if x.shape[1] < history:
        x = torch.cat([_past(a), x], dim=1)
    return y, x[:, x.shape[1] - history :].transpose(1, 2).contiguous()


def _packed(a: CausalConv1d, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Lay every document behind its own state in one longer row, and convolve that."""
    x, history, rows, channels = a.x, a.weight.shape[1] - 1, a.rows, a.x.shape[2]
    tokens, before, after = _known_places(cu_seqlens, x.shape[1], history, x.device)
    row = x.new_zeros(1, x.shape[1] + rows * history, channels).index_copy(1, tokens, x)
    if a.initial_state is not None:
        past = _past(a).reshape(1, -1, channels)
        row = row.index_copy(1, before, past)
    y = _convolution(a.replace(x=row, initial_state=None, cu_seqlens=None))
    final = row[0].index_select(0, after).view(rows, history, channels)
    return y.index_select(1, tokens), final.transpose(1, 2).contiguous()


def _known_places(
    cu_seqlens: Tensor, time: int, history: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places, made once for all layers.

    Not where they are made by an op: a compiler may write over what an op returns.
    """
    arguments = (cu_seqlens, time, history, device)
    traced = torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor
    if traced or cu_seqlens.is_meta:
        return torch.ops.hybrid_kernels.conv1d_places(*arguments)
    return documents(cu_seqlens, time).plan(
        ("conv1d", history, device), lambda: _find_places(*arguments)
    )


@torch.library.custom_op("hybrid_kernels::conv1d_places", mutates_args=())
def _places(
    cu_seqlens: Tensor, time: int, history: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    return _find_places(cu_seqlens, time, history, device)


def _find_places(
    cu_seqlens: Tensor, time: int, history: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return where in the longer row the tokens, the initial and the final states lie."""
    lengths = torch.tensor(documents(cu_seqlens, time).lengths, device=device)
    shift = history * torch.arange(1, lengths.shape[0] + 1, device=device)
    tokens = torch.arange(time, device=device) + shift.repeat_interleave(lengths)
    ends = lengths.cumsum(0) + shift
    recent = torch.arange(-history, 0, device=device)
    before = (ends - lengths)[:, None] + recent
    return tokens, before.flatten(), (ends[:, None] + recent).flatten()


@_places.register_fake
def _(cu_seqlens, time, history, device):
    count = (cu_seqlens.shape[0] - 1) * history
    sizes = (time, count, count)
    return tuple(torch.empty(size, dtype=torch.int64, device=device) for size in sizes)


def _forward(a: CausalConv1d, wanted: Wanted) -> Tensor:
    """Return the convolution of x behind the inputs before it."""
    x, past, taps = a.x, _past(a), _taps(a)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start, stop in _stretches(x):
        z = _convolve(_window(x, past, start, stop), taps, a.bias)
        _activate(z, a.activation, y[:, start:stop])
    return y


def _backward(a: CausalConv1d, given: BackwardInputs) -> tuple:
    """Return ``CausalConv1d.Gradients``."""
    grads = _gradients(a, given.grad_output, careful=False)
    # The weight's gradient sums over all tokens, so it shows whether any number is not finite.
    if a.activation and not torch.isfinite(grads.weight.sum()):
        return _gradients(a, given.grad_output, careful=True)
    return grads


def _gradients(a: CausalConv1d, dy: Tensor, careful: bool) -> Any:
    """Return ``CausalConv1d.Gradients``.

    With ``careful``, the activation has no gradient where its input is not finite: 0 * NaN would
    reach the tokens before, and those of the document before.
    """
    x, past, taps = a.x, _past(a), _taps(a)
    history = len(taps) - 1
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    stretches = list(_stretches(x))
    longest = max((stop - start for start, stop in stretches), default=0)
    # Products with each shifted input, added up stretch on stretch and over time only at the end.
    dtaps = taps[0].new_zeros(len(taps), x.shape[0], longest, x.shape[2])
    dbias = taps[0].new_zeros(x.shape[2])
    later = taps[0].new_zeros(x.shape[0], history, x.shape[2])
    for start, stop in reversed(stretches):
        size = stop - start
        window = _window(x, past, start, stop).to(taps[0].dtype)
        dz = dy[:, start:stop].to(taps[0].dtype)
        if a.activation:
            z = _convolve(window, taps, a.bias)
            dz = torch.ops.aten.silu_backward(dz, z)
            if careful:
                dz.masked_fill_(~torch.isfinite(z), 0)
        for tap in range(len(taps)):
            dtaps[tap, :, :size].addcmul_(window[:, tap : tap + size], dz)
        if a.bias is not None:
            dbias += dz.sum((0, 1))
        ahead = torch.cat([dz, later], dim=1)
        dx[:, start:stop].copy_(_convolve(ahead, taps[::-1], None))
        later = ahead[:, :history]
    dweight = dtaps.sum((1, 2)).T.to(a.weight.dtype).contiguous()
    dstate = None
    if a.initial_state is not None:
        ahead = torch.cat([torch.zeros_like(later), later], dim=1)
        dpast = _convolve(ahead, taps[::-1], None).transpose(1, 2)
        dstate = dpast.to(a.initial_state.dtype).contiguous()
    dbias = None if a.bias is None else dbias.to(a.bias.dtype)
    return CausalConv1d.Gradients(x=dx, weight=dweight, bias=dbias, initial_state=dstate)


def _past(a: CausalConv1d) -> Tensor:
    """Return the inputs before the first, (B, W-1, D)."""
    if a.initial_state is None:
        return a.x.new_zeros(a.x.shape[0], a.weight.shape[1] - 1, a.x.shape[2])
    return a.initial_state.to(a.x.dtype).transpose(1, 2)


def _taps(a: CausalConv1d) -> list[Tensor]:
    """Return the filter's columns as rows over channels, oldest first."""
    return list(a.weight.to(a.dtype).T.contiguous())


def _stretches(x: Tensor) -> Iterator[tuple[int, int]]:
    size = max(STRETCH_STEPS, STRETCH_ELEMENTS // max(1, x.shape[0] * x.shape[2]))
    for start in range(0, x.shape[1], size):
        yield start, min(start + size, x.shape[1])


def _window(x: Tensor, past: Tensor, start: int, stop: int) -> Tensor:
    """Return the inputs of a stretch and the W-1 before it."""
    history = past.shape[1]
    if start >= history:
        return x[:, start - history : stop]
    return torch.cat([past[:, start:], x[:, :stop]], dim=1)


def _convolve(window: Tensor, taps: list[Tensor], bias: Tensor | None) -> Tensor:
    """Return bias + sum of taps times shifted inputs, W-1 rows fewer than ``window``."""
    size = window.shape[1] - len(taps) + 1
    first = window[:, :size]
    if bias is None:
        z = first * taps[0]
    else:
        z = torch.addcmul(bias.to(taps[0].dtype), first.to(taps[0].dtype), taps[0])
    for tap in range(1, len(taps)):
        z.addcmul_(window[:, tap : tap + size], taps[tap])
    return z


def _activate(z: Tensor, activation: str | None, out: Tensor) -> None:
    if activation is None:
        out.copy_(z)
    elif out.dtype == z.dtype:
        torch.ops.aten.silu.out(z, out=out)
    else:
        out.copy_(torch.nn.functional.silu(z, inplace=True))


def _fake(a: CausalConv1d, wanted: Wanted) -> Tensor:
    return a.x.new_empty(a.x.shape)


_convolution = custom_op(
    "chunked_conv1d", CausalConv1d, _forward, _backward, _fake, results="Tensor"
)
