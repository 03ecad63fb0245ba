"""The tasks by name, each with its axis, its options and how it is run on a model under test."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from .corpus import Corpus, load_corpus
from .cost import evaluate_cost
from .errors import nearest
from .heldout import evaluate_heldout
from .mmlu import Form, evaluate_mmlu
from .models import Subject
from .mqar import KEY_IDS, VALUE_IDS, evaluate_mqar
from .needle import evaluate_needle
from .scoring import Progress
from .speed import evaluate_speed
from .synthetic import evaluate_hops, evaluate_icl, evaluate_state_tracking
from .text.evaluate import evaluate_text
from .text.tasks import NAMES as TEXT_TASKS
from .text.tasks import RULER, Material
from .tokens import ByteEncoder, Encoder, Haystack

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
    """

    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int | None = None
    corpus: Corpus | None = None
    context: int = 32768
    allow_longer: bool = False


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
    """

    name: str
    axis: Axis
    metric: str
    function: Callable[..., dict[str, Any]]
    run: Callable[..., dict[str, Any]]
    words: str
    higher_is_better: bool = True

    @property
    def options(self) -> tuple[str, ...]:
        """Names that ``--set TASK.NAME=VALUE`` may set."""
        given = {"model", "progress", "haystack", "tokenizer", "corpus", "allow_longer"}
        given |= {"task", "material", "form"}
        own = [
            p.name
            for p in inspect.signature(self.function).parameters.values()
            if p.kind is not p.VAR_KEYWORD and p.name not in given
        ]
        return (*own, *_MORE_OPTIONS.get(self.name, ()))


_TEXT_OPTIONS = ("essays", "squad", "hotpot")
_OWN_TEXT_OPTIONS = {"kv_recall": ("pairs",)}
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


def check_options(task: Task, options: Iterable[str]) -> None:
    """Refuse options that the task does not have.

    Raises:
        ValueError: names the option and the nearest right one.
    """
    for name in options:
        if name not in task.options:
            hint = nearest(name, task.options)
            raise ValueError(f"task {task.name!r} has no option {name!r}{hint}")


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


def _sample_settings(settings: Settings, progress: Progress | None) -> dict[str, Any]:
    common: dict[str, Any] = {"seed": settings.seed, "allow_longer": settings.allow_longer}
    if settings.limit is not None:
        common["n"] = settings.limit
    return {**common, "batch_size": settings.batch_size, "progress": progress}


def _run_mqar(subject: Subject, settings: Settings, options: dict[str, Any], progress=None):
    return evaluate_mqar(subject.model, **{**_sample_settings(settings, progress), **options})


def grid_settings(settings: Settings, progress: Progress | None) -> dict[str, Any]:
    """Return the arguments of a depth x length task that the run's settings decide."""
    arguments = _sample_settings(settings, progress)
    if settings.lengths is not None:
        arguments["lengths"] = settings.lengths
    if settings.depths is not None:
        arguments["depths"] = settings.depths
    return arguments


def _run_needle(subject: Subject, settings: Settings, options: dict[str, Any], progress=None):
    arguments = {**grid_settings(settings, progress), **options}
    if settings.corpus is not None:
        reserved = (
            tuple(arguments.get("key_ids", KEY_IDS)),
            tuple(arguments.get("value_ids", VALUE_IDS)),
        )
        encoder = subject.tokenizer or ByteEncoder()
        arguments["haystack"] = Haystack(settings.corpus, encoder, reserved)
    return evaluate_needle(subject.model, **arguments)


def _run_heldout(subject: Subject, settings: Settings, options: dict[str, Any], progress=None):
    arguments = _sample_settings(settings, progress)
    # the windows are fixed by the text: there is nothing to draw
    arguments.pop("seed")
    return evaluate_heldout(
        subject.model,
        tokenizer=tokenizer_of(subject),
        corpus=settings.corpus,
        **{**arguments, **options},
    )


def _run_cost(subject: Subject, settings: Settings, options: dict[str, Any], progress=None):
    return evaluate_cost(subject.model, **{"context": settings.context, **options})


register(
    Task(
        "mqar",
        "retrieval",
        "accuracy",
        evaluate_mqar,
        _run_mqar,
        "multi-query associative recall, for models trained on its format",
    )
)
register(
    Task(
        "needle",
        "retrieval",
        "accuracy",
        evaluate_needle,
        _run_needle,
        "key-value needle in real text, depth x length, for models trained on its format",
    )
)
register(
    Task(
        "heldout",
        "language",
        "bits_per_byte",
        evaluate_heldout,
        _run_heldout,
        "held-out loss and bits per byte on real text",
        higher_is_better=False,
    )
)
register(
    Task(
        "cost",
        "cost",
        "cache_bytes",
        evaluate_cost,
        _run_cost,
        "cache bytes, measured",
        higher_is_better=False,
    )
)


def _run_text(name: str, subject: Subject, settings: Settings, options, progress=None):
    arguments = {**grid_settings(settings, progress), **options}
    essays = arguments.pop("essays", None)
    material = Material(
        settings.corpus,
        None if essays is None else load_corpus(essays),
        arguments.pop("squad", None),
        arguments.pop("hotpot", None),
    )
    return evaluate_text(
        subject.model,
        task=name,
        tokenizer=tokenizer_of(subject),
        material=material,
        **arguments,
    )


_WORDS = {
    "niah_grid": "one sentence hidden in text, every depth and length exact",
    "kv_recall": "a phone book, one entry looked up",
    **{f"ruler_{name}": f"RULER's {name}, on RULER's own material" for name in RULER},
    **{f"long_{name}": f"RULER's {name} generator on material at hand" for name in RULER},
}
for _name in TEXT_TASKS:
    register(
        Task(
            _name,
            "retrieval",
            "accuracy",
            evaluate_text,
            partial(_run_text, _name),
            _WORDS[_name],
        )
    )


def _run_sampled(function, takes: tuple[str, ...], subject, settings, options, progress=None):
    """Run a task whose arguments are those of the settings that it takes, and its options."""
    given = grid_settings(settings, progress)
    arguments = {key: value for key, value in given.items() if key in takes}
    return function(subject.model, **{**arguments, **options})


def _run_mmlu(form: Form, subject: Subject, settings: Settings, options, progress=None):
    if "path" not in options:
        raise ValueError(
            f"mmlu_{form} reads local files: --mmlu-dir FOLDER or --set mmlu_{form}.path=FOLDER"
        )
    arguments = {**_sample_settings(settings, progress), **options}
    return evaluate_mmlu(subject.model, form=form, tokenizer=tokenizer_of(subject), **arguments)


_SAMPLED = ("n", "seed", "batch_size", "progress", "allow_longer")
_SMALL: tuple[tuple[str, Axis, str, Callable[..., dict[str, Any]], tuple[str, ...], str], ...] = (
    (
        "state_tracking",
        "reasoning",
        "accuracy",
        evaluate_state_tracking,
        (*_SAMPLED, "lengths"),
        "running product in a group (parity, S3, S5), for models trained on it",
    ),
    (
        "hops_k",
        "reasoning",
        "accuracy",
        evaluate_hops,
        _SAMPLED,
        "chains of assignments, k hops; k = 0 is pure retrieval; for models trained on it",
    ),
    (
        "icl_fn",
        "reasoning",
        "accuracy",
        evaluate_icl,
        _SAMPLED,
        "in-context mapping against number of shots, for models trained on it",
    ),
    (
        "speed",
        "speed",
        "decode_tokens_per_second",
        evaluate_speed,
        ("lengths", "progress", "allow_longer"),
        "prefill and decoding speed against length, measured",
    ),
)
for _name, _axis, _metric, _function, _takes, _words in _SMALL:
    register(
        Task(_name, _axis, _metric, _function, partial(_run_sampled, _function, _takes), _words)
    )
_FORMS: tuple[tuple[Form, str], ...] = (
    ("letters", "multiple choice by letter, from local files: symbol binding, a kind of retrieval"),
    ("cloze", "multiple choice by text, from local files: what the model knows"),
)
for _form, _words in _FORMS:
    register(
        Task(
            f"mmlu_{_form}",
            "reasoning",
            "accuracy",
            evaluate_mmlu,
            partial(_run_mmlu, _form),
            _words,
        )
    )


def default_tasks(subjects: Sequence[Subject]) -> tuple[str, ...]:
    """Return the tasks that suit these models when the user names none."""
    if any(_reads_language(subject) for subject in subjects):
        return ("niah_grid", "kv_recall", "heldout", "cost")
    return ("mqar", "needle", "heldout", "cost")


def _reads_language(subject: Subject) -> bool:
    """Whether the tokenizer has more than bytes and a few special tokens."""
    return subject.tokenizer is not None and getattr(subject.tokenizer, "vocab_size", 0) > 512
