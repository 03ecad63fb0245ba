"""Cloze after OLMES: prompts, how choices are compared, and what is refused."""

import json
import math

import pytest

from hybrid_eval.olmes import SUITES, evaluate_olmes
from hybrid_eval.registry import TASKS
from hybrid_eval.tokens import ByteEncoder

HUB_ROW = {
    "question": "Which one is a metal?",
    "choices": {"text": ["wood", "iron", "air"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
# AI2's own files, with numbers for letters
FILE_ROW = {
    "question": {
        "stem": "What falls from clouds?",
        "choices": [{"text": "rain", "label": "1"}, {"text": "stones", "label": "2"}],
    },
    "answerKey": "1",
}
SWAG = {
    "activity_label": "Gardening",
    "ctx_a": "A man holds a spade. [header] He digs.",
    "ctx_b": "the man",
    "endings": ["sits  down [title] Then he rests.", "flies."],
    "label": "0",
}


def write(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_questions_stand_as_in_olmes():
    arc, swag = SUITES["olmes_arc_easy"], SUITES["olmes_hellaswag"]
    for row, answer in ((HUB_ROW, "iron"), (FILE_ROW, "rain")):
        question = arc.read(row)
        assert question.text.startswith("Question: Wh")
        assert question.text.endswith("?\nAnswer:")
        assert question.choices[question.answer] == answer
    question = swag.read(SWAG)
    assert question.text == "Gardening: A man holds a spade. He digs. The man"
    assert question.choices == ("sits down. Then he rests.", "flies.")
    ways = {name.removeprefix("olmes_"): suite.normalisation for name, suite in SUITES.items()}
    assert ways == {
        "arc_easy": "characters",
        "arc_challenge": "pmi",
        "csqa": "pmi",
        "hellaswag": "characters",
    }


def test_each_way_to_compare_choices_has_its_own_winner(tmp_path, rule_model):
    """A model that always expects "a": each other letter costs the same."""
    row = {
        "question": "Which?",
        # other letters: 1 of 1, 2 of 4, 4 of 12 (and the space before)
        "choices": {"text": ["b", "abab", "aaaabaaabbba"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    }
    path = write(tmp_path / "arc.jsonl", row)
    model = rule_model(lambda ids: ord("a"))
    found = evaluate_olmes(
        model, task="olmes_arc_easy", tokenizer=ByteEncoder(), path=path, shots=0
    )
    # by itself the shortest wins; by character the one with the smallest share of other letters
    assert found["accuracy_none"] == 1
    assert found["accuracy_characters"] == found["accuracy"] == 0
    assert found["normalisation"] == "characters"
    assert set(found["also"]) == {"accuracy_none", "accuracy_bytes", "accuracy_pmi"}
    assert math.isclose(found["chance"], 1 / 3)


def test_pmi_takes_off_what_a_choice_has_anyway(tmp_path, rule_model):
    """After this question "no" is a little likelier than anyway; "yes" is always likelier."""
    rows = [
        {
            "question": "Does it fly?",
            "choices": {"text": ["y", "n"], "label": ["A", "B"]},
            "answerKey": "B",
        }
    ]
    path = write(tmp_path / "csqa.jsonl", *rows)

    class Tilted(type(rule_model(None))):
        def forward(self, input_ids, **options):
            out = super().forward(input_ids, **options)
            out.logits[..., ord("y")] += 3.0
            if input_ids.shape[1] > 12:  # the question is there
                out.logits[..., ord("n")] += 2.0
            return out

    found = evaluate_olmes(
        Tilted(lambda ids: None), task="olmes_csqa", tokenizer=ByteEncoder(), path=path, shots=0
    )
    assert found["accuracy_none"] == 0
    assert found["accuracy_pmi"] == found["accuracy"] == 1


def test_worked_examples_are_the_same_for_all_and_drop_where_they_do_not_fit(tmp_path, rule_model):
    path = write(tmp_path / "questions.jsonl", HUB_ROW, FILE_ROW)
    worked = [{**HUB_ROW, "question": f"Example {i}?"} for i in range(7)]
    examples = write(tmp_path / "train.jsonl", *worked)
    seen = []

    def rule(ids):
        seen.append(bytes(ids).decode())

    options = {"tokenizer": ByteEncoder(), "path": path, "examples": examples}
    model = rule_model(rule, positions=400)
    found = evaluate_olmes(model, task="olmes_arc_easy", **options)
    assert found["shots"] == {"asked": 5, "used": {"5": 2}}
    shown = {text.rpartition("Question:")[0] for text in seen if "Example" in text}
    assert len(shown) == 1
    assert shown.pop().count("Answer: iron\n\n") == 5
    found = evaluate_olmes(rule_model(rule, positions=100), task="olmes_arc_easy", **options)
    (used,) = found["shots"]["used"]
    assert 0 < int(used) < 5


def test_what_is_missing_is_named(tmp_path, rule_model):
    model, tokenizer = rule_model(lambda ids: None), ByteEncoder()
    path = write(tmp_path / "q.jsonl", HUB_ROW)
    options = {"task": "olmes_csqa", "tokenizer": tokenizer}
    with pytest.raises(ValueError, match=r"olmes_csqa: 5 worked .*examples=FILE, or .*shots=0"):
        evaluate_olmes(model, path=path, **options)
    with pytest.raises(ValueError, match=r"q.jsonl has 1"):
        evaluate_olmes(model, path=path, examples=path, **options)
    broken = write(tmp_path / "b.jsonl", HUB_ROW, {**HUB_ROW, "answerKey": "D"})
    with pytest.raises(ValueError, match=r"b.jsonl, item 2: expected the schema of tau/common"):
        evaluate_olmes(model, path=broken, shots=0, **options)
    with pytest.raises(
        ValueError, match=r"b.jsonl, item 1: .* no 'activity_label'|item 1: .*ctx_a"
    ):
        evaluate_olmes(model, task="olmes_hellaswag", tokenizer=tokenizer, path=broken, shots=0)
    assert TASKS["olmes_csqa"].options == (
        *("n", "shots", "path", "examples", "seed", "batch_size"),
    )
