"""Score natural-language tasks: teacher-forced in one forward, or by greedy generation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from ..scoring import (
    IGNORE,
    Progress,
    check_length,
    device_of,
    evaluating,
    finite_logits,
    score,
)
from ..stats import above_chance, mean_and_error, proportion_interval
from ..tokens import Encoder, continuation_ids, prompt_ids
from .chat import text_ids
from .matching import string_match
from .sample import TextSample
from .tasks import DEPTHS, Material, cells, generates, samples

Mode = Literal["forced", "generate"]


def forced_row(sample: TextSample, tokenizer: Encoder) -> dict[str, np.ndarray]:
    """Return the row that scores a sample's answer in one forward."""
    found, start = continuation_ids(tokenizer, sample.text, sample.answer, special=sample.special)
    ids = np.asarray(found, dtype=np.int64)
    labels = ids.copy()
    labels[:start] = IGNORE
    return {"input_ids": ids, "labels": labels}


def read_again(sample: TextSample, reads: int, tokenizer: Encoder) -> TextSample:
    """Return a sample whose prompt is given several times, each with the question."""
    prompt = "\n\n".join([*[sample.text] * (reads - 1), sample.prompt])
    again = replace(sample, prompt=prompt, details=sample.details | {"reads": reads})
    return replace(again, prompt_tokens=len(prompt_ids(tokenizer, again.text)))


@torch.inference_mode()
def generate(model, tokenizer: Encoder, sample: TextSample) -> str:
    """Return the greedy continuation of a sample's prompt."""
    found = (
        prompt_ids(tokenizer, sample.text)
        if sample.special
        else text_ids(tokenizer, sample.text, special=False)
    )
    ids = torch.as_tensor([found], device=device_of(model))
    pad = getattr(tokenizer, "pad_token_id", None)
    with evaluating(model), finite_logits(model):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sample.max_new_tokens,
            do_sample=False,
            pad_token_id=pad if pad is not None else getattr(tokenizer, "eos_token_id", None),
        )
    answer = tokenizer.decode(output[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
    return answer if sample.stop is None else answer.partition(sample.stop)[0]


def _generated(model, tokenizer, made: Sequence[TextSample], progress: Progress | None):
    scores, answers = [], []
    for done, sample in enumerate(made, 1):
        # one at a time, because many hybrid implementations handle padding incorrectly
        answers.append(generate(model, tokenizer, sample))
        scores.append(string_match(sample.outputs, answers[-1], sample.match))
        if progress is not None:
            progress(done, len(made))
    return scores, answers


def _cell_results(
    grid: Sequence[dict[str, Any]],
    n: int,
    made: Sequence[TextSample],
    scores: Sequence[float],
    nll: Sequence[float] | None,
) -> list[dict[str, Any]]:
    found = []
    for number, cell in enumerate(grid):
        part = slice(number * n, (number + 1) * n)
        accuracy, error = mean_and_error(scores[part])
        tokens = [sample.prompt_tokens for sample in made[part]]
        found.append(
            {
                **cell,
                "accuracy": accuracy,
                "stderr": error,
                "interval": proportion_interval(sum(scores[part]), n),
                "nll": None if nll is None else mean_and_error(nll[part])[0],
                "n": n,
                "prompt_tokens": {"min": min(tokens), "max": max(tokens)},
            }
        )
    return found


def measure(
    model,
    made: Sequence[TextSample],
    *,
    tokenizer: Encoder,
    mode: Mode,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
) -> dict[str, Any]:
    """Score samples in one of the two modes.

    Args:
        model: a causal language model.
        made: the samples.
        tokenizer: the model's.
        mode: as of :func:``evaluate_text``.
        batch_size: rows per forward; None chooses.
        progress: called with the number of samples done and of samples in all.
        allow_longer: permit samples beyond ``max_position_embeddings``.

    Returns:
        accuracy over all samples with standard error and 95% interval, true token counts, and
        per sample "items" (scores) and "nlls" (None for generation).

    Raises:
        ValueError: an unknown mode, or a sample that the model cannot take.
    """
    if mode not in ("forced", "generate"):
        raise ValueError(f"mode must be 'forced' or 'generate', got {mode!r}")
    longest = max(sample.prompt_tokens + sample.max_new_tokens for sample in made)
    check_length(model, longest, allow_longer=allow_longer)
    nlls, answers = None, None
    if mode == "forced":
        rows = [forced_row(sample, tokenizer) for sample in made]
        scored = score(
            model, rows, batch_size=batch_size, progress=progress, allow_longer=allow_longer
        )
        scores = [float(row.exact) for row in scored]
        nlls = [float(row.nll.sum()) for row in scored]
    else:
        scores, answers = _generated(model, tokenizer, made, progress)
    accuracy, error = mean_and_error(scores)
    tokens = [sample.prompt_tokens for sample in made]
    result: dict[str, Any] = {
        "accuracy": accuracy,
        "accuracy_stderr": error,
        "interval": proportion_interval(sum(scores), len(scores)),
        "chance": 0.0,
        "above_chance": above_chance(accuracy, 0.0),
        "n": len(scores),
        "tokens": {"min": min(tokens), "max": max(tokens)},
        "truncated": 0,
        "haystack": made[0].haystack,
        "mode": mode,
        "chat": made[0].template,
        "items": scores,
        "nlls": nlls,
    }
    if nlls is not None:
        result["nll"], result["nll_stderr"] = mean_and_error(nlls)
    if answers is not None:
        result["answers"] = answers
    return result


def evaluate_text(
    model,
    *,
    task: str,
    tokenizer: Encoder,
    lengths: Sequence[int] = (512, 1024, 2048, 4096),
    depths: Sequence[float] = DEPTHS,
    n: int = 20,
    mode: Mode | None = None,
    chat: bool | str = False,
    reads: int = 1,
    material: Material | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Measure one natural-language task at several lengths.

    Args:
        model: a causal language model.
        task: a name from :data:``hybrid_eval.text.tasks.NAMES``.
        tokenizer: the model's.
        lengths: tokens per sample; prompt, answer prefix and room for generation.
        depths: of the needle, for grids.
        n: samples per cell.
        mode: "generate" decodes greedily and looks for the answers, as RULER does; "forced" scores
            the reference answer in one forward: accuracy is whether greedy decoding would give
            exactly it, its parts in one order and joined by commas, and nll its negative
            log-likelihood in nats. None is "generate" for RULER's tasks and "forced" for grids.
        chat: put each prompt into the tokenizer's chat template, or into RULER's of that name.
        reads: how often the model reads the prompt, question included; 2 is just-read-twice (arXiv
            2407.05483). The samples are those of one read, so a prompt has about ``reads`` times
            ``lengths`` tokens; results have the true counts.
        material: texts and questions of the user.
        seed: of the samples.
        batch_size: rows per forward; None chooses.
        progress: called with the number of samples done and of samples in all.
        allow_longer: permit lengths beyond ``max_position_embeddings``.
        options: of the task.

    Returns:
        accuracy over all samples with standard error and 95% interval, "cells" with the same
        for each length (and depth), and the true token counts.

    Raises:
        ValueError: as :func:``hybrid_eval.text.tasks.samples``, or a length that the model cannot
            take.
    """
    check_length(model, max(lengths), allow_longer=allow_longer)
    if reads > 1 and chat:
        raise ValueError(f"reads: expected 1 with a chat template, got {reads}; try chat=False")
    if mode is None:
        mode = "generate" if generates(task) else "forced"
    made = samples(
        task,
        tokenizer=tokenizer,
        lengths=lengths,
        depths=depths,
        n=n,
        seed=seed,
        material=material,
        chat=chat,
        **options,
    )
    if reads > 1:
        made = [read_again(sample, reads, tokenizer) for sample in made]
    measured = measure(
        model,
        made,
        tokenizer=tokenizer,
        mode=mode,
        batch_size=batch_size,
        progress=progress,
        allow_longer=allow_longer,
    )
    grid = cells(task, lengths, depths)
    measured["cells"] = _cell_results(grid, n, made, measured["items"], measured.pop("nlls"))
    return measured
