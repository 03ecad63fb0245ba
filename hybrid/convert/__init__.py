"""Published checkpoints into layouts: one file per family, one engine for all."""

from hybrid.convert import llama
from hybrid.convert.engine import Family, families, from_published

__all__ = ["Family", "families", "from_published", "llama"]
