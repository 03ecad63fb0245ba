"""Feed-forwards.

Each module is imported on first use of its feed-forward or of one of its names.
"""

import lazy_loader

from hybrid.config.registry import feed_forwards

feed_forwards.declare(
    __name__,
    {
        "dense": ("-", "Dense"),
        "mixture_of_experts": ("E", "moe:MixtureOfExperts"),
    },
)

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
