"""The ``torch`` backend: chunked PyTorch for any device, the default on a CPU."""

from hybrid_kernels.chunked.convolution import causal_conv1d
from hybrid_kernels.chunked.decode import prepare
from hybrid_kernels.chunked.linear import linear_attention
from hybrid_kernels.chunked.scan import selective_scan

__all__ = ["causal_conv1d", "linear_attention", "prepare", "selective_scan"]
