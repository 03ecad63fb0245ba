"""Both passes over all segments, which share their scratch memory.

A segment is recomputed in the backward pass, but for what the forward pass keeps (``saved.py``); its
output is held on to as well where that spares products (``linear.py``).

Legend: as in ``additive.py``.
"""

from __future__ import annotations

from torch import Tensor

from hybrid_kernels.chunked.additive import InputChunks, Run
from hybrid_kernels.chunked.chunk_plan import StateCarry
from hybrid_kernels.chunked.delta import DeltaPass, DeltaRun
from hybrid_kernels.chunked.gradient import Gradients, Pass
from hybrid_kernels.chunked.memory import Scratch
from hybrid_kernels.chunked.saved import Saved


def forward(p: InputChunks, state: Tensor, o: Tensor, saved: Saved | None) -> None:
    """Fill ``o`` chunk by chunk.

    Args:
        p: the inputs.
        state: (N G, K, r V) initial states in the plan's order; becomes the final ones.
        o: chunks of the output, (leading, sequences, G, C, r, V).
        saved: to be filled for a backward pass, or None.
    """
    form = Run if p.beta is None else DeltaRun
    run = form(p, Scratch(p.dtype, state.device), saved)
    carried = StateCarry(state, p.plan)
    for segment in p.plan.segments:
        run.begin(segment)
        run.pass_states(carried)
        run.store_output(o[segment.lead])
    carried.finish()


def backward(
    p: InputChunks, saved: Saved, o: Tensor | None, do: Tensor, dstate: Tensor, grads: Gradients
) -> None:
    """Fill the gradients of all inputs.

    Args:
        p: the inputs.
        saved: what ``forward`` saved.
        o: chunks of the output, (leading, sequences, G, C, r, V), or None.
        do: chunks of the output's gradient.
        dstate: gradient of the final states; becomes that of the initial ones.
        grads: chunks to fill.
    """
    scratch = Scratch(p.dtype, dstate.device)
    if p.beta is None:
        step = Pass(Run(p, scratch, saved), grads)
    else:
        step = DeltaPass(DeltaRun(p, scratch, saved), grads)
    run, carried = step.run, StateCarry(dstate, p.plan)
    for segment in reversed(p.plan.segments):
        run.begin(segment)
        run.recall()
        step.begin(None if o is None else o[segment.lead], do[segment.lead])
        step.pass_states(carried)
        step.pass_pairs()
        step.store_rows()
        step.store_decays()
    carried.finish()
