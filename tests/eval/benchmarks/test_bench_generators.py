"""The side-by-side timing of generators, with a stand-in for lm-eval's module."""

import sys
from types import SimpleNamespace

import pytest

import bench_generators
from bench_generators import (
    Timing,
    compare,
    main,
    python_topics,
    stock_generators,
    trained_tokenizer,
)


@pytest.fixture(scope="module")
def corpus():
    return python_topics()


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return trained_tokenizer(corpus, vocab_size=512)


@pytest.mark.filterwarnings("ignore")  # lm-eval's own imports warn
def test_both_run_in_turn_on_the_same_words(corpus, tokenizer, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    calls = []

    def generate_samples(haystack, *, num_samples, max_seq_length, type_haystack, **options):
        assert options["TOKENIZER"] is tokenizer
        calls.append(("stock", num_samples, type_haystack, haystack[:3]))
        return [{"input": "a b c d", "length": 300}] * num_samples

    real = bench_generators._ours

    def ours(name, tokenizer, corpus, length, n):
        calls.append(("ours", n))
        return real(name, tokenizer, corpus, length, n)

    monkeypatch.setattr(bench_generators, "_ours", ours)
    monkeypatch.setitem(
        sys.modules,
        "lm_eval.tasks.ruler.niah_utils",
        SimpleNamespace(TEMPLATE="{context}"),
    )
    found = compare(
        SimpleNamespace(generate_samples=generate_samples),
        "niah_single_2",
        tokenizer=tokenizer,
        corpus=corpus,
        length=1024,
        n=2,
        rounds=2,
    )
    assert [call[:2] for call in calls] == [("ours", 1), ("stock", 1)] + 2 * [
        ("ours", 2),
        ("stock", 2),
    ]
    assert calls[1][3] == corpus.text.split()[:3]
    # the true tokens of the prompt, whatever the generator says
    assert found.stock_tokens == len(tokenizer("a b c d")["input_ids"])
    # ours fills what the stated length leaves after 128 tokens for the answer and its prefix
    assert 1024 - 128 - 64 < found.ours_tokens < 1024 - 128


def test_the_ratio_is_ours_over_stock():
    assert Timing("x", ours_ms=3, stock_ms=2, ours_tokens=1, stock_tokens=1).ratio == 1.5


@pytest.mark.filterwarnings("ignore")  # lm-eval's own imports warn
def test_lm_evals_generators_are_called_as_it_calls_them(tokenizer, capsys):
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    prompts = bench_generators._stock(None, "fwe", tokenizer, (), 2048, 2)
    assert len(prompts) == 2
    assert all(1000 < len(tokenizer(prompt)["input_ids"]) < 2048 for prompt in prompts)
    assert capsys.readouterr().out == ""


def test_an_unknown_task_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--tasks", "niah_singel_1"])
    assert "did you mean 'niah_single_1'" in capsys.readouterr().err


def test_what_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ruler", None)
    with pytest.raises(ValueError, match="pip install lm-eval wonderwords nltk"):
        stock_generators()
    assert main(["--samples", "1"]) == 2
    assert "pip install lm-eval wonderwords nltk" in capsys.readouterr().err
