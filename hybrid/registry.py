"""The registries of mixers and feed-forwards, under their public name."""

from hybrid.config.registry import feed_forwards, mixers

__all__ = ["feed_forwards", "mixers"]
