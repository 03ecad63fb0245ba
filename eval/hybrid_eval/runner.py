"""Run tasks on models, cache results on disk, and resume interrupted runs."""

import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from . import stored
from .ablate import ablated, describe, select
from .catalogue import default_tasks
from .errors import NotFiniteError
from .identity import content, digest, model_digest, tokenizer_digest
from .lm_harness import resolve
from .models import Subject, load
from .registry import Axis, Settings, Task, check_options, find
from .scoring import device_of

# version of the format of results.json
RESULT_VERSION = 2


class Watcher(Protocol):
    """Receiver of the progress of a run."""

    def start(self, model: str, task: str) -> None:
        """Called before a task runs on a model."""

    def advance(self, done: int, total: int) -> None:
        """Called while it runs."""

    def finish(self, model: str, task: str, *, cached: bool) -> None:
        """Called with the result available."""


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
        documents = settings.corpus.documents
        text = digest(*(part for d in documents for part in (d.name, d.text)))
        words["corpus"] = f"{settings.corpus.description} {text[:16]}"
    # the batch size does not affect the result
    words.pop("batch_size")
    return plain(words)


def _key(
    subject: Subject,
    task: Task,
    settings: Settings,
    options: dict[str, Any],
    knocked_out: str | None,
) -> dict[str, Any]:
    """Return everything except the model that a result depends on, as JSON values."""
    return {
        "task": task.name,
        "axis": task.axis,
        "settings": _setting_words(settings),
        "options": content(options),
        "data": None if task.data is None else task.data(options),
        "tokenizer": tokenizer_digest(subject.tokenizer),
        "without": [] if knocked_out is None else _without(subject, knocked_out),
        "device": str(device_of(subject.model)) if task.axis == "speed" else None,
        "versions": versions(),
    }


def _measure(
    subject: Subject,
    task: Task,
    settings: Settings,
    options: dict[str, Any],
    watcher: Watcher | None,
    knocked_out: str | None,
) -> dict[str, Any]:
    began = time.perf_counter()
    advance = None if watcher is None else watcher.advance
    try:
        with ablated(subject.model, knocked_out):
            result = task.run(subject, settings, options, advance)
    except NotFiniteError as error:
        raise NotFiniteError(f"{subject.name}, {task.name}: {error}") from error
    result["seconds"] = time.perf_counter() - began
    result = {"task": task.name, "axis": task.axis, "metric": task.metric, **result}
    return plain({**result, "options": options})


def _run_task(
    subject: Subject,
    task: Task,
    settings: Settings,
    options: dict[str, Any],
    path: Path | None,
    watcher: Watcher | None,
    knocked_out: str | None,
) -> dict[str, Any]:
    """Return the result of one task, from ``path`` if it exists."""
    if watcher is not None:
        watcher.start(subject.name, task.name)
    cached = path is not None and path.exists()
    if path is not None and cached:
        result = stored.read(path)
    else:
        result = _measure(subject, task, settings, options, watcher, knocked_out)
        if path is not None:
            stored.write(path, result)
    if watcher is not None:
        watcher.finish(subject.name, task.name, cached=cached)
    return result


def _fingerprint(subject: Subject, folder: Path | None) -> str | None:
    """Return the hash of the current weights of the model, which may have been trained since.

    None if it cannot be hashed and results are not cached.
    """
    try:
        return model_digest(subject.model)
    except ValueError:
        if folder is not None:
            raise
        return None


def _tokenizer_hash(subject: Subject) -> str | None:
    try:
        return tokenizer_digest(subject.tokenizer)
    # a custom encoder that cannot be hashed; refused if results are cached
    except ValueError:
        return None


def _without(subject: Subject, knocked_out: str) -> list[dict[str, Any]]:
    """Return the branches of a knock-out as JSON values."""
    return [
        {"layer": branch.layer, "name": branch.name, "kind": branch.kind}
        for branch in select(subject.model, knocked_out)
    ]


def _describe(subject: Subject, fingerprint: str | None) -> dict[str, Any]:
    config = subject.model.config
    return {
        "name": subject.name,
        "source": subject.source,
        "fingerprint": fingerprint,
        "dtype": str(next(subject.model.parameters()).dtype).removeprefix("torch."),
        "tokenizer_hash": _tokenizer_hash(subject),
        "model_type": getattr(config, "model_type", None),
        "layout": subject.layout,
        "layer_types": list(getattr(config, "layer_types", None) or []),
        "branches": describe(subject.model),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "tokenizer": getattr(subject.tokenizer, "name_or_path", None),
    }


def plain(value: Any) -> Any:
    """Return the value after a round trip through JSON: no tuples, and None for NaN.

    A new result and a cached one are then equal.
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


def _resolve_all(
    names: Sequence[str], include_path: str | Path | None, axes: Mapping[str, Axis]
) -> list[Task]:
    """Return the tasks of these names, each once."""
    found = [task for name in names for task in resolve(name, include_path, axes.get(name))]
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
    axes: Mapping[str, Axis] | None = None,
    **loading: Any,
) -> dict[str, Any]:
    """Measure models on tasks.

    Args:
        models: one or several of: a model object, a loaded :class:``~hybrid_eval.models.Subject``,
            a checkpoint folder, a .gguf file, a hub name, ``NAME=PATH``.
        tasks: names from :data:``hybrid_eval.registry.TASKS``, or of lm-eval's tasks; None for
            the defaults of the models.
        out: folder for cached results; the same call resumes. None for no cache.
        settings: settings common to all tasks.
        options: options by task: ``{"mqar": {"pairs": 16}}``.
        watcher: receives the progress of the run.
        ablate: knock-outs to measure in addition to the whole model: "attention", "linear" or layer
            numbers such as "0,3" (see :mod:``hybrid_eval.ablate``).
        include_path: folder of lm-eval YAML files with additional tasks.
        axes: axes of tasks by name, to override their defaults.
        loading: arguments of :func:``hybrid_eval.models.load``.

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
    chosen = None if tasks is None else _resolve_all(tasks, include_path, axes or {})
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
        fingerprint = _fingerprint(subject, folder)
        for knocked_out in (None, *ablate):
            shown = subject
            if knocked_out is not None:
                shown = replace(subject, name=f"{subject.name} without {knocked_out}")
            record = _describe(shown, fingerprint)
            record["ablate"] = knocked_out
            record["without"] = [] if knocked_out is None else _without(subject, knocked_out)
            record["results"] = {}
            for task in chosen:
                own, path = given.get(task.name, {}), None
                if folder is not None and fingerprint is not None:
                    key = _key(shown, task, settings, own, knocked_out)
                    path = stored.place(folder, shown.name, fingerprint, task.name, key)
                record["results"][task.name] = _run_task(
                    shown, task, settings, own, path, watcher, knocked_out
                )
            records.append(record)
    return {
        "schema": RESULT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "settings": _setting_words(settings),
        "models": records,
    }
