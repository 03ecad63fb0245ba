"""Feed-forwards: importing this package registers them all."""

from hybrid.ffn import dense, moe
from hybrid.ffn.base import FeedForward, FeedForwardOptions

__all__ = ["FeedForward", "FeedForwardOptions", "dense", "moe"]
