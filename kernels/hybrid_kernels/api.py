"""The public ops. Each checks its arguments once, then hands over to a backend.

Shapes: B batch, T time, H heads, K key dim, V value dim, D channels, N packed documents.
"""

from __future__ import annotations

from torch import Tensor

from hybrid_kernels.arguments import CausalConv1d, LinearAttention, SelectiveScan
from hybrid_kernels.backends import resolve


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: bool = False,
    backend: str | None = None,
    value_log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    chunk_size: int | None = None,
    overwrite_state: bool = False,
    write_scale: Tensor | None = None,
    erase_key: Tensor | None = None,
    erase_query: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run a linear recurrence over a matrix state and read it with queries.

    The state S (K x V, one per head) follows, with d_t = exp(log_decay_t)::

        S_t = d_t * S_{t-1} + w_t k_t v_t^T                                    beta is None
        S_t = d_t * S_{t-1} + beta_t k_t (v_t - k_t^T (d_t * S_{t-1}))^T       delta rule
        S_t = d_t * S_{t-1} + a_t (b_t^T (d_t * S_{t-1})) + k_t v_t^T          erase keys a, b
        o_t = scale * q_t^T S_t                                                bonus is None
        o_t = scale * q_t^T (S_{t-1} + w_t diag(bonus) k_t v_t^T)              RWKV-6's read

    Linear attention: arXiv 2006.16236, eq. 16-20; decay forms: arXiv 2312.06635, table 1; delta
    rule: arXiv 2406.06484, eq. 3, with decay arXiv 2412.06464, eq. 10, and arXiv 2510.26692,
    eq. 1; a transition that is diagonal plus low rank, with erase keys of its own: arXiv
    2503.14456, eq. 16; the read with a bonus: arXiv 2404.05892, eq. 16.

    Args:
        q: queries (B, T, H_q, K).
        k: keys (B, T, H_k, K). The delta rule expects L2-normalised keys; the op does not
            normalise them.
        v: values (B, T, H_v, V).
            H is the largest of H_q, H_k and H_v; the other two must divide it, and each of their
            heads then serves H / heads consecutive heads (as in grouped-query attention). All of
            ``log_decay``, ``beta``, ``bonus``, ``write_scale`` and the state have exactly H heads.
        log_decay: natural log of the decay, at most 0, -inf allowed: None for no decay, (H,) for
            one fixed per head, (B, T, H) for a scalar per token, (B, T, H, K) for a vector over
            keys.
        beta: (B, T, H) write strength, 0 to 2; turns the delta rule on.
        scale: factor on the output; default K ** -0.5.
        initial_state: (B, H, K, V), or (N, H, K, V) with ``cu_seqlens``; default zeros.
            Differentiable.
        cu_seqlens: (N+1,) int32 or int64 on any device, the offsets of N documents packed in a
            batch of one; the state restarts at each. Documents may be empty: their state passes
            through unchanged.
        output_final_state: return the state after the last token too.
        backend: name of a backend; None chooses the best one installed (logged once).
        value_log_decay: (B, T, H, V) natural-log decay over values (the outer-product decay of
            DFW, arXiv 2210.04243); additive form only.
        bonus: (H, K), turns on the exclusive read; additive form only.
        chunk_size: tokens per chunk, a power of two from 16; default: chosen. Never changes the
            result beyond rounding.
        overwrite_state: write the final state into ``initial_state`` and return that tensor,
            instead of allocating one at every token of a decode loop. Only without gradients.
        write_scale: (B, T, H) w, factor of each token's write (Mamba-2's step size, arXiv
            2405.21060, eq. 2); default 1. Equivalent to multiplying v, without a separate pass
            over the values. Additive form only.
        erase_key: (B, T, H, K) a, where what ``erase_query`` reads is added. The delta rule is the
            case a = -beta k, b = k with values beta v, and faster by ``beta``. Excludes ``beta``,
            ``bonus``, ``value_log_decay`` and ``write_scale``.
        erase_query: (B, T, H, K) b, what reads the decayed state; given with ``erase_key``.
            |a_t| |b_t| above 2 in the direction of each other makes the state grow.

    Returns:
        o (B, T, H, V) in v's dtype, and the final state in the form of ``initial_state`` (float32;
        float64 if q, k or v is), or None.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, the backend is unknown or
            cannot take this input, or ``overwrite_state`` meets no state or a gradient.
        ImportError: the named backend needs a package that is not installed.
    """
    arguments = LinearAttention(
        q,
        k,
        v,
        log_decay,
        value_log_decay,
        beta,
        bonus,
        write_scale,
        erase_key,
        erase_query,
        initial_state,
        cu_seqlens,
        _scale(scale, q),
        chunk_size,
    )
    o, final_state = resolve(arguments, backend, overwrite_state)(arguments)
    return o, final_state if output_final_state else None


def _scale(scale: float | None, q: Tensor) -> float:
    """Return the factor on the output; errors in q are left to the checks."""
    try:
        return q.shape[-1] ** -0.5 if scale is None else float(scale)
    except (AttributeError, IndexError, ZeroDivisionError):
        return 1.0
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"scale: expected a number or None, got {type(scale).__name__} {scale!r}"
        ) from error


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve every channel with its own short causal filter.

    ``y_t = activation(bias + sum_w weight[:, w] * x_{t - (W-1) + w})``, the short convolution of
    H3 and Mamba (arXiv 2312.00752, section 3.4): the last tap meets the present token.

    Args:
        x: (B, T, D).
        weight: (D, W).
        bias: (D,) or None.
        activation: None or "silu".
        initial_state: (B, D, W-1), or (N, D, W-1) with ``cu_seqlens``: the inputs before the
            first, oldest first; default zeros. Differentiable.
        cu_seqlens: (N+1,) int32 or int64 offsets of documents packed in a batch of one; none sees
            another's tokens. Documents may be empty.
        output_final_state: return the last W-1 inputs of each row or document too.
        backend: name of a backend; None chooses the best one installed (logged once).

    Returns:
        y (B, T, D) in x's dtype, and the final state in x's dtype and the form of
        ``initial_state``, or None.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend is unknown.
        ImportError: the named backend needs a package that is not installed.
    """
    arguments = CausalConv1d(x, weight, bias, initial_state, cu_seqlens, activation)
    y, final_state = resolve(arguments, backend)(arguments)
    return y, final_state if output_final_state else None


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: bool = False,
    backend: str | None = None,
    overwrite_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run the selective state-space scan of Mamba-1: a full decay matrix per step.

    With h (D x N) the state of one row (arXiv 2312.00752, eq. 2 and algorithm 2)::

        h_t = exp(delta_t A) * h_{t-1} + (delta_t u_t) B_t^T
        y_t = h_t C_t + D * u_t

    Args:
        u: (B, T, D) inputs.
        delta: (B, T, D) step sizes, at least 0 (apply softplus and bias before).
        A: (D, N) real, at most 0; -exp(A_log) in the usual parameterisation.
        B: (B, T, N) input projection.
        C: (B, T, N) output projection.
        D: (D,) skip connection, or None.
        initial_state: (B, D, N), or one row per document with ``cu_seqlens``; default zeros.
            Differentiable.
        cu_seqlens: int32 or int64 offsets of documents packed in a batch of one; the state
            restarts at each. Documents may be empty: their state passes through unchanged.
        output_final_state: return the state after the last token too.
        backend: name of a backend; None chooses the best one installed (logged once).
        overwrite_state: write the final state into ``initial_state`` and return that tensor. Only
            without gradients.

    Returns:
        y (B, T, D) in u's dtype, and the final state in the form of ``initial_state`` (float32;
        float64 if an input is), or None.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, the backend is unknown, or
            ``overwrite_state`` meets no state or a gradient.
        ImportError: the named backend needs a package that is not installed.
    """
    arguments = SelectiveScan(u, delta, A, B, C, D, initial_state, cu_seqlens)
    y, final_state = resolve(arguments, backend, overwrite_state)(arguments)
    return y, final_state if output_final_state else None
