"""Tasks over hub data sets: the same schema from a stand-in, and one refusal offline."""

import json

import datasets
import pytest
import torch

from hybrid_eval import Settings, evaluate, load
from hybrid_eval.mmlu import evaluate_mmlu
from hybrid_eval.questions import hub_items
from hybrid_eval.text.completion import COMPLETIONS, completions, evaluate_completion
from hybrid_eval.text.material import essays
from hybrid_eval.tokens import ByteEncoder

SUBJECTS = ("anatomy", "virology")


def question(subject, number):
    return {
        "question": f"Thing {number} of {subject}?",
        "subject": subject,
        "choices": ["red", "blue", "lime", "grey"],
        "answer": number % 4,
    }


MMLU = {
    "test": [question(subject, i) for subject in SUBJECTS for i in range(8)],
    "dev": [question(subject, i) for subject in SUBJECTS for i in range(100, 107)],
}
PAPERS = [
    {
        "text": f"Device {i} was made by Firm-{i} in spring.\nMaker of device {i}:",
        "value": f"Firm-{i}",
    }
    for i in range(12)
]


@pytest.fixture
def hub(monkeypatch):
    """A hub with small data sets of the real ones' schema; returns what was asked of it."""
    asked = []

    def load_dataset(name, config=None, *, split):
        asked.append((name, config, split))
        if name == "cais/mmlu":
            return datasets.Dataset.from_list(MMLU[split])
        assert name in COMPLETIONS.values()
        assert (config, split) == (None, "validation")
        return datasets.Dataset.from_list(PAPERS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


@pytest.fixture
def no_hub(monkeypatch):
    def load_dataset(name, config=None, *, split):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)


def reader(ids):
    """Read the firm that made the device asked for, letter by letter."""
    text = bytes(ids).decode()
    _, asked, begun = text.rpartition("Maker of device ")
    number, _, begun = begun.partition(":")
    firm = f" FIRM-{number}, I think.\nMaker"
    assert asked
    assert f"by Firm-{number} " in text
    return ord(firm[len(begun)]) if len(begun) < len(firm) else 10


def writer(rule_model, rule):
    """Return a model whose ``generate`` writes what a rule says."""
    model = rule_model(rule)

    def generate(ids, *, max_new_tokens, **options):
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, torch.tensor([[rule(ids[0].tolist())]])], dim=1)
        return ids

    model.generate = generate
    return model


def test_mmlu_from_the_hub_is_mmlu_from_files(hub, rule_model, tmp_path):
    for split, rows in MMLU.items():
        (tmp_path / split).mkdir()
        (tmp_path / split / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def blue(ids):
        begun = bytes(ids).decode().rpartition("Answer:")[2]
        return ord(" blue"[len(begun)]) if len(begun) < 5 else None

    arguments = {"form": "cloze", "tokenizer": ByteEncoder()}
    online = evaluate_mmlu(rule_model(blue), **arguments)
    local = evaluate_mmlu(rule_model(blue), path=str(tmp_path), **arguments)
    assert sorted(hub) == [("cais/mmlu", "all", "dev"), ("cais/mmlu", "all", "test")]
    assert online.pop("haystack") == "questions of cais/mmlu"
    local.pop("haystack")
    assert online == local
    assert online["accuracy"] == 0.25


def test_examples_come_from_the_questions_own_subject(hub):
    items, shots = hub_items()
    assert {item.subject for item in items} == set(SUBJECTS)
    assert {name: len(found) for name, found in shots.items()} == dict.fromkeys(SUBJECTS, 7)
    assert all(item.subject == name for name, found in shots.items() for item in found)


@pytest.mark.parametrize("task", list(COMPLETIONS))
def test_a_completion_that_contains_the_answer_is_right(hub, rule_model, task):
    encoder = ByteEncoder()
    found = evaluate_completion(writer(rule_model, reader), task=task, tokenizer=encoder)
    assert (found["accuracy"], found["n"], found["truncated"]) == (1.0, 12, 0)
    assert hub == [(COMPLETIONS[task], None, "validation")]
    # decoding stops at the end of the line: what follows is not the answer
    assert all(answer.endswith(", I think.") for answer in found["answers"])

    def newline_first(ids):
        return 10

    wrong = evaluate_completion(writer(rule_model, newline_first), task=task, tokenizer=encoder)
    assert wrong["accuracy"] == 0.0


def test_forced_mode_asks_for_exactly_the_answer(hub, rule_model):
    def exact(ids):
        text = bytes(ids).decode()
        number, _, begun = text.rpartition("Maker of device ")[2].partition(":")
        firm = f" Firm-{number}"
        return ord(firm[len(begun)]) if len(begun) < len(firm) else None

    arguments = {"task": "based_fda", "tokenizer": ByteEncoder(), "mode": "forced"}
    assert evaluate_completion(rule_model(exact), **arguments)["accuracy"] == 1.0
    assert evaluate_completion(rule_model(reader), **arguments)["accuracy"] == 0.0


def test_more_documents_keep_the_fewer(hub):
    few = completions("based_swde", tokenizer=ByteEncoder(), n=4)
    more = completions("based_swde", tokenizer=ByteEncoder(), n=9)
    assert more[:4] == few
    assert len({sample.index for sample in more}) == 9


def test_completions_run_by_name_from_a_file(tiny_llama, tmp_path):
    path = tmp_path / "papers.jsonl"
    path.write_text("\n".join(map(json.dumps, PAPERS)))
    subject = load(tiny_llama, name="tiny", tokenizer="bytes")
    results = evaluate(
        subject,
        ["based_fda"],
        settings=Settings(limit=3),
        options={"based_fda": {"path": str(path), "mode": "forced"}},
    )
    found = results["models"][0]["results"]["based_fda"]
    assert (found["n"], found["haystack"], found["axis"]) == (3, "papers.jsonl", "retrieval")
    assert found["nll"] > 0


def test_a_document_that_does_not_fit_is_refused(tiny_llama, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "word " * 100, "value": "word"}))
    with pytest.raises(ValueError, match="max_position_embeddings = 512"):
        evaluate_completion(tiny_llama, task="based_fda", tokenizer=ByteEncoder(), path=str(path))
    path.write_text(json.dumps({"text": "word", "answer": "word"}))
    with pytest.raises(ValueError, match=r"long.jsonl, item 1: no 'value'; found answer, text"):
        completions("based_fda", tokenizer=ByteEncoder(), path=str(path))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("mmlu_cloze", "MMLU needs the data set cais/mmlu from the hub.*--mmlu-dir FOLDER"),
        ("mmlu_letters", "MMLU needs the data set cais/mmlu from the hub.*--mmlu-dir FOLDER"),
        (
            "based_fda",
            "based_fda needs the data set hazyresearch/based-fda .*--set based_fda.path=FILE",
        ),
        (
            "based_swde",
            "based_swde needs the data set hazyresearch/based-swde .*--set based_swde.path=FILE",
        ),
        ("based_squad", "hazyresearch/based-squad .*--set based_squad.path=FILE"),
    ],
)
def test_offline_there_is_one_refusal(no_hub, tiny_llama, task, words):
    subject = load(tiny_llama, name="tiny", tokenizer="bytes")
    with pytest.raises(ValueError, match=words):
        evaluate(subject, [task], settings=Settings(lengths=(512,), limit=1))


def test_offline_rulers_essays_are_refused(no_hub):
    essays.cache_clear()
    with pytest.raises(ValueError, match=r"Paul Graham's essays needs .*under its own name, long_"):
        essays()
