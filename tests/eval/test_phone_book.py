"""Phone books in bytes: rows as they are defined, and models that answer by rule."""

import re

import numpy as np
import pytest

from hybrid_eval.cells import cell_score
from hybrid_eval.phone_book import PhoneBook, evaluate_phone_book
from hybrid_eval.scoring import IGNORE


def test_a_row_is_a_book_and_questions_about_it():
    source = PhoneBook(sequence_length=128, queries=3, min_entries=4)
    sizes = set()
    for index in range(20):
        row = source[index]
        text = bytes(row["input_ids"].tolist()).decode()
        book = re.findall(r"^([a-z]{3})=(\d{4})$", text, re.M)
        asked = re.findall(r"^\?([a-z]{3})=(\d{4})$", text, re.M)
        assert len({name for name, _ in book}) == len(book)
        assert len(asked) == 3
        assert set(asked) <= set(book)
        scored = [chr(i) for i in row["labels"] if i != IGNORE]
        assert "".join(scored) == "".join(number for _, number in asked)
        at = np.flatnonzero(row["labels"] != IGNORE)
        assert (row["labels"][at] == row["input_ids"][at]).all()
        sizes.add(len(book))
    # short books and books that fill the row: (128 - 3 * 10) // 9 entries
    assert min(sizes) >= 4
    assert max(sizes) <= 10
    assert len(sizes) > 3
    full = PhoneBook(sequence_length=128, queries=3)
    assert full.entries == full.min_entries == 10


def look_up(ids):
    """The digit that follows in the line of the name that was asked for."""
    text = bytes(ids).decode()
    question = re.search(r"\?([a-z]{3}=\d{0,3})$", text)
    if question is None:
        return None
    line = re.search(rf"^{question[1]}(\d)", text, re.M)
    return None if line is None else ord(line[1])


def test_a_reader_is_right_and_a_model_without_memory_is_not(rule_model):
    found = evaluate_phone_book(rule_model(look_up), lengths=(64, 128), n=8, queries=2)
    assert found["accuracy"] == 1
    assert [cell["length"] for cell in found["cells"]] == [64, 128]
    blind = evaluate_phone_book(rule_model(lambda ids: ord("7")), n=64)
    assert blind["accuracy"] <= 0.02
    # half of the digits are not half of a number
    half = rule_model(lambda ids: look_up(ids) if bytes(ids)[-2:-1] in b"=?" else None)
    assert evaluate_phone_book(half, n=16)["accuracy"] < 0.1


def test_a_cell_has_its_items(rule_model):
    """Right at one length only."""
    model = rule_model(lambda ids: look_up(ids) if len(ids) < 64 else None)
    result = evaluate_phone_book(model, lengths=(64, 128), n=8, queries=2)
    result |= {"task": "phone_book", "metric": "accuracy"}
    short, long = (cell_score(result, {"length": length}) for length in (64, 128))
    assert (short.value, long.value) == (1.0, 0.0)
    assert (short.items, long.items) == ((1.0,) * 8, (0.0,) * 8)
    whole = cell_score(result, {})
    assert (whole.value, len(whole.items)) == (0.5, 16)
    with pytest.raises(ValueError, match="phone_book: no cell with length=99; length: 64, 128"):
        cell_score(result, {"length": 99})


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"20 entries and 4 queries take 220 tokens, .* is 128"):
        PhoneBook(entries=20)
    with pytest.raises(ValueError, match="got queries=9, min_entries=4"):
        PhoneBook(sequence_length=256, min_entries=4, queries=9)
