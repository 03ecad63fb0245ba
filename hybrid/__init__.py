"""Hybrid language models: softmax attention, linear attention and state-space layers in one stack.

Importing this package makes its model type known to transformers' Auto classes. It imports neither
torch nor transformers: names are imported from their modules when they are first used (PEP 562);
`__init__.pyi` lists them.
"""

import pkgutil
from typing import Any

import lazy_loader
from wrapt import register_post_import_hook

__version__ = "0.1.0"

__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
_modules = {module.name for module in pkgutil.iter_modules(__path__)}
__all__ = [name for name in _names if name not in _modules]  # pyright: ignore[reportUnsupportedDunderAll]


def _register_config(configuration_auto: Any) -> None:
    """Register the config with `AutoConfig`; when one is made, it registers the model classes."""
    from hybrid.config.hybrid_config import HybridConfig

    configuration_auto.AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)


# as soon as transformers' module is imported, or now if it is already
register_post_import_hook(_register_config, "transformers.models.auto.configuration_auto")
