"""Look-ups in random strings: rows as they are defined, and models that answer by rule."""

import numpy as np
import pytest

from hybrid_eval.lookup import Lookup, evaluate_lookup
from hybrid_eval.registry import TASKS
from hybrid_eval.scoring import IGNORE

BAR = 128


def split(ids):
    ids = list(map(int, ids))
    at = ids.index(BAR)
    return ids[:at], ids[at + 1 :]


def by_content(ids):
    """The token behind the n-gram that the row ends in."""
    if BAR not in ids:
        return None
    string, asked = split(ids)
    places = [i for i in range(len(string)) if string[i : i + len(asked)] == asked]
    return string[places[0] + len(asked)] if asked and places else None


def by_place(ids):
    if BAR not in ids:
        return None
    string, asked = split(ids)
    return string[asked[0] - 162] if asked else None


@pytest.mark.parametrize("gram", [2, 3, 5])
def test_an_ngram_occurs_once_and_has_its_successor_as_the_answer(gram):
    source = Lookup(by="ngram", gram=gram, sequence_length=48)
    for row in source.take(50):
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == len(labels) == 48
        string, (*asked, answer) = split(ids)
        assert len(asked) == gram
        places = [i for i in range(len(string)) if string[i : i + gram] == asked]
        assert len(places) == 1
        assert string[places[0] + gram] == answer
        assert (labels[:-1] == IGNORE).all()
        assert labels[-1] == answer


def test_a_position_is_that_of_the_answer():
    seen = set()
    for row in Lookup(by="position", sequence_length=20).take(200):
        string, (asked, answer) = split(row["input_ids"])
        assert string[asked - 162] == answer == row["labels"][-1]
        seen.add(asked - 162)
    assert seen == set(range(17))  # every place is asked for


def test_models_that_look_up_are_right_and_others_at_chance(rule_model):
    for by, rule in (("ngram", by_content), ("position", by_place)):
        found = evaluate_lookup(rule_model(rule), by=by, lengths=(32, 64), n=16)
        assert found["accuracy"] == 1
        assert [cell["length"] for cell in found["cells"]] == [32, 64]
        assert found["chance"] == 1 / 32
        assert evaluate_lookup(rule_model(lambda ids: 130), by=by, n=64)["accuracy"] < 0.2


def test_rows_depend_on_their_index_alone():
    for by in ("ngram", "position"):
        ahead = Lookup(by=by).skip(7)[7]["input_ids"]
        assert np.array_equal(ahead, Lookup(by=by)[7]["input_ids"])
    evaluated = Lookup()
    evaluated.stream = "test"
    assert not np.array_equal(evaluated[0]["input_ids"], Lookup()[0]["input_ids"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "postion"}, "lookup.by: expected ngram or position, got 'postion'.*position"),
        ({"gram": 0}, "lookup: expected gram >= 1"),
        ({"sequence_length": 8}, "sequence_length of at least 9"),
        ({"by": "position", "sequence_length": 200}, "lookup.place_ids: expected at least 197 ids"),
        ({"gram": 1}, "lookup.gram: expected n-grams that seldom repeat"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Lookup(**options)


def test_it_is_a_task_of_retrieval():
    assert TASKS["lookup"].axis == "retrieval"
    assert {"by", "gram", "lengths"} <= set(TASKS["lookup"].options)
