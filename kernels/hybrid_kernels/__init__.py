"""Linear recurrences for language models: three ops, several backends, one definition each.

====================  ==========================================================================
op                    what it is
====================  ==========================================================================
`linear_attention`    a matrix state per head, additive or delta rule, every form of decay
`selective_scan`      Mamba-1: a full decay matrix per step
`causal_conv1d`       short depthwise convolution with state
====================  ==========================================================================

All take packed documents (``cu_seqlens``), take and return states, and are differentiable in every
floating input. ``backend=`` asks for an implementation by name: "reference" (the definition, a loop
over time), "torch" (chunked, any device), "triton" (GPU), or another package's kernels
(`hybrid_kernels.adapters`); None takes the best one present and logs which, once.

Promises, strongest first: no output and no gradient depends on a later token; the same
inputs on the same backend, device and thread count give the same bits; chunk size, splitting,
packing and the rest of the batch change results by rounding only; backends agree with the reference
in float64 to a relative RMS error of 1e-5 from float32 inputs and 5e-3 from half-precision ones
(`hybrid_kernels.testing`). Where a backend chooses its path from the data, as "torch" does from the
strength of the decays, a later token may change earlier outputs by rounding only. NaN and inf reach
the tokens and gradients that they reach in the reference, no others; "triton" keeps this for
outputs of the additive form, while in its delta rule and its gradients they may spread within a
chunk.

Autocast does not change what the ops compute. Every backend supports first derivatives by
``backward()``. Forward-mode AD, ``torch.func`` transforms and second derivatives are supported by
"reference" only; the other backends raise an error that says so.
"""

from hybrid_kernels.api import causal_conv1d, linear_attention, selective_scan
from hybrid_kernels.backends import available_backends
from hybrid_kernels.fused_qkv_grad import split

__all__ = ["available_backends", "causal_conv1d", "linear_attention", "selective_scan", "split"]
