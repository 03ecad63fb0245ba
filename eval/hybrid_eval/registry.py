"""The registry of tasks, filled by :mod:``hybrid_eval.catalogue``."""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from .corpus import Corpus
from .errors import nearest
from .models import Subject
from .text.tasks import NAMES as TEXT_TASKS
from .text.tasks import needs_mmlu
from .tokens import Encoder

Axis = Literal["retrieval", "reasoning", "language", "cost", "speed"]


@dataclass(frozen=True)
class Settings:
    """Settings common to all tasks of a run; None for the default of a task.

    Attributes:
        lengths: tokens per sample, for tasks with a length.
        depths: depths of the needle, for tasks with a depth.
        limit: samples per cell (grid tasks) or in total (others).
        seed: seed of every sample.
        batch_size: rows per forward.
        corpus: text for haystacks and held-out loss.
        context: number of tokens for the size of the cache.
        allow_longer: permit lengths beyond ``max_position_embeddings``.
        chat: put prompts of tasks in words into the tokenizer's chat template (True), or into
            RULER's of that name (see :data:``hybrid_eval.text.chat.TEMPLATES``).
    """

    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int | None = None
    corpus: Corpus | None = None
    context: int = 32768
    allow_longer: bool = False
    chat: bool | str = False


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        name: name on the command line.
        axis: axis of the report.
        metric: key of the headline figure in its result.
        function: the measurement; its keyword arguments are the task's options.
        run: adapter that turns a subject, the settings and options into a result.
        words: one line for ``--list``.
        higher_is_better: direction of the headline figure.
        more: a function that receives options unknown to ``function``.
        data: function from options to a value that identifies the data of the task, if they come
            from neither the options nor this package.
    """

    name: str
    axis: Axis
    metric: str
    function: Callable[..., dict[str, Any]]
    run: Callable[..., dict[str, Any]]
    words: str
    higher_is_better: bool = True
    more: Callable[..., Any] | None = None
    data: Callable[[Mapping[str, Any]], Any] | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """Names of options for ``--set TASK.NAME=VALUE``."""
        given = {"model", "progress", "haystack", "tokenizer", "corpus", "allow_longer"}
        given |= {"task", "material", "form", "manager", "chat"}
        own = [
            p.name
            for p in inspect.signature(self.function).parameters.values()
            if p.kind is not p.VAR_KEYWORD and p.name not in given
        ]
        return (*own, *_MORE_OPTIONS.get(self.name, ()))


_TEXT_OPTIONS = ("essays", "squad", "hotpot")
_OWN_TEXT_OPTIONS = {
    "kv_recall": ("pairs",),
    "latent_niah": ("hops",),
    "ruler_common_words": ("words",),
    "long_cwe": ("words",),
    **{name: ("mmlu",) for name in TEXT_TASKS if needs_mmlu(name)},
}
_MORE_OPTIONS = {
    **{name: (*_TEXT_OPTIONS, *_OWN_TEXT_OPTIONS.get(name, ())) for name in TEXT_TASKS},
    "mqar": (
        "sequence_length",
        "pairs",
        "queries",
        "key_ids",
        "value_ids",
        "filler_ids",
        "gap",
        "power",
    ),
}
TASKS: dict[str, Task] = {}


def register(task: Task) -> None:
    """Register a task.

    Raises:
        ValueError: the name is taken.
    """
    if task.name in TASKS:
        raise ValueError(f"task {task.name!r} is registered twice")
    TASKS[task.name] = task


def find(name: str) -> Task:
    """Return the task of this name.

    Raises:
        ValueError: there is none; the message has the nearest name.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{nearest(name, TASKS)}")
    return TASKS[name]


# options that are counts of at least one; other integers may be zero
_POSITIVE = frozenset(
    {"n", "batch_size", "pairs", "queries", "needles", "length", "lengths", "repeats", "steps"}
    | {"sequence_length", "context", "inputs", "reads"}
)
# options of text tasks, which pass them on
_OPTION_TYPES: dict[str, Any] = {
    "pairs": int | None,
    "hops": int,
    **dict.fromkeys(("essays", "squad", "hotpot", "words", "mmlu"), str | None),
}


def _wanted(kind: Any) -> str:
    """Describe the values of an annotation."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if type(None) in parts:
        return _wanted(next(part for part in parts if part is not type(None)))
    if kind in _KINDS:
        return _KINDS[kind]
    inner = _KINDS.get(parts[0], "values").removeprefix("a ") + "s" if parts else "values"
    return f"a list of {inner}" if get_origin(kind) is not tuple else f"two {inner}"


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
}


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]


def _check_value(task: str, name: str, kind: Any, value: Any) -> None:
    try:
        # of JSON, whose lists are tuples where tuples are wanted
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError, RecursionError) as error:
        raise ValueError(f"{task}.{name} must be {_wanted(kind)}, got {value!r}") from error
    least = 1 if name in _POSITIVE else 0
    for number in _numbers(value):
        if not math.isfinite(number):
            raise ValueError(f"{task}.{name} must be finite, got {value!r}")
        if name != "seed" and number < least:
            raise ValueError(f"{task}.{name} must be at least {least}, got {value!r}")
    if isinstance(value, list | tuple) and not value:
        raise ValueError(f"{task}.{name} must be {_wanted(kind)}, got an empty list")


def check_options(task: Task, options: Mapping[str, Any]) -> None:
    """Refuse options that the task does not have, and values that it cannot use.

    Raises:
        ValueError: with the option, and the nearest known one or its allowed values.
    """
    parameters = dict(inspect.signature(task.function).parameters)
    if task.more is not None:
        parameters |= inspect.signature(task.more).parameters
    for name, value in options.items():
        if name not in task.options:
            hint = nearest(name, task.options)
            raise ValueError(f"task {task.name!r} has no option {name!r}{hint}")
        kind = parameters[name].annotation if name in parameters else _OPTION_TYPES[name]
        _check_value(task.name, name, kind, value)


def tokenizer_of(subject: Subject) -> Encoder:
    """Return the subject's tokenizer.

    Raises:
        ValueError: it has none.
    """
    if subject.tokenizer is None:
        raise ValueError(
            f"{subject.name}: no tokenizer beside the model; name one (--tokenizer PATH), or say "
            "that its token ids are bytes (--tokenizer bytes)"
        )
    return subject.tokenizer
