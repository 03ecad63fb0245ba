"""Multi-query associative recall (MQAR), after Zoology (arXiv 2312.04927, section 4 and appendix).

A row lists key-value pairs and then repeats the keys as queries:

    k1 v1 k2 v2 ... kN vN | . . k2 v2 . . kN vN k1 v1 . .
                                   ^^ scored: the model must predict it from k2

Two intentional differences from Zoology: values are drawn with replacement, because unique values
can be inferred by elimination; the value follows its query in the row, so that the same row is used
for training and for teacher-forced scoring.
"""

from typing import Any, Literal

import numpy as np

from .errors import id_range
from .scoring import IGNORE, Progress, score
from .sources import Source
from .stats import above_chance, clustered_interval, ratio_and_error

# bytes that ASCII text never uses, so that one byte-level model can learn text and recall
KEY_IDS = (128, 192)
VALUE_IDS = (192, 256)
FILLER_IDS = (0, 128)

Gap = Literal["power", "uniform"]


class MQAR(Source):
    """Endless MQAR rows; see :func:``mqar`` for the arguments."""

    name = "mqar"

    def __init__(
        self,
        *,
        sequence_length: int,
        pairs: int,
        queries: int | None,
        key_ids: tuple[int, int],
        value_ids: tuple[int, int],
        filler_ids: tuple[int, int],
        gap: Gap,
        power: float,
        min_pairs: int | None = None,
        repeat: bool = False,
        seed: int,
        start: int = 0,
        stream: str = "train",
    ):
        super().__init__(sequence_length=sequence_length, seed=seed, start=start, stream=stream)
        self.pairs = pairs
        self.queries = pairs if queries is None else queries
        self.min_pairs, self.repeat = pairs if min_pairs is None else min_pairs, repeat
        self.key_ids, self.value_ids, self.filler_ids = key_ids, value_ids, filler_ids
        self.slots = (sequence_length - 2 * pairs) // 2
        self._validate(gap)
        weights = np.arange(1, self.slots + 1, dtype=np.float64)
        weights = weights ** (power - 1) if gap == "power" else np.ones_like(weights)
        self.slot_probabilities = weights / weights.sum()

    def _validate(self, gap: str) -> None:
        if max(self.key_ids[0], self.filler_ids[0]) < min(self.key_ids[1], self.filler_ids[1]):
            raise ValueError(
                f"filler_ids {self.filler_ids} overlap key_ids {self.key_ids}: a filler would "
                "look like a query"
            )
        if gap not in ("power", "uniform"):
            raise ValueError(f"gap must be 'power' or 'uniform', got {gap!r}")
        if self.pairs < 1 or not 1 <= self.queries <= self.pairs:
            raise ValueError(
                f"need 1 <= queries <= pairs, got queries={self.queries}, pairs={self.pairs}"
            )
        if not 1 <= self.min_pairs <= self.pairs or (
            self.min_pairs < self.pairs and self.queries != self.pairs
        ):
            raise ValueError(
                f"need 1 <= min_pairs <= pairs, and no queries beside min_pairs, got min_pairs="
                f"{self.min_pairs}, pairs={self.pairs}, queries={self.queries}"
            )
        keys = self.key_ids[1] - self.key_ids[0]
        if self.pairs > keys:
            raise ValueError(
                f"{self.pairs} pairs need as many different keys, key_ids {self.key_ids} has {keys}"
            )
        needed = 2 * (self.pairs + self.queries)
        if self.sequence_length < needed:
            raise ValueError(
                f"{self.pairs} pairs and {self.queries} queries take {needed} tokens, "
                f"sequence_length is {self.sequence_length}"
            )

    @property
    def chance(self) -> float:
        """Accuracy of a random guess among the values of the row."""
        return 1 / min(self.pairs, self.value_ids[1] - self.value_ids[0])

    def draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Make one row from a generator of its own."""
        pairs, queries = self.pairs, self.queries
        if self.min_pairs < pairs:
            pairs = queries = int(rng.integers(self.min_pairs, pairs + 1))
        keys = rng.choice(np.arange(*self.key_ids), pairs, replace=False)
        values = rng.integers(*self.value_ids, pairs)
        ids = rng.integers(*self.filler_ids, self.sequence_length)
        labels = np.full(self.sequence_length, IGNORE, dtype=np.int64)
        context = 2 * pairs
        ids[0:context:2], ids[1:context:2] = keys, values
        if self.repeat:
            slots = np.arange((self.sequence_length - context) // 2)
            rounds = -(-len(slots) // pairs)
            orders = [rng.permutation(pairs) for _ in range(rounds)]
            asked = np.concatenate(orders)[: len(slots)]
        else:
            asked = rng.choice(pairs, queries, replace=False)
            slots = rng.choice(self.slots, queries, replace=False, p=self.slot_probabilities)
        at = context + 2 * slots
        ids[at], ids[at + 1] = keys[asked], values[asked]
        labels[at + 1] = values[asked]
        return {"input_ids": ids, "labels": labels}


def mqar(
    *,
    sequence_length: int = 128,
    pairs: int = 32,
    queries: int | None = None,
    key_ids: tuple[int, int] = KEY_IDS,
    value_ids: tuple[int, int] = VALUE_IDS,
    filler_ids: tuple[int, int] = FILLER_IDS,
    gap: Gap = "power",
    power: float = 0.01,
    min_pairs: int | None = None,
    repeat: bool = False,
    seed: int = 0,
    start: int = 0,
    tokenizer: Any = None,
) -> MQAR:
    """Return an endless, index-seeded source of MQAR rows for training.

    Args:
        sequence_length: tokens per row, at least 2 * (pairs + queries).
        pairs: key-value pairs at the head of the row; keys differ within a row.
        queries: number of queries; None for all pairs.
        key_ids: half-open range of token ids to draw keys from.
        value_ids: the same for values.
        filler_ids: the same for tokens that are neither; must not overlap ``key_ids``.
        gap: distribution of the query positions: "power" (Zoology's power law, mostly early) or
            "uniform".
        power: exponent a of the power law a * slot^(a - 1).
        min_pairs: draw the number of pairs from this to ``pairs`` and query all, so that easy rows
            help training. None: always ``pairs``.
        repeat: repeat the queries in new orders until the row is full, for more labels per row.
        seed: of the stream.
        start: index of the first row.
        tokenizer: ignored; accepted since trainers pass it to every source.

    Raises:
        ValueError: inconsistent sizes.
    """
    return MQAR(
        sequence_length=sequence_length,
        pairs=pairs,
        queries=queries,
        key_ids=id_range("key_ids", key_ids),
        value_ids=id_range("value_ids", value_ids),
        filler_ids=id_range("filler_ids", filler_ids),
        gap=gap,
        power=power,
        min_pairs=min_pairs,
        repeat=repeat,
        seed=seed,
        start=start,
    )


def evaluate_mqar(
    model,
    *,
    n: int = 256,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Measure recall on ``n`` fresh rows, teacher-forced, one forward per batch.

    The rows come from a separate stream that training never uses, for any seed.

    Args:
        model: a causal language model.
        n: number of rows.
        seed: of the evaluation rows.
        batch_size: rows per forward; None chooses.
        progress: called with the number of rows done and of rows in all.
        allow_longer: permit rows beyond ``max_position_embeddings``.
        options: as for :func:``mqar``.

    Returns:
        accuracy (over queries) with its standard error over rows and a 95% interval,
        chance, nll (nats per query), and per-row scores for paired comparisons.
    """
    source = mqar(seed=seed, **options)
    source.stream = "test"
    scored = score(
        model,
        source.take(n),
        batch_size=batch_size,
        progress=progress,
        allow_longer=allow_longer,
    )
    right = [int(row.correct.sum()) for row in scored]
    asked = [len(row.correct) for row in scored]
    accuracy, error = ratio_and_error(right, asked)
    nll, nll_error = ratio_and_error([float(row.nll.sum()) for row in scored], asked)
    return {
        "accuracy": accuracy,
        "accuracy_stderr": error,
        "interval": clustered_interval(right, asked),
        "chance": source.chance,
        "above_chance": above_chance(accuracy, source.chance) if source.chance < 1 else None,
        "nll": nll,
        "nll_stderr": nll_error,
        "n": n,
        "pairs": source.pairs,
        "queries": int(sum(asked)),
        "tokens": {"min": source.sequence_length, "max": source.sequence_length},
        "truncated": 0,
        "items": [r / a for r, a in zip(right, asked, strict=True)],
    }
