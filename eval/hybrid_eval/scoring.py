"""Teacher-forced scoring: one forward per batch, with logits only at scored positions.

Letters: B rows, T tokens, P scored positions, C vocabulary.

A row is ``{"input_ids": T ids, "labels": T ids}`` in the convention of transformers: the label
at position t is predicted *from position t - 1*, and -100 means no label.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import NotFiniteError

Row = Mapping[str, Any]
Progress = Callable[[int, int], None]

IGNORE = -100
_TOKENS_PER_BATCH = {"cpu": 8192, "cuda": 131072}
_LOGITS_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Scored:
    """Scores of one row.

    Attributes:
        correct: per labelled token, whether the label has the largest logit.
        nll: per labelled token, negative log-likelihood in nats.
        positions: positions of the labels in the row.
    """

    correct: np.ndarray
    nll: np.ndarray
    positions: np.ndarray

    @property
    def exact(self) -> bool:
        """Whether every labelled token is correct, so that greedy decoding returns this answer."""
        return bool(self.correct.all())


def takes_logits_to_keep(model: torch.nn.Module) -> bool:
    """Return whether the model's forward accepts ``logits_to_keep``."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch the model to evaluation mode, and restore the previous mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def finite_logits(model: torch.nn.Module) -> Iterator[None]:
    """Raise an error at the first NaN logits, from which greedy decoding would choose some token.

    Checks the last position, which decoding reads, so that left padding is ignored.
    """

    def check(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, torch.Tensor) and logits[:, -1:].isnan().any():
            raise NotFiniteError("the model's logits are NaN; there is nothing to measure")

    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def device_of(model: torch.nn.Module) -> torch.device:
    """Return the device for inputs of the model."""
    return next(model.parameters()).device


def position_limit(model: torch.nn.Module) -> int | None:
    """Return the maximum number of positions of a model, or None without a limit.

    Uses the config of the text model in multimodal configs.
    """
    config = getattr(model, "config", None)
    for part in (getattr(config, "text_config", None), config):
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            found = getattr(part, name, None)
            if isinstance(found, int) and found > 0:
                return found
    return None


def check_length(model: torch.nn.Module, length: int, *, allow_longer: bool = False) -> None:
    """Refuse rows that exceed the maximum length of the model.

    Raises:
        ValueError: ``length`` exceeds the config's ``max_position_embeddings``.
    """
    limit = position_limit(model)
    if limit is not None and length > limit and not allow_longer:
        raise ValueError(
            f"length {length} is beyond this model's max_position_embeddings = {limit}; ask for at "
            f"most {limit} tokens, or allow longer ones if you want to measure extrapolation "
            "(--allow-longer)"
        )


def check_ids(model: torch.nn.Module, rows: Sequence[Row]) -> None:
    """Refuse token ids without an embedding in the model.

    Raises:
        ValueError: an id is at or past the vocabulary's size.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None or not rows:
        return
    size = embeddings.weight.shape[0]
    largest = max(int(np.max(row["input_ids"])) for row in rows)
    if largest >= size:
        raise ValueError(
            f"token id {largest} does not exist in a vocabulary of {size}; choose key_ids and "
            "value_ids inside it"
        )


def batch_size_for(model: torch.nn.Module, length: int, kept: int) -> int:
    """Return a batch size for a row length and a number of kept logits."""
    kind = device_of(model).type
    by_tokens = _TOKENS_PER_BATCH.get(kind, _TOKENS_PER_BATCH["cuda"]) // max(length, 1)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 50_000) or 50_000
    positions = kept if takes_logits_to_keep(model) else length
    by_logits = _LOGITS_BYTES // (4 * vocabulary * max(positions, 1))
    return max(1, min(by_tokens, by_logits, 256))


def _logits(model, ids_BT: torch.Tensor, positions_P: torch.Tensor) -> torch.Tensor:
    """Return float32 logits (B, P, C) at the given positions."""
    if takes_logits_to_keep(model):
        logits = model(ids_BT, logits_to_keep=positions_P, use_cache=False).logits
    else:
        logits = model(ids_BT, use_cache=False).logits
    if logits.shape[1] == ids_BT.shape[1]:
        logits = logits[:, positions_P]
    return logits.float()


@torch.inference_mode()
def _score_batch(model, batch: Sequence[Row]) -> list[Scored]:
    device = device_of(model)
    ids_BT = torch.as_tensor(np.stack([np.asarray(row["input_ids"]) for row in batch]))
    labels_BT = torch.as_tensor(np.stack([np.asarray(row["labels"]) for row in batch]))
    # the label at t is predicted from t - 1, so position 0 has none
    wanted_BT = labels_BT[:, 1:] != IGNORE
    positions_P = wanted_BT.any(0).nonzero().squeeze(-1)
    logits_BPC = _logits(model, ids_BT.to(device), positions_P.to(device))
    targets_BP = labels_BT[:, 1:][:, positions_P].to(device)
    asked_BP = targets_BP != IGNORE
    gathered = logits_BPC.gather(-1, targets_BP.clamp(min=0)[..., None]).squeeze(-1)
    nll_BP = (logits_BPC.logsumexp(-1) - gathered).cpu().double().numpy()
    right_BP = (logits_BPC.argmax(-1) == targets_BP).cpu().numpy()
    asked = asked_BP.cpu().numpy()
    if not np.isfinite(nll_BP[asked]).all():
        raise NotFiniteError(
            f"the loss of {int((~np.isfinite(nll_BP[asked])).sum())} of {int(asked.sum())} tokens "
            "is NaN or infinite, as the model's logits are; there is nothing to measure"
        )
    where = positions_P.cpu().numpy() + 1
    return [
        Scored(right_BP[i][asked[i]], nll_BP[i][asked[i]], where[asked[i]])
        for i in range(len(batch))
    ]


def _score_or_halve(model, batch: Sequence[Row]) -> list[Scored]:
    try:
        return _score_batch(model, batch)
    except torch.cuda.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    middle = len(batch) // 2
    return _score_or_halve(model, batch[:middle]) + _score_or_halve(model, batch[middle:])


def score(
    model: torch.nn.Module,
    rows: Sequence[Row],
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
) -> list[Scored]:
    """Score every row, in order. Batches have rows of one length, without padding.

    Args:
        model: any causal language model whose forward takes ids (B, T) and returns ``.logits``.
        rows: see the head of this file.
        batch_size: rows per forward; None chooses one that fits without full logits.
        progress: called with the number of rows done and of rows in all.
        allow_longer: do not refuse rows beyond ``max_position_embeddings``.

    Raises:
        ValueError: a row is too long for the model, has unknown ids, or has no label.
        NotFiniteError: the model's logits are NaN or infinite.
    """
    for number, row in enumerate(rows):
        if len(row["input_ids"]) != len(row["labels"]):
            raise ValueError(f"row {number}: input_ids and labels differ in length")
        if (np.asarray(row["labels"])[1:] == IGNORE).all():
            raise ValueError(f"row {number}: no label after its first token, nothing to score")
    check_length(
        model, max((len(r["input_ids"]) for r in rows), default=0), allow_longer=allow_longer
    )
    check_ids(model, rows)
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row["input_ids"]), []).append(number)
    results: dict[int, Scored] = {}
    with evaluating(model):
        for length, numbers in by_length.items():
            kept = max(int((np.asarray(rows[n]["labels"]) != IGNORE).sum()) for n in numbers)
            size = batch_size or batch_size_for(model, length, kept)
            for start in range(0, len(numbers), size):
                chunk = numbers[start : start + size]
                scored = _score_or_halve(model, [rows[n] for n in chunk])
                results.update(zip(chunk, scored, strict=True))
                if progress is not None:
                    progress(len(results), len(rows))
    return [results[number] for number in range(len(rows))]
