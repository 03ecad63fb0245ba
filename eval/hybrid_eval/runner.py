"""Run tasks on models, keep each result on disk, resume where a run was cut off."""

import hashlib
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from .ablate import ablated, select
from .catalogue import default_tasks
from .lm_harness import resolve
from .models import Subject, load
from .registry import Settings, Task, check_options, find

# a cached result of another version is not reused
RESULT_VERSION = 2


class Watcher(Protocol):
    """Is told how far a run is."""

    def start(self, model: str, task: str) -> None:
        """Called before a task runs on a model."""

    def advance(self, done: int, total: int) -> None:
        """Called while it runs."""

    def finish(self, model: str, task: str, *, cached: bool) -> None:
        """Called when its result is there."""


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "lm_eval", "hybrid-language-models"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _setting_words(settings: Settings) -> dict[str, Any]:
    words = asdict(replace(settings, corpus=None))
    words["corpus"] = None
    if settings.corpus is not None:
        text = settings.corpus.text.encode("utf-8")
        words["corpus"] = f"{settings.corpus.description} {hashlib.sha256(text).hexdigest()[:16]}"
    # how many rows go through the model at once does not belong to the result
    words.pop("batch_size")
    return words


def _cache_path(out: Path, subject: Subject, task: Task, words: dict[str, Any]) -> Path:
    tokenizer = getattr(subject.tokenizer, "name_or_path", None)
    key = json.dumps([RESULT_VERSION, task.name, words, tokenizer], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in subject.name)
    return out / "cache" / f"{safe}-{subject.fingerprint}" / f"{task.name}-{digest}.json"


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # written aside and moved: a run that is cut off leaves no half result
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def _run_task(
    subject: Subject,
    task: Task,
    settings: Settings,
    options: dict[str, Any],
    out: Path | None,
    watcher: Watcher | None,
    knocked_out: str | None,
) -> dict[str, Any]:
    words: dict[str, Any] = {"settings": _setting_words(settings), "options": options}
    if knocked_out is not None:
        words["ablate"] = knocked_out
    path = None if out is None else _cache_path(out, subject, task, words)
    if watcher is not None:
        watcher.start(subject.name, task.name)
    cached = path is not None and path.is_file()
    if path is not None and cached:
        result = json.loads(path.read_text(encoding="utf-8"))
    else:
        began = time.perf_counter()
        advance = None if watcher is None else watcher.advance
        with ablated(subject.model, knocked_out):
            result = task.run(subject, settings, options, advance)
        result["seconds"] = time.perf_counter() - began
        result = {"task": task.name, "axis": task.axis, "metric": task.metric, **result}
        result = plain({**result, "options": options})
        if path is not None:
            _write_json(path, result)
    if watcher is not None:
        watcher.finish(subject.name, task.name, cached=cached)
    return result


def _describe(subject: Subject) -> dict[str, Any]:
    config = subject.model.config
    return {
        "name": subject.name,
        "source": subject.source,
        "fingerprint": subject.fingerprint,
        "model_type": getattr(config, "model_type", None),
        "layout": subject.layout,
        "layer_types": list(getattr(config, "layer_types", None) or []),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "tokenizer": getattr(subject.tokenizer, "name_or_path", None),
    }


def plain(value: Any) -> Any:
    """Return what JSON would give back: no tuples, and None where there is no number.

    A fresh result and one from the cache are then the same thing.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise ValueError(f"two models are called {name!r}; give them names: NAME=PATH")


def _resolve_all(names: Sequence[str], include_path: str | Path | None) -> list[Task]:
    """Return the tasks of these names, each once."""
    found = [task for name in names for task in resolve(name, include_path)]
    return list({task.name: task for task in found}.values())


def evaluate(
    models: Any | Sequence[Any],
    tasks: Sequence[str] | None = None,
    *,
    out: str | Path | None = None,
    settings: Settings | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    watcher: Watcher | None = None,
    ablate: Sequence[str] = (),
    include_path: str | Path | None = None,
    **loading: Any,
) -> dict[str, Any]:
    """Measure models on tasks.

    Args:
        models: one or several of: a model object, a loaded :class:`~hybrid_eval.models.Subject`,
            a checkpoint folder, a .gguf file, a hub name, ``NAME=PATH``.
        tasks: names from :data:`hybrid_eval.registry.TASKS`, or of lm-eval's tasks; None takes
            what suits the models.
        out: folder for cached results; the same call resumes there. None keeps nothing.
        settings: what is common to all tasks.
        options: per task, options of its own: ``{"mqar": {"pairs": 16}}``.
        watcher: is told how far the run is.
        ablate: knock-outs, each measured beside the whole model: "attention", "linear" or layer
            numbers such as "0,3" (see :mod:`hybrid_eval.ablate`).
        include_path: folder of lm-eval YAML files of your own, whose tasks may then be named.
        loading: arguments of :func:`hybrid_eval.models.load`.

    Returns:
        ``{"schema", "created", "versions", "settings", "models": [{"name", ..., "results":
        {task: result}}]}``, all of it JSON.

    Raises:
        ValueError: an unknown task or option, a model that is none, two of one name, or a length
            that a model cannot take.
    """
    settings = settings or Settings()
    specs = list(models) if isinstance(models, list | tuple) else [models]
    if not specs:
        raise ValueError("no model to evaluate")
    folder = None if out is None else Path(out)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file; results go to a folder")
    # every name is checked before the first model is loaded
    chosen = None if tasks is None else _resolve_all(tasks, include_path)
    given: dict[str, dict[str, Any]] = {}
    for name, values in (options or {}).items():
        for task in resolve(name, include_path):
            check_options(task, values)
            given[task.name] = dict(values)
    subjects = [s if isinstance(s, Subject) else load(s, **loading) for s in specs]
    _check_names([subject.name for subject in subjects])
    for subject in subjects:
        for what in ablate:
            select(subject.model, what)
    if chosen is None:
        chosen = [find(name) for name in default_tasks(subjects)]
    records = []
    for subject in subjects:
        for knocked_out in (None, *ablate):
            shown = subject
            if knocked_out is not None:
                shown = replace(subject, name=f"{subject.name} without {knocked_out}")
            record = _describe(shown)
            record["ablate"] = knocked_out
            record["results"] = {
                task.name: _run_task(
                    shown, task, settings, given.get(task.name, {}), folder, watcher, knocked_out
                )
                for task in chosen
            }
            records.append(record)
    return {
        "schema": RESULT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "settings": plain(_setting_words(settings)),
        "models": records,
    }
