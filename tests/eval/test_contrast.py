import numpy as np
import pytest

from hybrid_eval import Settings, evaluate, load, report_figures, write_report
from hybrid_eval.contrast import attention_share, cheaper_from, comparisons, corrected


def cost(fixed, per_token):
    return {"fixed_bytes": fixed, "bytes_per_token": per_token}


@pytest.mark.parametrize(
    ("fixed", "per_token", "expected"),
    [(1000, 10, 12), (990, 10, 12), (0, 10, 1), (5, 100, None), (0, 100, None), (1000, 200, None)],
)
def test_the_crossing_is_the_first_context_that_is_cheaper(fixed, per_token, expected):
    full = cost(0, 100)
    found = cheaper_from(cost(fixed, per_token), full)
    if expected is None:
        assert found is None
        return
    sizes = [fixed + per_token * n - 100 * n for n in range(50)]
    assert found == next((n for n, size in enumerate(sizes) if size < 0), None)


def record(name, items, tokens=10):
    result = {
        "metric": "accuracy",
        "items": items,
        "tokens": {"min": tokens, "max": tokens},
        "options": {},
    }
    return {"name": name, "results": {"mqar": result}}


def test_only_identical_items_are_paired():
    rng = np.random.default_rng(0)
    a = (rng.random(200) < 0.9).astype(float).tolist()
    b = (rng.random(200) < 0.2).astype(float).tolist()
    results = {"models": [record("a", a), record("b", b), record("c", b, tokens=11)]}
    (found,) = comparisons(results)
    assert (found.model, found.reference) == ("b", "a")
    assert found.found.difference == pytest.approx(np.mean(b) - np.mean(a))
    assert found.found.interval.high < 0


def test_chance_is_taken_off_the_whole_interval():
    result = {"accuracy": 0.25, "interval": [0.2, 0.4], "chance": 0.25}
    assert corrected(result) == pytest.approx((0, -0.05 / 0.75, 0.2))


def test_the_share_of_attention():
    def branch(layer, kind, local=False):
        return {"layer": layer, "name": "Any", "kind": kind, "local": local}

    linear = [branch(layer, "linear") for layer in range(3)]
    assert attention_share({"branches": [*linear, branch(3, "attention")]}) == 0.25
    # a window does not reach everything; two branches side by side are one layer
    assert attention_share({"branches": [*linear, branch(3, "attention", local=True)]}) == 0
    assert attention_share({"branches": [branch(0, "linear"), branch(0, "attention")]}) == 1
    assert attention_share({"branches": []}) is None


def test_the_report_shows_every_comparison(tiny_llama, tmp_path):
    subjects = [load(tiny_llama, name=name, tokenizer="bytes") for name in ("one", "two")]
    results = evaluate(
        subjects,
        ("mqar", "icl_fn", "heldout", "speed", "cost"),
        settings=Settings(limit=4),
        options={"speed": {"lengths": [8, 16], "steps": 2, "repeats": 1}},
    )
    for model, kind in zip(results["models"], ("attention", "linear"), strict=True):
        model["branches"] = [{"layer": 0, "name": "Any", "kind": kind, "local": False}]
    html = write_report(results, tmp_path).read_text()
    assert "Paired differences" in html
    assert "two - one" in html
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "heldout_by_position.png",
        "retrieval_vs_loss.png",
        "retrieval_vs_reasoning.png",
        "retrieval_vs_cache.png",
        "mqar_vs_attention_share.png",
        "icl_fn_vs_attention_share.png",
        "prefill_speed.png",
        "decode_speed.png",
    }


def test_an_axis_names_settings_and_no_paths(monkeypatch):
    def model(name, **results):
        return {"name": name, "branches": [], "results": results}

    def result(axis, accuracy, **options):
        return {
            "axis": axis,
            "metric": "accuracy",
            "accuracy": accuracy,
            "interval": [accuracy - 0.1, accuracy + 0.1],
            "chance": 0.25,
            "options": options,
        }

    seen = []
    draw = report_figures.pictures.scatter
    monkeypatch.setattr(
        report_figures.pictures,
        "scatter",
        lambda points, **words: seen.append(words) or draw(points, **words),
    )
    record = model(
        "one",
        mqar=result("retrieval", 0.5, pairs=4),
        mmlu_letters=result("reasoning", 0.2, path="/very/long/path"),
        mmlu_cloze=result("reasoning", 0.9, path="/very/long/path"),
        gsm={**result("reasoning", 0.9), "metric": "f1", "f1": 0.9, "chance": None},
    )
    del record["results"]["gsm"]["chance"]
    (picture,) = report_figures.figures({"models": [record]})
    assert picture.file == "retrieval_vs_reasoning.png"
    # letters test symbol binding: they do not stand for reasoning where cloze was run
    assert seen[0]["x_label"] == "mmlu_cloze: (accuracy - chance) / (1 - chance)"
    assert seen[0]["y_label"] == "mqar (pairs 4): above chance"
