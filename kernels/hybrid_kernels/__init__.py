"""Linear recurrences for language models: three ops, several backends, one definition each."""

from hybrid_kernels.api import causal_conv1d, linear_attention, selective_scan
from hybrid_kernels.backends import available_backends

__all__ = ["available_backends", "causal_conv1d", "linear_attention", "selective_scan"]
