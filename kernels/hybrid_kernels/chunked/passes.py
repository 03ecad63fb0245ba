"""Both passes over all spans, which share their scratch memory.

The backward pass computes a span again, but for what the forward pass saved (``saved.py``).

Shapes: as in ``additive.py``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hybrid_kernels.chunked.additive import additive_forward
from hybrid_kernels.chunked.additive_backward import additive_backward
from hybrid_kernels.chunked.delta import delta_forward
from hybrid_kernels.chunked.delta_backward import delta_backward
from hybrid_kernels.chunked.dplr import dplr_forward
from hybrid_kernels.chunked.dplr_backward import dplr_backward
from hybrid_kernels.chunked.gradients import ChunkGradients
from hybrid_kernels.chunked.inputs import InputChunks
from hybrid_kernels.chunked.memory import Scratch
from hybrid_kernels.chunked.saved import Saved
from hybrid_kernels.chunked.state_walk import StateCarry


def forward_pass(x: InputChunks, state: Tensor, out: Tensor, saved: Saved | None) -> None:
    """Compute the output and the final states.

    Args:
        x: the inputs.
        state: (N G, K, r V) initial states in the plan's order; becomes the final ones.
        out: (leading, sequences, G, C, r, V) the output, to be filled.
        saved: to be filled for the backward pass, or None.
    """
    forward = _form(x, additive_forward, delta_forward, dplr_forward)
    work, carry = Scratch(x.dtype, state.device), StateCarry(state, x.plan)
    for span in x.plan.spans:
        forward(x, span, carry, saved, work, out[span.lead])
    carry.finish()


def backward_pass(
    x: InputChunks,
    saved: Saved,
    output: Tensor | None,
    grad_output: Tensor,
    grad_state: Tensor,
    grads: ChunkGradients,
) -> None:
    """Compute the gradients of all inputs.

    Args:
        x: the inputs.
        saved: what ``forward_pass`` saved.
        output: (leading, sequences, G, C, r, V), or None.
        grad_output: its gradient, of the same shape.
        grad_state: gradient of the final states; becomes that of the initial ones.
        grads: to be filled.
    """
    backward = _form(x, additive_backward, delta_backward, dplr_backward)
    work, carry = Scratch(x.dtype, grad_state.device), StateCarry(grad_state, x.plan)
    for span in reversed(x.plan.spans):
        lead = span.lead
        o = None if output is None else output[lead]
        backward(x, span, carry, saved, work, o, grad_output[lead], grads.span(lead))
    carry.finish()


def _form(x: InputChunks, additive: Callable, delta: Callable, dplr: Callable) -> Callable:
    """Return the function for the form of these inputs."""
    if x.erase_key is not None:
        return dplr
    return additive if x.beta is None else delta
