"""The ``triton`` backend: chunked kernels for CUDA and ROCm. Unmeasured on a GPU as of now.

Which kernel computes what (one kernel serves all forms; parts that a form does not need are not
compiled)::

    form of linear_attention          forward                         backward adds
    --------------------------------  ------------------------------  -----------------------------
    additive: no decay, per head,     fused_chunks.py fused_chunk_    states.py  states_backward
      scalar per token                  forward, or                   outputs.py values_backward
                                      states.py  states_forward and   pairs.py   pairs_backward
                                      outputs.py outputs_forward      keys.py    keys_backward
    additive, decay over keys         + pairs.py pairs                as above
    additive, decay over values       states.py  states_forward       states.py  states_backward
      or over both (DFW)              outputs.py outputs_forward      pairs.py   pairs
                                      (+ pairs.py pairs)              keys.py    keys_backward, for
                                                                        keys and again for values
    delta rule, any of these decays   + pairs.py pairs, with the      as above
                                        inverse of delta.py
    read with a bonus (RWKV-6)        the additive form with q shifted by one token (linear.py)
    one token, any of these           decode.py  decode               -
    erase keys apart from writing     none; the ``torch`` backend is chosen

    causal_conv1d                     convolution.py convolution      ... convolution (BACKWARD),
                                                                          convolution_inputs
    selective_scan                    scan.py    scan_forward         scan.py    scan_backward

The forward pass is one walk where sequences times heads are many (``launch.walks``), else two
kernels of which the second is parallel over time. The backward pass makes states again.

``linear.py`` has the order of the kernels, ``forward.py`` and ``backward.py`` each launch,
``inputs.py`` the arguments of all launches, ``launch.py`` the block sizes, ``blocks.py`` device
functions that kernels share. Nothing here imports triton until an op runs.

No atomics are used: the same inputs give the same bits, run after run on one device. The host
never waits for the device, so that calls can be captured in a CUDA graph, if ``cu_seqlens`` lie on
the device. Another sequence length compiles nothing; another number of heads does, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.arguments import Arguments, CausalConv1d, LinearAttention, SelectiveScan

MAX_CHUNK = 64
MAX_WIDTH = 16  # taps of causal_conv1d; its loop over them is unrolled


def linear_attention(arguments: LinearAttention) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.linear_attention``."""
    from hybrid_kernels.triton.linear import linear_attention as run

    return run(arguments)


def causal_conv1d(arguments: CausalConv1d) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.causal_conv1d``."""
    from hybrid_kernels.triton.convolution import causal_conv1d as run

    return run(arguments)


def selective_scan(arguments: SelectiveScan) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.selective_scan``."""
    from hybrid_kernels.triton.scan import selective_scan as run

    return run(arguments)


def unsupported(arguments: Arguments) -> str | None:
    """Return why these inputs cannot be taken, or None."""
    if any(x.dtype == torch.float64 for x in arguments.floating().values()):
        return "it computes in float32, not in float64"
    if isinstance(arguments, LinearAttention):
        if arguments.erase_key is not None:
            return "it has no kernel for erase_key and erase_query"
        chunk = arguments.chunk_size
        if chunk is not None and chunk > MAX_CHUNK:
            return f"its chunk_size is at most {MAX_CHUNK}, got {chunk}"
    if isinstance(arguments, CausalConv1d) and arguments.weight.shape[1] > MAX_WIDTH:
        return f"its filters have at most {MAX_WIDTH} taps, got {arguments.weight.shape[1]}"
    return None
