"""What a task is, and the tasks by name (:mod:`hybrid_eval.catalogue` fills them in)."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .corpus import Corpus
from .errors import nearest
from .models import Subject
from .text.tasks import NAMES as TEXT_TASKS
from .tokens import Encoder

Axis = Literal["retrieval", "reasoning", "language", "cost", "speed"]


@dataclass(frozen=True)
class Settings:
    """What is common to all tasks of a run; None leaves a task its own default.

    Attributes:
        lengths: tokens per sample, for tasks with a length.
        depths: of the needle, for tasks with a depth.
        limit: samples per cell (grid tasks) or in all (the others).
        seed: of every sample.
        batch_size: rows per forward.
        corpus: text for haystacks and held-out loss.
        context: tokens at which the cache's size is stated.
        allow_longer: permit lengths beyond ``max_position_embeddings``.
        chat: put prompts of tasks in words into the tokenizer's chat template.
    """

    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int | None = None
    corpus: Corpus | None = None
    context: int = 32768
    allow_longer: bool = False
    chat: bool = False


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        name: as typed by the user.
        axis: what it measures.
        metric: key of the headline figure in its result.
        function: the measurement; its keyword arguments are the task's options.
        run: adapter that turns a subject, the settings and options into a result.
        words: one line for ``--list``.
        higher_is_better: direction of the headline figure.
        more: a function to which ``function`` hands on what it does not know itself.
        data: from options to what tells the task's data from any other, where they come from
            neither the options nor this package.
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
        """Names that ``--set TASK.NAME=VALUE`` may set."""
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
    "ruler_common_words": ("words",),
    "long_cwe": ("words",),
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
    """Make a task known by its name.

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


def check_options(task: Task, options: Mapping[str, Any]) -> None:
    """Refuse options that the task does not have, and words where it wants a whole number.

    Raises:
        ValueError: names the option, and the nearest right one or what it takes.
    """
    parameters = dict(inspect.signature(task.function).parameters)
    if task.more is not None:
        parameters |= inspect.signature(task.more).parameters
    for name, value in options.items():
        if name not in task.options:
            hint = nearest(name, task.options)
            raise ValueError(f"task {task.name!r} has no option {name!r}{hint}")
        wanted = parameters[name].annotation if name in parameters else None
        whole = wanted is int or (wanted == int | None and value is not None)
        if whole and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{task.name}.{name} must be a whole number, got {value!r}")


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
