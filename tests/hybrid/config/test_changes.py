"""Two configurations, compared."""

import pytest

from hybrid.config.changes import changes
from hybrid.config.options import nearest


@pytest.mark.parametrize(
    ("before", "present", "lines"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, ["a.c: was 2, is 3"]),
        (
            {"a": [{"b": 1}]},
            {"a": [{"b": 2}, 5]},
            ["a[0].b: was 1, is 2", "a[1]: was not set, is 5"],
        ),
        (
            {"b": 1, "a": None},
            {"a": {"c": 1}},
            ["a: was None, is {'c': 1}", "b: was 1, is not set"],
        ),
        ({"a": 1}, {"a": 1}, []),
    ],
)
def test_changes_name_the_innermost_key(before, present, lines):
    assert changes(before, present) == lines


@pytest.mark.parametrize(
    ("name", "known", "right"),
    [
        ("num_layer", ["mixers", "num_labels", "num_hidden_layers", "num_head", "nu_laye"],
         "num_hidden_layers"),
        ("layers", ["layout", "num_hidden_layers"], "num_hidden_layers"),
        ("hiden_size", ["hidden_size", "vocab_size"], "hidden_size"),
        ("qqq", ["hidden_size"], None),
        ("", ["hidden_size"], None),
    ],
)  # fmt: skip
def test_the_nearest_name_shares_whole_words(name, known, right):
    assert nearest(name, known) == right
