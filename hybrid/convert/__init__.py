"""Import and export of published checkpoints: one file per family, one engine for all."""

from hybrid.convert import families as _families  # noqa: F401  (registers them)
from hybrid.convert.engine import export, from_published, import_published
from hybrid.convert.family import FAMILIES, Family, get_family, register_family
from hybrid.convert.family_choice import fitting
from hybrid.convert.llama_cpp import export_gguf
from hybrid.modeling.converters import Converter, register_converter

__all__ = [
    "FAMILIES",
    "Family",
    "export",
    "export_gguf",
    "fitting",
    "from_published",
    "get_family",
    "import_published",
    "register_family",
]

register_converter(Converter(read=from_published, write=export))
