import json

import numpy as np
import pytest

from hybrid_eval.mmlu import evaluate_mmlu, prompt
from hybrid_eval.questions import Item, choose, read_items
from hybrid_eval.speed import evaluate_speed
from hybrid_eval.synthetic import (
    Hops,
    InContextFunction,
    StateTracking,
    evaluate_hops,
    evaluate_icl,
    evaluate_state_tracking,
)
from hybrid_eval.tokens import ByteEncoder


def test_parity_labels_are_the_parity():
    for row in StateTracking(group="parity", sequence_length=40).take(5):
        bits = row["input_ids"] - 128
        np.testing.assert_array_equal(row["labels"][1:] - 130, np.cumsum(bits)[:-1] % 2)


@pytest.mark.parametrize(("group", "order"), [("S3", 6), ("S5", 120), ("A5", 60)])
def test_products_are_those_of_permutation_matrices(group, order):
    source = StateTracking(group=group, sequence_length=30)
    assert len(source.elements) == order
    points = source.elements.shape[1]
    row = source[0]
    product = np.eye(points, dtype=int)
    for t in range(29):
        element = source.elements[row["input_ids"][t] - 128]
        product = np.eye(points, dtype=int)[element].T @ product
        state = source.elements[row["labels"][t + 1] - 128 - order]
        np.testing.assert_array_equal(product, np.eye(points, dtype=int)[state].T)


@pytest.mark.parametrize("modulus", [2, 7, 60])
def test_sums_are_taken_modulo_the_number(modulus):
    source = StateTracking(group=f"Z{modulus}", sequence_length=40)
    row = source[1]
    numbers = row["input_ids"] - 128
    assert numbers.max() < modulus
    expected = np.cumsum(numbers)[:-1] % modulus
    np.testing.assert_array_equal(row["labels"][1:] - 128 - modulus, expected)
    assert source.chance == 1 / modulus


def test_automata_go_by_their_rules():
    row = StateTracking(group="flip_flop", sequence_length=40)[0]
    written = 0
    for symbol, label in zip(row["input_ids"] - 128, row["labels"][1:] - 131, strict=False):
        written = {0: written, 1: 0, 2: 1}[int(symbol)]
        assert label == written
    row = StateTracking(group="cycle_5", sequence_length=40)[0]
    places = np.cumsum(row["input_ids"] - 129)[:-1] % 5
    np.testing.assert_array_equal(row["labels"][1:] - 131, places)
    for group in ("Z1", "Z65", "Z07", "cycle_6"):
        with pytest.raises(ValueError, match=f"unknown group '{group}'"):
            StateTracking(group=group)


def test_one_who_keeps_the_state_scores_one_and_one_who_forgets_does_not(rule_model):
    def parity(ids):
        return 130 + sum(i - 128 for i in ids) % 2

    def forgets(ids):
        return 130 + sum(i - 128 for i in ids[-8:]) % 2

    whole = evaluate_state_tracking(rule_model(parity), lengths=(16, 32), n=8)
    assert whole["accuracy"] == 1.0
    short = evaluate_state_tracking(rule_model(forgets), lengths=(64,), n=16)
    assert short["accuracy"] < 0.75
    assert short["cells"][0]["late"] == pytest.approx(0.5, abs=0.15)


def test_a_chain_takes_as_many_hops_as_it_says(rule_model):
    for k in range(5):
        ids = Hops(hops=k, sequence_length=60)[3]["input_ids"]
        pairs = ids[-42:-2].reshape(-1, 2)
        source = dict(pairs.tolist())
        at, hops = source[int(ids[-2])], 0
        while at in source:
            at, hops = source[at], hops + 1
        assert (at, hops) == (ids[-1], k)

    def one_step(ids):
        return dict(zip(ids[-41:-1:2], ids[-40:-1:2], strict=True))[ids[-1]]

    # the row is 64 tokens, the last of which is the answer and is not read
    found = evaluate_hops(rule_model(one_step), n=8)
    assert found["cells"][0]["accuracy"] == 1.0
    assert found["accuracy"] == 0.0
    assert found["drop"] == 1.0


def test_shots_are_counted(recall_model):
    found = evaluate_icl(recall_model, inputs=4, n=12)
    by_shots = {cell["shots"]: cell["accuracy"] for cell in found["cells"]}
    assert by_shots[0] < 0.5
    assert all(by_shots[shots] == 1.0 for shots in (1, 2, 3, 4))
    assert found["accuracy"] == 1.0
    for row in InContextFunction(inputs=4).take(3):
        pairs = row["input_ids"].reshape(-1, 2)
        assert len(np.unique(pairs, axis=0)) == len(np.unique(pairs[:, 0])) <= 4


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="unknown group 's3'; did you mean 'S3'"):
        StateTracking(group="s3")
    with pytest.raises(ValueError, match="take 42 tokens"):
        Hops(sequence_length=30)


@pytest.fixture
def questions(tmp_path):
    colours = ["red", "green", "blue", "white"]
    for split, numbers in (("dev", range(5)), ("test", range(5, 25))):
        (tmp_path / split).mkdir()
        lines = [
            json.dumps(
                {
                    "question": f"What is the colour of thing {i}?",
                    "choices": [colours[(j + i) % 4] for j in range(4)],
                    "answer": (-i + 2) % 4,
                    "subject": "colours",
                }
            )
            for i in numbers
        ]
        (tmp_path / split / "colours.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_cloze_and_letters_are_different_questions(questions, rule_model):
    """A model that knows the colour but no letters."""
    encoder = ByteEncoder()
    answer = " blue"

    def knows(ids):
        text = bytes(ids).decode()
        begun = text[text.rindex("Answer:") + 7 :]
        return ord(answer[len(begun)]) if len(begun) < len(answer) else None

    arguments = {"tokenizer": encoder, "path": str(questions)}
    cloze = evaluate_mmlu(rule_model(knows), form="cloze", **arguments)
    assert (cloze["accuracy"], cloze["accuracy_norm"], cloze["n"]) == (1.0, 1.0, 20)
    assert cloze["gold_bits_per_byte"] < 0.01
    letters = evaluate_mmlu(rule_model(knows), form="letters", **arguments)
    # all letters are equally unlikely to it; the first is taken
    assert letters["accuracy"] == 0.25
    assert letters["chance"] == 0.25


def test_mmlu_says_its_shots_and_its_subjects(questions, rule_model, tmp_path):
    encoder = ByteEncoder()
    extra = {"question": "Hot?", "choices": ["yes", "no"], "answer": 0, "subject": "heat"}
    (questions / "test" / "heat.jsonl").write_text(json.dumps(extra))
    (questions / "dev" / "heat.jsonl").write_text(json.dumps(extra))

    def yes(ids):
        begun = bytes(ids).decode().rpartition("Answer:")[2]
        return ord(" yes"[len(begun)]) if len(begun) < 4 else None

    found = evaluate_mmlu(
        rule_model(yes), form="cloze", tokenizer=encoder, path=str(questions), unconditioned=True
    )
    assert found["shots"] == {"asked": 5, "used": {"1": 1, "5": 20}}
    assert list(found["subjects"]) == ["colours", "heat"]
    assert (found["subjects"]["heat"]["accuracy"], found["subjects"]["heat"]["n"]) == (1.0, 1)
    assert found["accuracy"] == pytest.approx(
        (20 * found["subjects"]["colours"]["accuracy"] + 1) / 21
    )
    assert found["accuracy_macro"] == pytest.approx(
        (found["subjects"]["colours"]["accuracy"] + 1) / 2
    )
    # " yes" is as likely without its question: what the question adds is nothing
    assert "accuracy_pmi" in found
    assert found["also"] == [
        "accuracy_macro",
        "accuracy_norm",
        "accuracy_norm_chars",
        "accuracy_pmi",
    ]


def test_mmlu_without_examples_is_refused_unless_none_were_asked_for(questions, rule_model):
    import shutil

    shutil.rmtree(questions / "dev")
    arguments = {"form": "cloze", "tokenizer": ByteEncoder(), "path": str(questions)}
    with pytest.raises(ValueError, match=r"none of subject 'colours' in a dev folder .* shots=0"):
        evaluate_mmlu(rule_model(lambda ids: None), **arguments)
    found = evaluate_mmlu(rule_model(lambda ids: None), shots=0, **arguments)
    assert found["shots"] == {"asked": 0, "used": {"0": 20}}


def test_a_prompt_that_is_too_long_has_fewer_shots(questions, rule_model):
    items, worked = read_items(questions)
    whole = len(prompt(items[0], worked["colours"][:5], "cloze")) + len(" green")
    arguments = {"form": "cloze", "tokenizer": ByteEncoder(), "path": str(questions)}
    model = rule_model(lambda ids: None, positions=whole - 30)
    found = evaluate_mmlu(model, **arguments)
    assert set(found["shots"]["used"]) <= {"3", "4"}
    assert sum(found["shots"]["used"].values()) == 20
    assert found["tokens"]["max"] <= whole - 30


def test_the_prompt_has_worked_examples_and_cloze_hides_the_choices(questions):
    items, shots = read_items(questions)
    letters = prompt(items[0], shots["colours"], "letters")
    assert letters.count("Answer: ") == 5
    assert "\nA. " in letters
    assert letters.endswith("Answer:")
    cloze = prompt(items[0], shots["colours"], "cloze")
    assert cloze.count("Answer: blue") == 5
    assert "A. " not in cloze


def test_a_choice_of_questions_keeps_the_share_of_every_subject():
    items = [
        Item(f"{subject} {i}", ("a", "b"), i % 2, subject)
        for subject, count in (("big", 60), ("small", 20))
        for i in range(count)
    ]
    some = choose(items, 40, seed=0)
    assert abs(sum(item.subject == "small" for item in some) - 10) <= 1
    # a stride over the file would take every second one, all with one answer
    assert {item.answer for item in some} == {0, 1}
    assert choose(items, 12, seed=0) == some[:12]
    assert choose(items, 40, seed=1) != some


def test_the_original_csv_is_read(tmp_path):
    (tmp_path / "anatomy_test.csv").write_text('"How many, all in all?",one,two,three,four,C\n')
    ((item,), _) = read_items(tmp_path)
    assert (item.answer, item.subject, item.choices[2]) == (2, "anatomy", "three")
    (tmp_path / "anatomy_test.csv").write_text("What?,one,two,Z\n")
    with pytest.raises(ValueError, match=r"anatomy_test.csv, item 1: answer 'Z'"):
        read_items(tmp_path)
    with pytest.raises(ValueError, match=r"no .jsonl, .parquet or .csv"):
        read_items(tmp_path / "nothing")


def test_speed_is_measured_at_every_length(tiny_llama):
    found = evaluate_speed(tiny_llama, lengths=(16, 32), steps=2, repeats=1)
    assert [cell["length"] for cell in found["cells"]] == [16, 32]
    assert all(cell["prefill_tokens_per_second"] > 0 for cell in found["cells"])
    with pytest.raises(ValueError, match="max_position_embeddings"):
        evaluate_speed(tiny_llama, lengths=(512,))
