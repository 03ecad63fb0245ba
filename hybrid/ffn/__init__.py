"""Feed-forwards. A module is imported when its feed-forward, or a name of it, is first used."""

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
