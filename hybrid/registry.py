"""Public names of the registries of mixers and feed-forwards."""

from hybrid.config.registry import feed_forwards, mixers

__all__ = ["feed_forwards", "mixers"]
