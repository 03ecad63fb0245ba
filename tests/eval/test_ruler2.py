"""RULER v2's definitions, in words: each sample is read, not compared with our own generator."""

import json
import re
from collections import Counter as Tally

import pytest

from hybrid_eval.text.counter import Counter
from hybrid_eval.text.matching import string_match, word_errors
from hybrid_eval.text.ruler2 import KINDS
from hybrid_eval.text.tasks import Material, maker, samples
from hybrid_eval.tokens import ByteEncoder


@pytest.fixture
def material(tmp_path):
    """MMLU's folder and HotpotQA's file, small."""
    for split in ("test", "auxiliary_train"):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        rows = [
            {
                "question": f"Is  {split}\nnumber {i} right?",
                "choices": [f"{split} {i} choice {c}" for c in range(4)],
                "answer": i % 4,
            }
            for i in range(60)
        ]
        file = tmp_path / "mmlu" / split / "logic.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
    data = [
        {
            "question": f"What joins A{i} and B{i}?",
            "answer": f"bridge {i}",
            "context": [
                [f"{name}{i}", [f"This is {name}{i}. ", "It says so."]] for name in "ABCDE"
            ],
            "supporting_facts": [[f"A{i}", 0], [f"B{i}", 0], [f"B{i}", 1]],
        }
        for i in range(30)
    ]
    hotpot = tmp_path / "hotpot_dev_distractor_v1.json"
    hotpot.write_text(json.dumps(data))
    return Material(mmlu=str(tmp_path / "mmlu"), hotpot=str(hotpot))


def one(name, material, length=4000, index=0):
    make = maker(f"ruler2_{name}", material, Counter(ByteEncoder()))
    made = make(length=length, index=index, seed=0)
    assert made.task == f"ruler2_{name}"
    assert made.prompt_tokens == len(made.prompt.encode())
    assert made.prompt_tokens + made.max_new_tokens + made.slack == length
    return made


@pytest.mark.parametrize(("name", "values"), [("mk_niah_basic", 1), ("mv_niah_basic", 4)])
def test_numbers(name, values, material):
    pytest.importorskip("wonderwords")
    made = one(name, material)
    found = re.findall(r"One of the special magic numbers for (\S+) is: (\d{10})\.", made.prompt)
    asked = re.search(r"mentioned in the provided text\? .* for (\S+) mentioned", made.prompt)[1]
    assert {value for key, value in found if key == asked} == set(made.outputs)
    assert len(made.outputs) == values
    counts = Tally(key for key, _ in found)
    # all keys have as many values, but for the last that is drawn
    assert sorted(counts.values())[1:] == [values] * (len(counts) - 1)
    assert made.prompt.endswith(" is" if values == 1 else " are")
    assert made.match == "words"
    assert made.slack < made.filler_tokens


def listed(prompt):
    """Number and text of every question of the context."""
    context = prompt.split("\n\nPlease ")[0].split("\n\nHere are some examples")[0]
    return re.findall(r"Question (\d{7}): (Is .*? D\. .*)", context)


@pytest.mark.parametrize("index", range(3))
def test_questions_to_copy(material, index):
    made = one("mk_niah_easy", material, index=index)
    number = re.search(r"Please copy the Question (\d+) from the context\.$", made.prompt)[1]
    (text,) = [text for code, text in listed(made.prompt) if code == number]
    assert made.outputs == (text,)
    # one line, of the test split; the others are of the training split
    assert re.fullmatch(r"Is test number \d+ right\? A\. test \d+ choice 0 B\. .* D\. .*", text)
    others = [text for code, text in listed(made.prompt) if code != number]
    assert others
    assert all("auxiliary_train" in text for text in others)


@pytest.mark.parametrize("index", range(3))
def test_several_questions_of_one_number(material, index):
    made = one("mv_niah_easy", material, index=index)
    number = re.search(r"find and copy all the Question (\d+) from", made.prompt)[1]
    assert made.outputs == tuple(t for code, t in listed(made.prompt) if code == number)
    assert len(made.outputs) == 4
    for name, words in (("mv_niah_hard", "Please copy the "), ("mv_niah_medium", "and then copy ")):
        made = one(name, material, index=index)
        place, number = re.search(
            rf"{words}(?:the )?(\d)(?:st|nd|rd|th) \(1 indexed\) Question (\d+)", made.prompt
        ).groups()
        same = [text for code, text in listed(made.prompt) if code == number]
        assert len(same) == 4
        assert made.outputs == (same[int(place) - 1],)
        assert "test" in same[int(place) - 1]


def test_questions_to_solve_have_five_examples(material):
    for name in ("mk_niah_medium", "mk_niah_hard"):
        made = one(name, material)
        assert made.prompt.count("\nSolution: \\boxed{") == 5
        number = re.search(r"Question (\d+) from the context[^\n]*\.$", made.prompt)[1]
        (text,) = [text for code, text in listed(made.prompt) if code == number]
        letter = "ABCD"[int(re.search(r"number (\d+)", text)[1]) % 4]
        assert (made.outputs, made.match) == ((letter,), "letter")
        assert made.prompt.count("inside \\boxed\\{\\}.") == 1
        copies = re.findall(
            r"Please copy the Question (\d+) .*\nQuestion \1: (.*)\nSolution", made.prompt
        )
        assert len(copies) == (5 if name == "mk_niah_medium" else 0)


@pytest.mark.parametrize("index", range(3))
def test_documents(material, index):
    made = one("qa_basic", material, index=index)
    documents = dict(re.findall(r"Document (\d{7}):\n(.*\n.*)\n", made.prompt))
    (number,) = made.outputs
    assert f"Text: {documents[number]}\nMost relevant document index:" in made.prompt
    made = one("qa_easy", material, index=index)
    documents = dict(re.findall(r"Document (\d{7}):\n(.*)\n", made.prompt))
    a, b = re.search(r"Question: What joins (\w+) and (\w+)\?", made.prompt).groups()
    assert {documents[number] for number in made.outputs} == {a, b}
    # the documents that distract are of the same question
    assert {f"{name}{a[1:]}" for name in "CDE"} <= set(documents.values())
    for name, words in (("qa_medium", "find and copy paste"), ("qa_hard", "Please answer the")):
        made = one(name, material, index=index)
        assert made.outputs == (f"bridge {re.search(r'joins A(.*) and', made.prompt)[1]}",)
        assert words in made.prompt.split("\n\n")[-2]


def test_every_task_fills_every_length(material):
    pytest.importorskip("wonderwords")
    for name in KINDS:
        for length in (3500, 4100):
            made = one(name, material, length)
            assert made.slack >= 0
        same = samples(
            f"ruler2_{name}", tokenizer=ByteEncoder(), lengths=[3500], n=2, material=material
        )
        assert same[0].prompt != same[1].prompt


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"mmlu: expected at least 8 questions .* in .*/test, got 0"
    ):
        maker("ruler2_mk_niah_easy", Material(mmlu=str(tmp_path)), Counter(ByteEncoder()))
    with pytest.raises(ValueError, match="ruler2_qa_hard needs the option hotpot"):
        maker("ruler2_qa_hard", Material(), Counter(ByteEncoder()))


def test_word_errors_are_edits_per_word():
    assert word_errors("a b c", "a b c") == 0
    assert word_errors("a x c", "a b c") == pytest.approx(1 / 3)
    assert word_errors("", "a b c") == 1
    assert word_errors("z a b c z", "a b c") == pytest.approx(2 / 3)


def test_what_is_nearly_right_counts_in_part():
    assert string_match(["one two three four"], "say: ONE TWO three four", "words") == 1
    assert string_match(["one two three four"], "one two three five", "words") == 0.75
    assert string_match(["a", "b"], "a", "words") == 0.5
    # what was copied before the last paragraph is no answer
    assert string_match(["one two"], "one two\n\nthree four", "last") == 0
    assert string_match(["three four"], "one two\n\nthree four", "last") == 1
    # nor are the documents that were copied
    copied = "Document 1234567:\nTitle\nParis is there.\n\nThe answer is Rome."
    assert string_match(["Paris"], copied, "part") < 0.3
    assert string_match(["Rome", "Roma"], copied, "part") == 1


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("\\boxed{B}", 1),
        ("first \\boxed{A}, no: \\boxed{b}", 1),
        ("\\boxed{(B) iron}", 1),
        ("**Answer**: B", 1),
        ("\\boxed{C} Answer: B", 0),
        ("B", 0),
        ("Answer: Bread", 0),
    ],
)
def test_the_letter_of_a_choice(answer, right):
    assert string_match(["B"], answer, "letter") == right
