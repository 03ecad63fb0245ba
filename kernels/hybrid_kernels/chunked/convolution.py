"""Short causal convolution: shifted multiply-adds over stretches of time that fit in a cache.

Legend: B batch, T time, D channels, W filter width, N packed documents.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hybrid_kernels.arguments import CausalConv1d, state_dtype
from hybrid_kernels.chunked.decode import causal_conv1d_step, is_single_step
from hybrid_kernels.packing import documents
from hybrid_kernels.transforms import first_derivatives_only, without_autocast

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
    if a.initial_state is None:
        past = x.new_zeros(x.shape[0], history, x.shape[2])
    else:
        past = a.initial_state.to(x.dtype).transpose(1, 2)
    y = torch.ops.hybrid_kernels.chunked_conv1d(x, past, a.weight, a.bias, a.activation or "")
    if x.shape[1] < history:
        x = torch.cat([past, x], dim=1)
    return y, x[:, x.shape[1] - history :].transpose(1, 2).contiguous()


def _packed(a: CausalConv1d, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Lay every document behind its own state in one longer row, and convolve that."""
    x, weight, initial_state = a.x, a.weight, a.initial_state
    history, rows, channels = weight.shape[1] - 1, cu_seqlens.shape[0] - 1, x.shape[2]
    tokens, before, after = _known_places(cu_seqlens, x.shape[1], history, x.device)
    row = x.new_zeros(1, x.shape[1] + rows * history, channels).index_copy(1, tokens, x)
    if initial_state is not None:
        past = initial_state.to(x.dtype).transpose(1, 2).reshape(1, -1, channels)
        row = row.index_copy(1, before, past)
    nothing = x.new_zeros(1, history, channels)
    y = torch.ops.hybrid_kernels.chunked_conv1d(row, nothing, weight, a.bias, a.activation or "")
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


@torch.library.custom_op("hybrid_kernels::chunked_conv1d", mutates_args=())
@without_autocast
def _forward(
    x: Tensor, past: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """Return the convolution of (B, T, D) ``x`` behind (B, W-1, D) ``past``."""
    taps = _taps(weight, x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start, stop in _stretches(x):
        z = _convolve(_window(x, past, start, stop), taps, bias)
        _activate(z, activation, y[:, start:stop])
    return y


@torch.library.custom_op("hybrid_kernels::chunked_conv1d_backward", mutates_args=())
@without_autocast
def _backward(
    x: Tensor, past: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dy: Tensor
) -> list[Tensor]:
    """Return the gradients of x, past, weight and, if there is one, bias."""
    grads = _gradients(x, past, weight, bias, activation, dy, careful=False)
    # The weight's gradient sums over all tokens, so it shows whether any number is not finite.
    if activation and not torch.isfinite(grads[2].sum()):
        return _gradients(x, past, weight, bias, activation, dy, careful=True)
    return grads


def _gradients(
    x: Tensor,
    past: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    dy: Tensor,
    careful: bool,
) -> list[Tensor]:
    """Do as ``_backward`` does.

    With ``careful``, the activation has no gradient where its input is not finite: 0 * NaN would
    reach the tokens before, and those of the document before.
    """
    taps = _taps(weight, x)
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
        if activation:
            z = _convolve(window, taps, bias)
            dz = torch.ops.aten.silu_backward(dz, z)
            if careful:
                dz.masked_fill_(~torch.isfinite(z), 0)
        for tap in range(len(taps)):
            dtaps[tap, :, :size].addcmul_(window[:, tap : tap + size], dz)
        if bias is not None:
            dbias += dz.sum((0, 1))
        ahead = torch.cat([dz, later], dim=1)
        dx[:, start:stop].copy_(_convolve(ahead, taps[::-1], None))
        later = ahead[:, :history]
    ahead = torch.cat([torch.zeros_like(later), later], dim=1)
    dpast = _convolve(ahead, taps[::-1], None).to(past.dtype)
    dweight = dtaps.sum((1, 2)).T.to(weight.dtype).contiguous()
    return [dx, dpast, dweight] + ([] if bias is None else [dbias.to(bias.dtype)])


def _taps(weight: Tensor, x: Tensor) -> list[Tensor]:
    """Return the filter's columns as rows over channels, oldest first."""
    return list(weight.to(state_dtype(x, weight)).T.contiguous())


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


def _activate(z: Tensor, activation: str, out: Tensor) -> None:
    if not activation:
        out.copy_(z)
    elif out.dtype == z.dtype:
        torch.ops.aten.silu.out(z, out=out)
    else:
        out.copy_(torch.nn.functional.silu(z, inplace=True))


@_forward.register_fake
def _(x, past, weight, bias, activation):
    return x.new_empty(x.shape)


@_backward.register_fake
def _(x, past, weight, bias, activation, dy):
    return [t.new_empty(t.shape) for t in (x, past, weight, bias) if t is not None]


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy):
    tensors = ctx.saved_tensors
    found = torch.ops.hybrid_kernels.chunked_conv1d_backward(*tensors, ctx.activation, dy)
    return (*found, *([None] * (5 - len(found))))


_forward.register_autograd(_differentiate, setup_context=_keep)
first_derivatives_only("causal_conv1d", _forward, _backward)
