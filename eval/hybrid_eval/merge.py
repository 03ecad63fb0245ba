"""Join the results of several runs, for one report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .runner import RESULT_VERSION

Record = dict[str, Any]


def read_results(path: str | Path) -> Record:
    """Read the results of a run from its folder or its results.json.

    Raises:
        ValueError: none there, damaged, or of another version; the message names the file.
    """
    file = Path(path).expanduser()
    file = file / "results.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"{file}: no results of `hybrid eval` there")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        models = found["models"]
        whole = bool(models) and all({"name", "results"} <= set(model) for model in models)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: damaged results ({type(error).__name__}: {error})") from error
    if not whole:
        raise ValueError(f"{file}: no models with results in it")
    if found.get("schema") != RESULT_VERSION:
        raise ValueError(
            f"{file}: results of schema {found.get('schema')!r}, this version reads "
            f"{RESULT_VERSION}; measure again"
        )
    return found


def _same_model(a: Record, b: Record) -> bool:
    return all(a.get(key) == b.get(key) for key in ("fingerprint", "dtype", "ablate"))


def _join(kept: Record, other: Record, source: str) -> None:
    """Add the tasks of a model to those it has.

    Raises:
        ValueError: another figure for a task that is there already.
    """
    for task, result in other["results"].items():
        there = kept["results"].setdefault(task, result)
        # times are not part of a figure
        mine, theirs = ({**r, "seconds": None} for r in (there, result))
        if mine != theirs:
            raise ValueError(
                f"{source}: {task} of {kept['name']} was measured differently in a run before it; "
                "leave one of the two out"
            )


def merge(paths: Sequence[str | Path]) -> Record:
    """Join the results of several runs.

    A model that several runs measured is one, by the hash of its weights, config and code; it has
    the tasks of all of them. Two different models of one name get the names of their runs.

    Raises:
        ValueError: as :func:``read_results``; runs with different seeds, or different figures for
            one task of one model.
    """
    runs = [(str(path), read_results(path)) for path in paths]
    first = runs[0][1]
    models: list[Record] = []
    for source, run in runs:
        if run["settings"].get("seed") != first["settings"].get("seed"):
            raise ValueError(
                f"{source}: seed {run['settings'].get('seed')}, but {runs[0][0]} has "
                f"{first['settings'].get('seed')}; their samples are not the same"
            )
        for model in run["models"]:
            known = [m for m in models if m.get("fingerprint") and _same_model(m, model)]
            if known:
                _join(known[0], model, source)
                continue
            names = {m["name"] for m in models}
            if model["name"] in names:
                model = {**model, "name": f"{model['name']} ({Path(source).name})"}
            if model["name"] in names:
                raise ValueError(f"{source}: two models are called {model['name']!r}; rename one")
            models.append({**model, "results": dict(model["results"])})
    entries = [{"path": source, "created": run["created"]} for source, run in runs]
    versions: dict[str, str] = {}
    for _, run in runs:
        for package, version in run["versions"].items():
            known_version = versions.setdefault(package, version)
            if version not in known_version.split(" and "):
                versions[package] = f"{known_version} and {version}"
    return {**first, "models": models, "merged": entries, "versions": versions}
