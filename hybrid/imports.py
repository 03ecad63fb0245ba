"""`--import FILE`: a user's own code, mixers above all, in the commands of this package.

A mixer registers when its file is imported, which somebody has to do in every process that builds the
model. In a script of one's own that is an `import`; for the commands it is this option. It is one of the
command line alone: a key of a config would let a checkpoint run code of its choosing.
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

HELP = "a Python file or module of yours to import first, e.g. with a mixer in it; may be repeated"

_imported: list[str] = []


def add_option(parser: argparse.ArgumentParser) -> None:
    """The option, as `imports`, a list."""
    parser.add_argument("--import", dest="imports", action="append", default=[],
                        metavar="FILE", help=HELP)  # fmt: skip


def import_user_code(names: Sequence[str]) -> None:
    """Import files (`folder/my_mixer.py`) and modules (`my_package.mixers`), in order.

    A module is looked for in the working directory, too. A file's folder stays on the import path, so
    that the files beside it can be imported.

    Raises:
        ConfigError: there is no such file or module, another module has the name of the file, or the
            file raises an error.
    """
    for name in names:
        path = Path(name)
        if path.suffix == ".py":
            _import_file(path.resolve())
        else:
            _import_module(name)
        _imported.append(str(path.resolve()) if path.suffix == ".py" else name)


def import_arguments() -> list[str]:
    """What another process is to be started with, so that it imports what this one has."""
    return [word for name in dict.fromkeys(_imported) for word in ("--import", name)]


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError([f"no such file: {path}"], "--import")
    _add_to_path(path.parent)
    spec = importlib.util.find_spec(path.stem)
    found = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
    if found != path:
        raise ConfigError(
            [f"{path.name}: the module {path.stem!r} is another, {found}; rename the file"],
            "--import",
        )
    try:
        importlib.import_module(path.stem)
    except Exception as error:
        raise ConfigError([_mistake(error, path)], "--import") from error


def _mistake(error: Exception, path: Path) -> str:
    """An error of a user's file in one line, with the line of the file that led to it."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    place = f"line {lines[-1]}: " if lines else ""
    # as Python prints it; only its last line says what is wrong
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
            [f"no module {error.name!r}, installed or in {Path.cwd()}; a file ends in .py"],
            "--import",
        ) from error
    except Exception as error:
        raise ConfigError([_mistake(error, _source_of(name))], "--import") from error


def _source_of(name: str) -> Path:
    """The file of a module that is there, or its name where it has none."""
    spec = importlib.util.find_spec(name)
    return Path(name if spec is None or spec.origin is None else spec.origin)


def _add_to_path(folder: Path) -> None:
    """Last, so that no file of the folder takes the place of a library's module."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
