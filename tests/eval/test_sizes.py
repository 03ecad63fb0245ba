"""What stands beside a figure: how much it was measured on."""

import pytest

from hybrid_eval import evaluate
from hybrid_eval.registry import Settings
from hybrid_eval.report import table_columns
from hybrid_eval.sizes import sizes


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (
            {"n": 256, "tokens": {"min": 128, "max": 128}, "pairs": 16},
            "n 256, 128 tokens, 16 pairs",
        ),
        (
            {"n": 1200, "cells": [{"length": 32}, {"length": 32}, {"length": 64}]},
            "n 1,200 in 3 cells, 32/64 tokens",
        ),
        ({"n": 3, "tokens": {"min": 8, "max": 1024}}, "n 3, 8 to 1,024 tokens"),
        ({}, ""),
    ],
)
def test_sizes_in_words(result, words):
    assert sizes(result) == words


def test_the_table_says_how_much_was_measured(tiny_llama):
    settings = Settings(limit=2, lengths=(16, 32), depths=(0.0, 1.0))
    options = {"mqar": {"pairs": 4, "sequence_length": 32}}
    results = evaluate(tiny_llama, ("mqar", "needle"), settings=settings, options=options)
    notes = {column.heading: column.note for column in table_columns(results)}
    assert notes["mqar: accuracy"] == "n 2, 32 tokens, 4 pairs; 95% interval"
    assert notes["needle: accuracy"] == "n 8 in 4 cells, 16/32 tokens; 95% interval"
