"""Recall-intensive completions: FDA, SWDE and SQuAD-completion (Based, arXiv 2402.18668).

A document is followed by the beginning of a statement about it; the document contains the answer
literally. Scored as in Based: greedy decoding to the end of the line, correct if it contains the
answer, ignoring case. The documents come from the hub, or from a local file of their schema.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..corpus import read_jsonl
from ..errors import nearest
from ..hub import load_hub
from ..scoring import Progress
from ..seeding import generator
from ..tokens import Encoder
from .counter import Counter
from .evaluate import Mode, measure
from .sample import TextSample

# lm-eval has other tasks called fda, swde and squad_completion
COMPLETIONS = {
    "based_fda": "hazyresearch/based-fda",
    "based_swde": "hazyresearch/based-swde",
    "based_squad": "hazyresearch/based-squad",
}
_ROOM = 48


def _records(task: str, path: str | None) -> tuple[list[dict[str, Any]], str]:
    """Return the documents, and their description for reports."""
    if path is None:
        way_out = f"give a .jsonl file of its schema (text, value), --set {task}.path=FILE"
        name = COMPLETIONS[task]
        return load_hub(name, split="validation", what=task, way_out=way_out), name
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{task}: no file {path}")
    return [record for _, record in read_jsonl(file)], file.name


def completions(
    task: str, *, tokenizer: Encoder, n: int | None = None, seed: int = 0, path: str | None = None
) -> list[TextSample]:
    """Return the samples of a completion task.

    Args:
        task: a key of :data:``COMPLETIONS``.
        tokenizer: counts the tokens.
        n: number of documents; None takes all. A greater number keeps those of a smaller one.
        seed: of the choice.
        path: a .jsonl file with "text" and "value"; None takes the hub's.

    Raises:
        ValueError: an unknown task, no documents, or one without text or answer.
    """
    if task not in COMPLETIONS:
        raise ValueError(f"unknown completion task {task!r}{nearest(task, COMPLETIONS)}")
    records, source = _records(task, path)
    if not records:
        raise ValueError(f"{task}: no documents in {source}")
    order: Sequence[int] = range(len(records))
    if n is not None:
        order = generator(task, "documents", seed).permutation(len(records))[:n].tolist()
    # documents have no common pieces
    counter = Counter(tokenizer, by_pieces=False)
    return [_sample(task, index, records[index], source, counter) for index in order]


def _sample(
    task: str, index: int, record: dict[str, Any], source: str, counter: Counter
) -> TextSample:
    for field in ("text", "value"):
        if not str(record.get(field) or "").strip():
            raise ValueError(
                f"{source}, item {index + 1}: no {field!r}; found {', '.join(sorted(record))}"
            )
    prompt = str(record["text"]).strip()
    tokens = counter.text(prompt)
    return TextSample(
        task=task,
        index=index,
        length=tokens + _ROOM,
        prompt=prompt,
        answer_prefix="",
        outputs=(str(record["value"]).strip(),),
        match="any",
        max_new_tokens=_ROOM,
        prompt_tokens=tokens,
        slack=0,
        filler_tokens=0,
        haystack=source,
        stop="\n",
    )


def evaluate_completion(
    model,
    *,
    task: str,
    tokenizer: Encoder,
    n: int | None = None,
    mode: Mode = "generate",
    path: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
) -> dict[str, Any]:
    """Measure one of the completion tasks.

    Args:
        model: a causal language model.
        task: a key of :data:``COMPLETIONS``.
        tokenizer: the model's.
        n: number of documents; None takes all.
        mode: "generate" as the tasks are defined, or "forced": whether greedy decoding would
            begin with exactly the answer, and its negative log-likelihood.
        path: a .jsonl file with "text" and "value"; None takes the hub's.
        seed: of the choice of documents.
        batch_size: rows per forward; None chooses.
        progress: called with the number of documents done and of all.
        allow_longer: permit documents beyond ``max_position_embeddings``.

    Returns:
        As :func:``hybrid_eval.text.evaluate.measure``.

    Raises:
        ValueError: as :func:``completions``, or a document that the model cannot take whole.
    """
    result = measure(
        model,
        completions(task, tokenizer=tokenizer, n=n, seed=seed, path=path),
        tokenizer=tokenizer,
        mode=mode,
        batch_size=batch_size,
        progress=progress,
        allow_longer=allow_longer,
    )
    del result["nlls"]
    return result
