"""Tasks of lm-eval by name, run by lm-eval and converted to the format of our results.

lm-eval is optional and is imported only for names that are not ours.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .errors import NotFiniteError, nearest
from .hub import revision, unreachable
from .identity import content, path_digest
from .models import Subject
from .registry import TASKS, Axis, Settings, Task, tokenizer_of
from .scoring import batch_size_for, evaluating, finite_logits, position_limit
from .stats import above_chance, proportion_interval, t_interval, weighted_interval
from .tokens import Encoder

# without a length in the config, lm-eval truncates every prompt to 2048 tokens
_NO_LIMIT = 2**20
# lm-eval's seed of few-shot examples; ours is added, so that seed 0 equals lm-eval
_FEWSHOT_SEED = 1234


# axes of lm-eval's tasks by name prefix; all others are reasoning
_AXES: tuple[tuple[Axis, tuple[str, ...]], ...] = (
    (
        "retrieval",
        (
            *("niah", "ruler", "babilong", "longbench", "helmet", "nolima", "mrcr", "fda", "swde"),
            *("squad_completion", "squadv2", "qasper", "scrolls_", "phonebook", "evalita-sp_qa"),
            *("infinitebench_passkey", "infinitebench_kv", "infinitebench_number"),
            *("infinitebench_longbook", "infinitebench_longdialogue"),
        ),
    ),
    (
        "language",
        ("wikitext", "pile", "paloma", "c4", "lambada", "bits_per_byte", "blimp", "wsc_ppl"),
    ),
)


def axis_of(name: str) -> Axis:
    """Return the axis of a task of lm-eval, from a table of names."""
    for axis, beginnings in _AXES:
        if name.lower().startswith(beginnings):
            return axis
    return "reasoning"


@lru_cache(maxsize=4)
def _manager(include_path: str | None):
    """Return lm-eval's index of tasks, or None if lm-eval is not installed."""
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        return None
    return TaskManager(include_path=include_path)


def resolve(
    name: str, include_path: str | Path | None = None, axis: Axis | None = None
) -> list[Task]:
    """Return the task of this name, ours or lm-eval's; a tag returns all of its tasks.

    Args:
        name: name of a task, of a group of lm-eval with its own figure, or of a tag.
        include_path: folder of the user's lm-eval YAML files.
        axis: axis of the task; None for the default, which is :func:``axis_of`` for
            lm-eval's tasks.

    Raises:
        ValueError: the name is unknown (the message has the nearest name, or how to install
            lm-eval), or the folder does not exist.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path {include_path}: no such folder of lm-eval YAML files")
    if name in TASKS:
        return [TASKS[name] if axis is None else replace(TASKS[name], axis=axis)]
    manager = _manager(None if include_path is None else str(include_path))
    if manager is None:
        raise ValueError(
            f"task {name!r} is not ours; if it is one of lm-eval's, install that: pip install "
            f"lm-eval{nearest(name, TASKS)}"
        )
    if name in manager.all_tags:
        members = sorted(manager.task_index[name].tags)
        return [task for member in members for task in resolve(member, include_path, axis)]
    if name not in manager.all_tasks:
        hint = nearest(name, [*TASKS, *manager.all_tasks])
        hint = hint if "did you mean" in hint else ""
        lists = "; --list has ours, `lm-eval ls tasks` has lm-eval's"
        raise ValueError(f"unknown task {name!r}, neither ours nor lm-eval's{hint}{lists}")
    return [
        Task(
            name,
            axis or axis_of(name),
            "accuracy",
            evaluate_lm_eval,
            partial(_run, name, manager, axis),
            "a task of lm-eval's",
            data=partial(_data, name, manager, include_path),
        )
    ]


def _texts(value: Any) -> set[str]:
    """Return every string in a task's config."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return set().union(*map(_texts, value))
    return {value} if isinstance(value, str) else set()


def _data(name: str, manager, include_path: str | Path | None, options: Any) -> list[Any]:
    """Return what identifies the definition and the data of a task: files and hub revisions."""
    names, waiting, found = set(), [name], []
    while waiting:
        name = waiting.pop()
        if name in names or name not in manager.task_index:
            continue
        names.add(name)
        config = manager.task_index[name].cfg or {}
        waiting += _texts(config.get("task"))
        remote = config.get("dataset_path")
        if isinstance(remote, str) and remote.count("/") == 1 and not Path(remote).exists():
            found.append([remote, revision(remote)])
        found += [content(text) for text in sorted(_texts(config.get("dataset_kwargs")))]
        found.append(content(remote))
    own = None if include_path is None else path_digest(include_path)
    return [own, sorted(map(repr, found))]


def _run(
    name: str,
    manager,
    axis: Axis | None,
    subject: Subject,
    settings: Settings,
    options: dict[str, Any],
    progress=None,
) -> dict[str, Any]:
    arguments: dict[str, Any] = {"seed": settings.seed, "batch_size": settings.batch_size}
    if settings.limit is not None:
        arguments["n"] = settings.limit
    encoder = tokenizer_of(subject)
    found = evaluate_lm_eval(
        subject.model, task=name, tokenizer=encoder, manager=manager, **{**arguments, **options}
    )
    if axis is not None:
        return {**found, "axis": axis}
    # a perplexity belongs to the language axis, whatever the name of its task
    return found if found["axis"] == "language" else {**found, "axis": axis_of(name)}


def _language_model(model, tokenizer: Encoder, batch_size: int | None, max_length: int):
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            "lm-eval's tasks need a Hugging Face tokenizer, found "
            f"{type(tokenizer).__name__}; name one (--tokenizer PATH)"
        )
    # lm-eval computes the logits of every position
    size = batch_size or batch_size_for(model, 512, 512)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=max_length)


def _headline(scores: dict[str, Any], task: str) -> tuple[str, str]:
    """Return metric and filter of the headline figure of a task."""
    keys = [key for key in scores if "," in key and "_stderr," not in key]
    if not keys:
        raise ValueError(f"lm-eval gives {task!r} no figure of its own; name the tasks in it")
    best = next((key for key in keys if key.startswith("acc,")), keys[0])
    metric, _, filtered = best.partition(",")
    return metric, filtered


def _lengths(samples: Sequence[dict[str, Any]], tokenizer: Encoder, limit: int) -> tuple[Any, int]:
    """Return the true token counts of prompts with answers, and the number of truncated prompts."""
    longest, cut = [], 0
    for sample in samples:
        counts = [0]
        for arguments in sample["arguments"]:
            text = "".join(part for part in arguments if isinstance(part, str))
            room = next((part for part in arguments if isinstance(part, dict)), {})
            ids = tokenizer(text, verbose=False)["input_ids"]
            counts.append(len(ids) + int(room.get("max_gen_toks", 0)))
        longest.append(max(counts))
        # a text scored as a whole is split into windows, without truncation
        cut += longest[-1] > limit and len(sample["arguments"][0]) > 1
    return {"min": min(longest, default=0), "max": max(longest, default=0)}, cut


def _figures(
    value: float, error: float, samples: Sequence[dict[str, Any]], metric: str
) -> dict[str, Any]:
    """Return the headline figure with its interval; an accuracy if every item is 0 or 1."""
    items: list[Any] = [sample.get(metric) for sample in samples]
    if not items or any(item not in (0, 1) for item in items):
        return {
            "metric": metric,
            metric: value,
            f"{metric}_stderr": error,
            "interval": None if math.isnan(error) else t_interval(value, error, len(items)),
        }
    choices = [
        len(sample["arguments"]) if len(sample["arguments"]) > 1 else math.inf for sample in samples
    ]
    chance = float(np.mean([1 / count for count in choices]))
    pooled = math.isclose(value, float(np.mean(items)), abs_tol=1e-9)
    return {
        "metric": "accuracy",
        "accuracy": value,
        "accuracy_stderr": error,
        # a group may weight its tasks equally: then use its own error
        "interval": proportion_interval(sum(items), len(items))
        if pooled
        else weighted_interval(value, error, len(items)),
        "chance": chance,
        "above_chance": above_chance(value, chance),
        "items": [float(item) for item in items],
    }


def evaluate_lm_eval(
    model,
    *,
    task: str,
    tokenizer: Encoder,
    manager: Any = None,
    n: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Run one task of lm-eval with lm-eval.

    Args:
        model: a transformers causal language model.
        task: name of a task or of a group with a figure of its own.
        tokenizer: the model's, of transformers.
        manager: lm-eval's index of tasks; None makes one.
        n: questions per task; None takes all.
        num_fewshot: worked examples; None is the task's own number.
        seed: 0 draws the examples that lm-eval draws.
        batch_size: rows per forward; None chooses.

    Returns:
        The task's first figure with standard error and interval - as "accuracy" with chance where
        every item scores 0 or 1 -, all of lm-eval's figures as "scores", true token counts, and
        how many prompts lm-eval cut.

    Raises:
        ValueError: the data cannot be reached, no Hugging Face tokenizer, or a group without a
            figure.
    """
    from lm_eval import simple_evaluate

    limit = position_limit(model) or _NO_LIMIT
    language_model = _language_model(model, tokenizer, batch_size, limit)
    try:
        with evaluating(model), finite_logits(model):
            found: Any = simple_evaluate(
                language_model,
                tasks=[task],
                num_fewshot=num_fewshot,
                limit=n,
                task_manager=manager or _manager(None),
                bootstrap_iters=1000,
                log_samples=True,
                fewshot_random_seed=_FEWSHOT_SEED + seed,
            )
    except OSError as error:
        way_out = f"run it once where the hub can be reached, or leave {task} out ({error})"
        raise unreachable(f"lm-eval's {task}", "of that task", way_out) from error
    scores = found.get("groups", {}).get(task) or found["results"].get(task, {})
    metric, filtered = _headline(scores, task)
    if math.isnan(float(scores[f"{metric},{filtered}"])):
        raise NotFiniteError(f"lm-eval's {metric} is NaN; there is nothing to measure")
    samples = [
        sample
        for group in found["samples"].values()
        for sample in group
        if sample.get("filter", filtered) == filtered
    ]
    error = scores.get(f"{metric}_stderr,{filtered}")
    error = error if isinstance(error, float) else math.nan
    tokens, cut = _lengths(samples, tokenizer, limit)
    higher = found.get("higher_is_better", {}).get(task, {}).get(metric, True)
    return {
        **_figures(float(scores[f"{metric},{filtered}"]), error, samples, metric),
        "axis": "language" if higher is False else "reasoning",
        "n": len(samples),
        "tokens": tokens,
        "truncated": cut,
        "lm_eval": {
            "metric": f"{metric},{filtered}",
            "version": metadata.version("lm_eval"),
            "num_fewshot": found.get("n-shot", {}).get(task),
            "scores": {key: value for key, value in scores.items() if "," in key},
        },
    }
