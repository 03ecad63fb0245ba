"""Both passes over all segments, which share their scratch memory.

A segment is recomputed in the backward pass from the state before it, the only thing that the
forward pass keeps; its output is held on to as well where that spares products (``linear.py``).

Legend: as in ``segment.py``.
"""

from __future__ import annotations

from torch import Tensor

from hybrid_kernels.chunked.delta import DeltaPass, DeltaRun
from hybrid_kernels.chunked.gradient import Gradients, Pass
from hybrid_kernels.chunked.memory import Scratch
from hybrid_kernels.chunked.segment import Problem, Run


def forward(p: Problem, state: Tensor, o: Tensor) -> Tensor:
    """Fill ``o`` chunk by chunk.

    Args:
        p: the inputs.
        state: (N G, K, r V) initial states in the layout's order; becomes the final ones.
        o: chunks of the output, (leading, sequences, G, C, r, V).

    Returns:
        The states before each segment, one after the other.
    """
    form = Run if p.beta is None else DeltaRun
    segments, scratch = p.layout.segments(), Scratch(p.dtype, state.device)
    rows = [segment.width * p.heads for segment in segments]
    saved = state.new_empty(sum(rows), *state.shape[1:])
    run = form(p, scratch)
    for segment, start in zip(segments, saved.split(rows), strict=True):
        start.copy_(state[: start.shape[0]])
        run.begin(segment)
        run.pass_states(state)
        run.store_output(o[segment.lead])
    return saved


def backward(
    p: Problem, saved: Tensor, o: Tensor | None, do: Tensor, dstate: Tensor, grads: Gradients
) -> None:
    """Fill the gradients of all inputs.

    Args:
        p: the inputs.
        saved: what ``forward`` returned.
        o: chunks of the output, (leading, sequences, G, C, r, V), or None.
        do: chunks of the output's gradient.
        dstate: gradient of the final states; becomes that of the initial ones.
        grads: chunks to fill.
    """
    end = saved.shape[0]
    wanted = grads.key_decay is not None or grads.value_decay is not None
    scratch = Scratch(p.dtype, saved.device)
    step = (
        Pass(Run(p, scratch), wanted) if p.beta is None else DeltaPass(DeltaRun(p, scratch), wanted)
    )
    run = step.run
    for segment in reversed(p.layout.segments()):
        rows = segment.width * p.heads
        run.begin(segment)
        run.pass_states(saved[end - rows : end].clone())
        step.begin(None if o is None else o[segment.lead], do[segment.lead])
        step.pass_states(dstate)
        step.pass_pairs()
        step.store_rows(grads)
        step.store_decays(grads)
        end -= rows
