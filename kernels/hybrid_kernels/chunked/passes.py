"""Both passes over all segments, which share their scratch memory.

A segment is recomputed in the backward pass, but for what the forward pass keeps (``kept.py``); its
output is held on to as well where that spares products (``linear.py``).

Legend: as in ``segment.py``.
"""

from __future__ import annotations

from torch import Tensor

from hybrid_kernels.chunked.delta import DeltaPass, DeltaRun
from hybrid_kernels.chunked.gradient import Gradients, Pass
from hybrid_kernels.chunked.kept import Kept
from hybrid_kernels.chunked.layout import Carried
from hybrid_kernels.chunked.memory import Scratch
from hybrid_kernels.chunked.segment import Problem, Run


def forward(p: Problem, state: Tensor, o: Tensor, kept: Kept | None) -> None:
    """Fill ``o`` chunk by chunk.

    Args:
        p: the inputs.
        state: (N G, K, r V) initial states in the layout's order; becomes the final ones.
        o: chunks of the output, (leading, sequences, G, C, r, V).
        kept: to be filled for a backward pass, or None.
    """
    form = Run if p.beta is None else DeltaRun
    run = form(p, Scratch(p.dtype, state.device), kept)
    carried = Carried(state, p.layout)
    for segment in p.layout.segments:
        run.begin(segment)
        run.pass_states(carried)
        run.store_output(o[segment.lead])
    carried.finish()


def backward(
    p: Problem, kept: Kept, o: Tensor | None, do: Tensor, dstate: Tensor, grads: Gradients
) -> None:
    """Fill the gradients of all inputs.

    Args:
        p: the inputs.
        kept: what ``forward`` kept.
        o: chunks of the output, (leading, sequences, G, C, r, V), or None.
        do: chunks of the output's gradient.
        dstate: gradient of the final states; becomes that of the initial ones.
        grads: chunks to fill.
    """
    scratch = Scratch(p.dtype, dstate.device)
    if p.beta is None:
        step = Pass(Run(p, scratch, kept), grads)
    else:
        step = DeltaPass(DeltaRun(p, scratch, kept), grads)
    run, carried = step.run, Carried(dstate, p.layout)
    for segment in reversed(p.layout.segments):
        run.begin(segment)
        run.recall()
        step.begin(None if o is None else o[segment.lead], do[segment.lead])
        step.pass_states(carried)
        step.pass_pairs()
        step.store_rows()
        step.store_decays()
    carried.finish()
