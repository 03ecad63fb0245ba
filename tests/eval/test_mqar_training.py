"""Options of the MQAR source that are for training rows."""

import numpy as np
import pytest

from hybrid_eval.mqar import mqar
from hybrid_eval.scoring import IGNORE


def test_rows_of_random_size_are_filled_with_repeated_queries():
    source = mqar(sequence_length=64, pairs=16, min_pairs=2, repeat=True)
    sizes = set()
    for row in source.take(60):
        ids, labels = row["input_ids"], row["labels"]
        asked = np.flatnonzero(labels != IGNORE)
        first = int(asked[0]) - 1  # the first query ends the list of pairs
        answers = dict(zip(ids[0:first:2], ids[1:first:2], strict=True))
        sizes.add(len(answers))
        assert len(asked) == (64 - first) // 2
        assert all(labels[at] == ids[at] == answers[ids[at - 1]] for at in asked)
        # nobody is asked a second time before all were asked once
        rounds = [ids[at - 1] for at in asked]
        assert len(set(rounds[: len(answers)])) == min(len(rounds), len(answers))
    assert min(sizes) >= 2
    assert max(sizes) <= 16
    assert len(sizes) > 8


@pytest.mark.parametrize(
    "options", [{"min_pairs": 0}, {"min_pairs": 5}, {"min_pairs": 2, "queries": 3}]
)
def test_sizes_that_do_not_fit_are_named(options):
    with pytest.raises(ValueError, match="min_pairs"):
        mqar(sequence_length=64, pairs=4, **options)
