import numpy as np
import pytest

from hybrid_eval.corpus import Corpus, Document
from hybrid_eval.needle import evaluate_needle, needle, needle_row
from hybrid_eval.tokens import ByteEncoder, Haystack

HAYSTACK = Haystack(
    Corpus((Document("d", "the quick brown fox jumps over the lazy dog. " * 40),), "a pangram"),
    ByteEncoder(),
)


@pytest.mark.parametrize("needles", [1, 5])
@pytest.mark.parametrize("length", [32, 77, 500])
@pytest.mark.parametrize("depth", [0.0, 0.33, 1.0])
def test_a_cell_is_exact(length, depth, needles):
    for index in range(5):
        row = needle_row(
            length=length, depth=depth, index=index, haystack=HAYSTACK, needles=needles
        )
        ids = row["input_ids"]
        assert len(ids) == len(row["labels"]) == length
        place = row["needle_position"]
        assert (ids[place], ids[place + 1]) == (ids[-2], ids[-1])
        assert list(np.flatnonzero(row["labels"] != -100)) == [length - 1]
        # the key occurs twice: in the needle and in the question
        assert list(np.flatnonzero(ids == ids[-2])) == [place, length - 2]
        # one token off at most, and only to keep a distractor in one piece
        assert abs(place - depth * (length - 4)) <= (0.5 if needles == 1 else 1.5)


def test_the_text_around_the_needle_is_the_haystack():
    row = needle_row(length=120, depth=0.5, index=0, haystack=HAYSTACK)
    place = row["needle_position"]
    text = np.delete(row["input_ids"][:-2], [place, place + 1])
    assert bytes(text.tolist()).decode() in "the quick brown fox jumps over the lazy dog. " * 80


def test_samples_do_not_depend_on_what_was_drawn_before():
    alone = needle_row(length=64, depth=0.5, index=3, haystack=HAYSTACK)
    for index in (0, 1, 2):
        needle_row(length=32, depth=0.0, index=index, haystack=HAYSTACK)
    again = needle_row(length=64, depth=0.5, index=3, haystack=HAYSTACK)
    np.testing.assert_array_equal(alone["input_ids"], again["input_ids"])


def test_the_grid_counts_every_cell(recall_model):
    result = evaluate_needle(
        recall_model, lengths=(32, 64), depths=(0, 0.5, 1), n=4, needles=3, haystack=HAYSTACK
    )
    assert result["accuracy"] == 1.0
    assert [(c["length"], c["depth"]) for c in result["cells"]] == [
        (length, depth) for length in (32, 64) for depth in (0, 0.5, 1)
    ]
    assert all(cell["n"] == 4 and cell["accuracy"] == 1.0 for cell in result["cells"])
    assert len(result["items"]) == 24


def test_each_cell_has_its_own_score(rule_model):
    def forgetful(ids):
        """Recalls what is among the last 40 tokens."""
        window = ids[-40:]
        return window[window.index(ids[-1]) + 1] if ids[-1] in window[:-1] else 0

    result = evaluate_needle(
        rule_model(forgetful), lengths=(200,), depths=(0, 1), n=5, haystack=HAYSTACK
    )
    assert [cell["accuracy"] for cell in result["cells"]] == [0.0, 1.0]
    assert result["accuracy"] == 0.5


def test_training_rows_can_be_answered_by_recall():
    source = needle(sequence_length=90, needles=4, haystack=HAYSTACK)
    lengths = set()
    for row in source.take(50):
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == len(labels) == 90
        asked = np.flatnonzero(labels != -100)
        assert 1 <= len(asked) <= 4
        for at in asked:
            first = int(np.flatnonzero(ids == ids[at - 1])[0])
            assert first < at - 1
            assert labels[at] == ids[first + 1] == ids[at]
        lengths.add(int(np.flatnonzero(ids >= 128)[0]))
    assert len(lengths) > 10


def test_a_haystack_has_no_reserved_ids():
    corpus = Corpus((Document("d", "na\u00efve caf\u00e9"),), "accents")
    stack = Haystack(corpus, ByteEncoder(), ((128, 256),))
    assert bytes(stack.ids.tolist()) == b"nave caf"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 3}, "take 4 tokens, got 3"),
        ({"needles": 65}, "needles must be 1 .. 64"),
        ({"depth": 1.5}, r"depth must lie in \[0, 1\]"),
    ],
)
def test_bad_cells_are_named(options, words):
    arguments = {"length": 64, "depth": 0.5, "index": 0, "haystack": HAYSTACK, **options}
    with pytest.raises(ValueError, match=words):
        needle_row(**arguments)


def test_a_length_beyond_the_model_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="max_position_embeddings = 512"):
        evaluate_needle(tiny_llama, lengths=(513,), depths=(0,), n=1, haystack=HAYSTACK)
    result = evaluate_needle(
        tiny_llama, lengths=(513,), depths=(0,), n=1, haystack=HAYSTACK, allow_longer=True
    )
    assert result["n"] == 1
