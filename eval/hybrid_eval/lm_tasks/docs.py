"""Data sets and metrics of the YAML tasks beside this file, for lm-eval's ``--include_path``.

lm-eval calls ``docs.TASK(**metadata)`` for the documents of a task. What may stand in
``--metadata`` (or, for the first three, in ``--model_args``):

    tokenizer, pretrained   counts the tokens (path or name)
    max_length              the model's; needed where its config states none
    lengths                 tokens per sample, default [4096]; powers of two
    depths                  of the needle, for niah_grid, kv_recall and latent_niah
    samples                 per length (and depth), default 20
    seed                    default 0
    text, essays, squad, hotpot, mmlu   paths of your own material
"""

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import datasets
from transformers import AutoConfig, AutoTokenizer

from hybrid_eval.corpus import load_corpus
from hybrid_eval.text.matching import string_match
from hybrid_eval.text.tasks import DEPTHS, NAMES, Material, cells, samples

# lm-eval wants every metric declared in the YAML; these lengths are
LENGTHS = tuple(2**power for power in range(8, 21))
# to this lm-eval's HFLM cuts the prompts of a model that states no length
_HFLM_FALLBACK = 2048


def _limit(metadata: dict[str, Any], tokenizer: Any) -> int:
    """Return the number of tokens beyond which HFLM would cut a prompt, as HFLM finds it."""
    if metadata.get("max_length"):
        return int(metadata["max_length"])
    if isinstance(metadata.get("pretrained"), str):
        config = AutoConfig.from_pretrained(metadata["pretrained"])
        for name in ("n_positions", "max_position_embeddings", "n_ctx"):
            if getattr(config, name, None):
                return getattr(config, name)
    stated = getattr(tokenizer, "model_max_length", None)
    return stated if stated and stated < 10**12 else _HFLM_FALLBACK


def _check(lengths: Sequence[int], metadata: dict[str, Any], tokenizer: Any) -> None:
    for length in lengths:
        if length not in LENGTHS:
            raise ValueError(f"lengths are powers of two from 256 to 1048576, got {length}")
    limit = _limit(metadata, tokenizer)
    if max(lengths) > limit:
        raise ValueError(
            f"lm-eval would cut samples of {max(lengths)} tokens to {limit}: the model states no "
            f"greater length; pass max_length={max(lengths)} in --model_args if it can take them"
        )


def documents(task: str, **metadata: Any) -> dict[str, datasets.Dataset]:
    """Return the documents of a task.

    They are interleaved, one of each length and depth in turn, so that ``--limit`` takes the same
    share of all of them.

    Raises:
        ValueError: no tokenizer, a length that lm-eval would cut, or as
            :func:`hybrid_eval.text.tasks.samples`.
    """
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not isinstance(name, str):
        raise ValueError('no tokenizer to count with; pass --metadata \'{"tokenizer": "PATH"}\'')
    tokenizer = AutoTokenizer.from_pretrained(name)
    lengths = metadata.get("lengths") or metadata.get("max_seq_lengths") or [4096]
    _check(lengths, metadata, tokenizer)
    depths = metadata.get("depths") or DEPTHS
    count = int(metadata.get("samples", 20))
    read = {key: load_corpus(metadata[key]) for key in ("text", "essays") if metadata.get(key)}
    material = Material(
        read.get("text"),
        read.get("essays"),
        metadata.get("squad"),
        metadata.get("hotpot"),
        metadata.get("words"),
        metadata.get("mmlu"),
    )
    made = samples(
        task,
        tokenizer=tokenizer,
        lengths=lengths,
        depths=depths,
        n=count,
        seed=int(metadata.get("seed", 0)),
        material=material,
    )
    groups = [
        made[number * count : (number + 1) * count]
        for number in range(len(cells(task, lengths, depths)))
    ]
    rows = [sample.as_dict() for turn in zip_longest(*groups) for sample in turn]
    for row, sample in zip(rows, (s for turn in zip_longest(*groups) for s in turn), strict=True):
        row["answer"] = sample.answer
        # one column of one type for all rows
        row["details"] = repr(sample.details)
    return {"test": datasets.Dataset.from_list(rows)}


def __getattr__(name: str):
    """Return the data set function of a task: ``!function docs.niah_grid``."""
    if name in NAMES:
        return partial(documents, name)
    raise AttributeError(f"no task {name!r} in {__name__}")


def score_generation(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return the score of one answer under its own length, and under "accuracy"."""
    score = string_match(doc["outputs"], results[0], doc["match"])
    return {"accuracy": score, str(doc["length"]): score}


def score_forced(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Return whether greedy decoding would give the answer, and its negative log-likelihood."""
    ((loglikelihood, greedy),) = results
    score = float(greedy)
    return {"accuracy": score, "nll": -loglikelihood, str(doc["length"]): score}
