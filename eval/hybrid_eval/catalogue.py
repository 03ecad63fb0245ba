"""The tasks of this package, and functions that run them on a model."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .corpus import load_corpus
from .cost import evaluate_cost
from .heldout import evaluate_heldout
from .hub import revision
from .lookup import evaluate_lookup
from .mmlu import Form, evaluate_mmlu
from .models import Subject
from .mqar import KEY_IDS, VALUE_IDS, evaluate_mqar, mqar
from .needle import evaluate_needle
from .olmes import SUITES as OLMES
from .olmes import evaluate_olmes
from .phone_book import evaluate_phone_book
from .questions import HUB as MMLU_HUB
from .registry import Axis, Settings, Task, register, tokenizer_of
from .scoring import Progress
from .speed import evaluate_speed
from .synthetic import evaluate_hops, evaluate_icl, evaluate_state_tracking
from .text.completion import COMPLETIONS, evaluate_completion
from .text.evaluate import evaluate_text
from .text.material import ESSAYS_HUB
from .text.tasks import NAMES as TEXT_TASKS
from .text.tasks import RULER, RULER2, Material, needs_essays, needs_mmlu
from .tokens import ByteEncoder, Haystack


def _sample_settings(settings: Settings, progress: Progress | None) -> dict[str, Any]:
    common: dict[str, Any] = {"seed": settings.seed, "allow_longer": settings.allow_longer}
    if settings.limit is not None:
        common["n"] = settings.limit
    return {**common, "batch_size": settings.batch_size, "progress": progress}


def _run_mqar(subject: Subject, settings: Settings, options: dict[str, Any], progress=None):
    return evaluate_mqar(subject.model, **{**_sample_settings(settings, progress), **options})


def grid_settings(settings: Settings, progress: Progress | None) -> dict[str, Any]:
    """Return the arguments of a depth x length task that follow from the settings of the run."""
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
    # the windows follow from the text, without random numbers
    arguments.pop("seed")
    return evaluate_heldout(
        subject.model,
        tokenizer=tokenizer_of(subject),
        corpus=settings.corpus,
        **{**arguments, **options},
    )


def _from_hub(name: str, option: str, options: Mapping[str, Any]) -> str | None:
    """Return the revision of a data set on the hub, or None if the user's data replace it."""
    return None if options.get(option) is not None else revision(name)


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
        more=mqar,
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
        arguments.pop("words", None),
        arguments.pop("mmlu", None),
    )
    return evaluate_text(
        subject.model,
        task=name,
        tokenizer=tokenizer_of(subject),
        material=material,
        chat=settings.chat,
        **arguments,
    )


_WORDS = {
    "niah_grid": "one sentence hidden in text, every depth and length exact",
    "kv_recall": "a phone book, one entry looked up",
    "latent_niah": "a needle that shares no word with its question, after NoLiMa",
    **{
        name: f"RULER's {name.removeprefix('ruler_')}, on RULER's own material"
        for name in TEXT_TASKS
        if name.startswith("ruler_")
    },
    **{f"long_{name}": f"RULER's {name} generator on material at hand" for name in RULER},
    **{f"ruler2_{name}": f"RULER v2's {name}" for name in RULER2},
}


def _text_data(name: str):
    """Return a function that identifies the hub data of a task."""
    if needs_mmlu(name):
        return partial(_from_hub, MMLU_HUB, "mmlu")
    return partial(_from_hub, ESSAYS_HUB, "essays") if needs_essays(name) else None


for _name in TEXT_TASKS:
    register(
        Task(
            _name,
            "retrieval",
            "accuracy",
            evaluate_text,
            partial(_run_text, _name),
            _WORDS[_name],
            data=_text_data(_name),
        )
    )


def _run_sampled(function, takes: tuple[str, ...], subject, settings, options, progress=None):
    """Run a task with the settings that it accepts and its options."""
    given = grid_settings(settings, progress)
    arguments = {key: value for key, value in given.items() if key in takes}
    return function(subject.model, **{**arguments, **options})


def _run_on_questions(function, fixed, subject: Subject, settings, options, progress=None):
    """Run a task with a fixed set of questions."""
    arguments = {**_sample_settings(settings, progress), **options, **fixed}
    return function(subject.model, tokenizer=tokenizer_of(subject), **arguments)


_SAMPLED = ("n", "seed", "batch_size", "progress", "allow_longer")
_SMALL: tuple[tuple[str, Axis, str, Callable[..., dict[str, Any]], tuple[str, ...], str], ...] = (
    (
        "state_tracking",
        "reasoning",
        "accuracy",
        evaluate_state_tracking,
        (*_SAMPLED, "lengths"),
        "running product in a group (parity, S3, S5, A5, Z2 ... Z64) or state of an automaton, "
        "for models trained on it",
    ),
    (
        "phone_book",
        "retrieval",
        "accuracy",
        evaluate_phone_book,
        (*_SAMPLED, "lengths"),
        "numbers looked up in a phone book of bytes, for models trained on it",
    ),
    (
        "lookup",
        "retrieval",
        "accuracy",
        evaluate_lookup,
        (*_SAMPLED, "lengths"),
        "a token of a random string found by the n-gram before it, or by its position, for models "
        "trained on it",
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
for _name in COMPLETIONS:
    register(
        Task(
            _name,
            "retrieval",
            "accuracy",
            evaluate_completion,
            partial(_run_on_questions, evaluate_completion, {"task": _name}),
            f"a fact completed from a long document, from the hub or --set {_name}.path=FILE",
            data=partial(_from_hub, COMPLETIONS[_name], "path"),
        )
    )
_FORMS: tuple[tuple[Form, str], ...] = (
    ("letters", "MMLU by letter, from the hub or --mmlu-dir: symbol binding, a kind of retrieval"),
    ("cloze", "MMLU by text of the choice, from the hub or --mmlu-dir: what the model knows"),
)
for _form, _words in _FORMS:
    register(
        Task(
            f"mmlu_{_form}",
            "reasoning",
            "accuracy",
            evaluate_mmlu,
            partial(_run_on_questions, evaluate_mmlu, {"form": _form}),
            _words,
            data=partial(_from_hub, MMLU_HUB, "path"),
        )
    )
for _name, _suite in OLMES.items():
    register(
        Task(
            _name,
            "reasoning",
            "accuracy",
            evaluate_olmes,
            partial(_run_on_questions, evaluate_olmes, {"task": _name}),
            f"cloze after OLMES, choices compared by {_suite.normalisation}; from the hub or "
            f"--set {_name}.path=FILE",
            data=partial(_from_hub, _suite.hub, "path"),
        )
    )


def default_tasks(subjects: Sequence[Subject]) -> tuple[str, ...]:
    """Return the default tasks for these models."""
    if any(_reads_language(subject) for subject in subjects):
        return ("niah_grid", "kv_recall", "heldout", "cost")
    return ("mqar", "needle", "heldout", "cost")


def _reads_language(subject: Subject) -> bool:
    """Return whether the tokenizer has more tokens than bytes and a few special ones."""
    return subject.tokenizer is not None and getattr(subject.tokenizer, "vocab_size", 0) > 512
