"""Natural-language tasks by name.

``ruler_X`` is RULER's task X, with RULER's words, essays and questions, which it requires. Three of
them have long names, because lm-eval uses the short ones: ruler_variable_tracking,
ruler_common_words, ruler_frequent_words. ``long_X`` is the same generator on local material: words
and text of the standard library, and generated documents, so that results are not confused with
RULER's. ``ruler2_X`` is RULER v2's task X, on RULER v2's material.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..corpus import Corpus
from ..errors import nearest
from .chat import in_chat, template_tokens
from .counter import Counter
from .grid import kv_recall, niah_grid
from .latent import latent_niah
from .material import (
    Filler,
    Words,
    essays,
    filler_from,
    python_filler,
    python_words,
    with_single,
    wonder_words,
)
from .ruler2 import KINDS as RULER2
from .ruler2 import read_pool, ruler2
from .ruler_aggregate import cwe, fwe, vt
from .ruler_niah import NIAH, ruler_niah
from .ruler_qa import Library, generated_library, qa, read_hotpot, read_squad, read_supporting
from .sample import TextSample

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
RULER = (*NIAH, "vt", "cwe", "fwe", "qa_1", "qa_2")
GRIDS = ("niah_grid", "kv_recall", "latent_niah")
# lm-eval has other tasks called ruler_vt, ruler_cwe and ruler_fwe
_LONG_NAMES = {"vt": "variable_tracking", "cwe": "common_words", "fwe": "frequent_words"}
_RULER_NAMES = {f"ruler_{_LONG_NAMES.get(name, name)}": name for name in RULER}
_RULER2_NAMES = {f"ruler2_{name}": name for name in RULER2}
NAMES = (*GRIDS, *_RULER_NAMES, *(f"long_{name}" for name in RULER), *_RULER2_NAMES)

_ESSAY_TASKS = frozenset(name for name, kind in NIAH.items() if kind.haystack == "essay")
_WORD_TASKS = frozenset({"cwe", *(name for name, kind in NIAH.items() if kind.key == "words")})


@dataclass(frozen=True)
class Material:
    """Material of the user; None for local material.

    Attributes:
        corpus: text for haystacks of niah_grid and long_ tasks.
        essays: Paul Graham's essays as a file, for ruler_ tasks.
        squad: path of SQuAD's dev-v2.0.json.
        hotpot: path of HotpotQA's hotpot_dev_distractor_v1.json.
        words: path of words to count, one a line or RULER's english_words.json, for cwe.
        mmlu: folder of MMLU with test and auxiliary_train, for ruler2_ tasks.
    """

    corpus: Corpus | None = None
    essays: Corpus | None = None
    squad: str | None = None
    hotpot: str | None = None
    words: str | None = None
    mmlu: str | None = None


def _filler(material: Material, official: bool) -> Filler:
    if official:
        if material.essays is None:
            return essays()
        return filler_from(material.essays, official=True)
    return python_filler() if material.corpus is None else filler_from(material.corpus)


def _library(name: str, material: Material, official: bool) -> Library:
    if not official:
        return generated_library(1 if name == "qa_1" else 2)
    path, reader, what = (
        (material.squad, read_squad, "squad: SQuAD's dev-v2.0.json")
        if name == "qa_1"
        else (material.hotpot, read_hotpot, "hotpot: HotpotQA's hotpot_dev_distractor_v1.json")
    )
    if path is None:
        raise ValueError(
            f"ruler_{name} needs the option {what}; without it run long_{name}, on generated "
            "documents"
        )
    return reader(path)


def bare(name: str) -> str:
    """Return RULER's name of a task."""
    return _RULER_NAMES.get(name, name.removeprefix("long_"))


def generates(name: str) -> bool:
    """Return whether a task scores generated text: RULER's tasks do, our grids do not."""
    return name not in GRIDS


def needs_essays(name: str) -> bool:
    """Return whether a task hides needles in RULER's essays."""
    return name.startswith("ruler_") and bare(name) in _ESSAY_TASKS


def needs_mmlu(name: str) -> bool:
    """Return whether a task hides questions of MMLU."""
    return name in _RULER2_NAMES and RULER2[_RULER2_NAMES[name]].domain == "questions"


def maker(name: str, material: Material, counter: Counter) -> Callable[..., TextSample]:
    """Return the function that makes samples of a task: called with length, depth, index, seed.

    Raises:
        ValueError: an unknown task, or a ruler_ task without RULER's material.
    """
    if name not in NAMES:
        raise ValueError(f"unknown task {name!r}{nearest(name, NAMES)}")
    if name in _RULER2_NAMES:
        return _maker2(name, material, counter)
    own, official = bare(name), name.startswith("ruler_")
    words: Words = wonder_words() if official and own in _WORD_TASKS else python_words()
    if own == "cwe" and material.words is not None:
        words = with_single(words, material.words)
    if name in GRIDS:
        filler = _filler(material, official=False)
        grid = {"niah_grid": niah_grid, "kv_recall": kv_recall, "latent_niah": latent_niah}[name]
        return partial(grid, counter=counter, filler=filler, words=words)
    needs_text = own in _ESSAY_TASKS
    filler = _filler(material, official) if needs_text else Filler((), "none")
    arguments: dict[str, Any] = {"counter": counter, "filler": filler, "words": words}
    if own in NIAH:
        make = partial(ruler_niah, own, **arguments)
    elif own in ("qa_1", "qa_2"):
        make = partial(qa, own, _library(own, material, official), **arguments)
    else:
        make = partial({"vt": vt, "cwe": cwe, "fwe": fwe}[own], **arguments)

    return _named(name, make)


def _named(name: str, make: Callable[..., TextSample]) -> Callable[..., TextSample]:
    """Return a function that makes samples with our name of the task, which draw their depths."""

    def named(*, depth: float | None = None, **key: Any) -> TextSample:
        if depth is not None:
            raise ValueError(f"{name} draws its own depths, got depth={depth}")
        return replace(make(**key), task=name)

    return named


def _maker2(name: str, material: Material, counter: Counter) -> Callable[..., TextSample]:
    """Return the function that makes samples of a task of RULER v2."""
    own, arguments = _RULER2_NAMES[name], {}
    domain = RULER2[own].domain
    if domain == "questions":
        arguments["pool"] = read_pool(material.mmlu)
    elif domain == "documents":
        if material.hotpot is None:
            raise ValueError(
                f"{name} needs the option hotpot: HotpotQA's hotpot_dev_distractor_v1.json"
            )
        arguments["library"] = read_supporting(material.hotpot)
    words = wonder_words() if domain == "numbers" else python_words()
    none = Filler((), "none")
    return _named(
        name, partial(ruler2, own, counter=counter, filler=none, words=words, **arguments)
    )


def cells(name: str, lengths: Sequence[int], depths: Sequence[float]) -> list[dict[str, Any]]:
    """Return the cells of a task: every length, and for grids every depth."""
    if name in GRIDS:
        return [{"length": length, "depth": depth} for length in lengths for depth in depths]
    return [{"length": length} for length in lengths]


def samples(
    name: str,
    *,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    n: int,
    seed: int = 0,
    material: Material | None = None,
    chat: bool | str = False,
    **options: Any,
) -> list[TextSample]:
    """Return ``n`` samples for every cell of a task, cell by cell.

    Args:
        name: one of :data:``NAMES``.
        tokenizer: counts the tokens.
        lengths: tokens per sample.
        depths: of the needle, for grids.
        n: samples per cell.
        seed: of the run.
        material: texts and questions of the user.
        chat: put each prompt into the tokenizer's chat template, or into RULER's of that name; its
            tokens count as well.
        options: of the task (``pairs`` of kv_recall, ``hops`` of latent_niah).

    Raises:
        ValueError: an unknown task, missing material, or a length that is too short.
    """

    taken = template_tokens(tokenizer, chat) if chat else 0

    def one(make: Callable[..., TextSample], index: int, cell: dict[str, Any]) -> TextSample:
        fitting = {**cell, "length": cell["length"] - taken}
        sample = make(index=index, seed=seed, **fitting, **options)
        return in_chat(sample, tokenizer, cell["length"], chat) if chat else sample

    def made(counter: Counter) -> list[TextSample]:
        make = maker(name, material or Material(), counter)
        return [
            one(make, index, cell) for cell in cells(name, lengths, depths) for index in range(n)
        ]

    counter = Counter(tokenizer)
    found = made(counter)
    return made(Counter(tokenizer, by_pieces=False)) if counter.disagreed else found
