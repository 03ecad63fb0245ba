"""``--import FILE``: import user code, such as mixers, in the commands of this package.

A mixer is registered when its file is imported, in every process that builds the model. Scripts
import the file; commands have this option. It exists only on the command line: as a key of a config
it would let a checkpoint run arbitrary code.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from hybrid.config.options import ConfigError

HELP = "a Python file or module to import first, e.g. one that defines a mixer; may be repeated"

_imported: list[str] = []


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add the option; its value is the list ``imports``."""
    parser.add_argument("--import", dest="imports", action="append", default=[],
                        metavar="FILE", help=HELP)  # fmt: skip


def import_user_code(names: Sequence[str]) -> None:
    """Import files (``folder/my_mixer.py``) and modules (``my_package.mixers``), in order.

    Modules are also searched in the working directory. The folder of a file stays on the import
    path, so that other files in it can be imported.

    Raises:
        ConfigError: the file or module does not exist, another module has the name of the file, or
            the file raises an error.
    """
    for name in names:
        path = Path(name)
        if path.suffix == ".py":
            _import_file(path.resolve())
        else:
            _import_module(name)
        _imported.append(str(path.resolve()) if path.suffix == ".py" else name)


def import_arguments() -> list[str]:
    """Return the arguments with which another process imports the same files."""
    return [word for name in dict.fromkeys(_imported) for word in ("--import", name)]


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError([f"expected an existing file, got {path}"], "--import")
    _add_to_path(path.parent)
    spec = importlib.util.find_spec(path.stem)
    found = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
    if found != path:
        raise ConfigError(
            [
                f"{path.name}: expected a new module name, got {path.stem!r} of {found}; rename the file"
            ],
            "--import",
        )
    try:
        importlib.import_module(path.stem)
    except Exception as error:
        raise ConfigError([_mistake(error, path)], "--import") from error


def _mistake(error: Exception, path: Path) -> str:
    """Format an error of a user's file in one line, with the line number in the file."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    place = f"line {lines[-1]}: " if lines else ""
    # the last line of Python's message has the reason
    reason = traceback.format_exception_only(error)[-1].strip()
    return f"{path}: {place}{reason}"


def _import_module(name: str) -> None:
    _add_to_path(Path.cwd())
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ConfigError([_mistake(error, _source_of(name))], "--import") from error
        raise ConfigError(
            [
                f"expected a module, installed or in {Path.cwd()}, got {error.name!r}; files end in .py"
            ],
            "--import",
        ) from error
    except Exception as error:
        raise ConfigError([_mistake(error, _source_of(name))], "--import") from error


def _source_of(name: str) -> Path:
    """Return the file of an existing module, or its name if it has no file."""
    spec = importlib.util.find_spec(name)
    return Path(name if spec is None or spec.origin is None else spec.origin)


def _add_to_path(folder: Path) -> None:
    """Append a folder to the import path, so that its files do not shadow modules of libraries."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
