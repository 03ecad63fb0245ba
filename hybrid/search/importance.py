"""Importance of softmax layers: each one replaced alone, and greedy searches from both ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from hybrid.search.bench import Bench, Proposals
from hybrid.search.config import ImportanceOptions
from hybrid.search.placement import Placement, Space
from hybrid.search.report import Table, with_error
from hybrid.search.scores import Score, Scorer

Harm = Callable[[Score], tuple[float, float]]
"""Damage of a placement, larger is worse: the measure, and the divergence to tell equal ones apart."""


def harm_by(measure: str) -> Harm:
    """Return the damage by ``kl``, or by ``recall``, the mean over the metrics."""
    if measure == "kl":
        return lambda score: (score.kl, score.kl)
    return lambda score: (-(score.retrieval or 0.0), score.kl)


def without_each(space: Space, scorer: Scorer, recall: bool) -> dict[int, Score]:
    """Return layer -> score of the model with the linear mixer in this layer alone."""
    return {i: scorer.score(space.complete - {i}, recall=recall) for i in space.layers}


def ranking(scores: dict[int, Score], measure: str) -> list[int]:
    """Return the layers from the most to the least important."""
    harm = harm_by(measure)
    return sorted(scores, key=lambda i: harm(scores[i]), reverse=True)


def backward(
    space: Space, scorer: Scorer, options: ImportanceOptions, start: dict[int, Score]
) -> list[Placement]:
    """Replace the least harmful layer again and again; return all placements, down to none.

    Args:
        space: the placements.
        scorer: measures them.
        options: measure and shortlist.
        start: scores of ``without_each``.
    """
    harm, recall = harm_by(options.greedy_by), options.greedy_by == "recall"
    last = {i: harm(score) for i, score in start.items()}
    kept, found = space.complete, []
    while kept:
        tried = _shortlist(kept, last, options.shortlist)
        last |= {i: harm(scorer.score(kept - {i}, recall=recall)) for i in tried}
        kept -= {min(tried, key=lambda i: last[i])}
        found.append(kept)
    return found


def forward(space: Space, scorer: Scorer, options: ImportanceOptions) -> list[Placement]:
    """Restore the most useful layer again and again, within the budget; return all placements."""
    harm, recall = harm_by(options.greedy_by), options.greedy_by == "recall"
    kept: Placement = frozenset()
    found: list[Placement] = [kept]
    last: dict[int, tuple[float, float]] = {}
    while True:
        open_layers = [i for i in space.layers if i not in kept and space.fits(kept | {i})]
        if not open_layers:
            return found
        tried = _shortlist(open_layers, last, options.shortlist)
        last |= {i: harm(scorer.score(kept | {i}, recall=recall)) for i in tried}
        kept |= {min(tried, key=lambda i: last[i])}
        found.append(kept)


def _shortlist(
    layers: Iterable[int], last: dict[int, tuple[float, float]], most: int | None
) -> Sequence[int]:
    """Return the layers of least harm when they were last measured; all if one never was."""
    layers = sorted(layers)
    if most is None or any(i not in last for i in layers):
        return layers
    return sorted(layers, key=lambda i: last[i])[:most]


def table(alone: dict[int, Score], whole: Score) -> Table:
    """Return the importance of every layer as title, text, headings and rows of a table."""
    metrics = list(next(iter(alone.values())).recall)
    heads = ["layer", "KL", "loss", *(f"{metric} lost" for metric in metrics)]
    rows = [
        [
            str(i),
            with_error(score.kl, score.kl_error),
            f"{score.loss:.4f}",
            *(f"{whole.recall[metric] - score.recall[metric]:+.3f}" for metric in metrics),
        ]
        for i, score in alone.items()
    ]
    words = "Each softmax layer replaced alone. Without a replacement the loss is"
    return "Importance", f"{words} {whole.loss:.4f}.", heads, rows


def propose(bench: Bench, proposals: Proposals) -> list[Table]:
    """Propose the layers of each ranking, and the placements along each greedy search."""
    options, space, scorer = bench.config.importance, bench.space, bench.scorer
    recall = scorer.retrieval is not None
    measures = [m for m in options.rank if m == "kl" or recall]
    alone = without_each(space, scorer, recall and "recall" in measures)
    for measure in measures:
        order = ranking(alone, measure)
        for count in bench.counts:
            proposals.add(f"rank by {measure}", space.first(order, count))
    for direction in options.greedy:
        if direction == "backward":
            path = backward(space, scorer, options, alone)
        else:
            path = forward(space, scorer, options)
        fitting = [kept for kept in path if space.fits(kept)]
        wanted = {*bench.counts, max(map(len, fitting))}
        for kept in fitting:
            if len(kept) in wanted:
                proposals.add(f"greedy {direction}", kept)
    return [table(alone, scorer.score(space.complete, recall=recall))]
