"""The sentence at the head of a report says what its numbers say."""

import importlib.util
from pathlib import Path

import pytest

from hybrid_eval import write_report
from hybrid_eval.headline import headline, seed_note, terms
from hybrid_eval.pictures import Point, on_frontier
from hybrid_eval.pool import pooled

_spec = importlib.util.spec_from_file_location(
    "pool_models", Path(__file__).parent / "test_pool.py"
)
made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)


def run(hybrid, full, state, losses=(2.0, 2.1, 1.9)):
    groups = zip(("LLLS", "SSSS", "LLLL"), (hybrid, full, state), losses, strict=True)
    return made.run(
        *(m for layout, rates, loss in groups for m in made.seeds(layout, rates, loss=loss))
    )


def test_what_a_hybrid_keeps_and_costs():
    results = pooled(run([0.9] * 3, [1.0] * 3, [0.1] * 3))
    said = headline(results)
    kept = [(m["results"]["mqar"]["accuracy"] - 0.1) / 0.9 for m in results["models"]]
    assert f"LLLS keeps {kept[0] / kept[1]:.0%} of the recall of SSSS (mqar: 0." in said
    assert "at 0.100 bits per byte less on text" in said
    # 64 bytes a token of one softmax layer against 256 of four
    assert "with 25% of its cache at 1k tokens (64 KiB against 256 KiB)" in said
    assert (
        "LLLL, without softmax layers, is better on text than LLLS (-0.100 bits per byte)" in said
    )
    assert "but blind to recall (mqar: 0." in said


def test_it_does_not_say_what_the_numbers_do_not():
    results = pooled(run([0.9] * 3, [0.1] * 3, [0.8] * 3, losses=(2.0, 2.0, 2.2)))
    said = headline(results)
    assert "SSSS, which has not learnt it" in said
    assert "at the same loss on text, as far as can be told" in said
    assert "is worse on text than LLLS (+0.200 bits per byte) and recalls part of it" in said
    assert "blind" not in said
    # no contrast, no sentence
    assert headline(made.run(*made.seeds("LS", [0.9]))) == ""
    alone = made.record("other", "LS", mqar=made.result([1.0, 0.0]))
    assert headline(made.run({**alone, "branches": [], "layout": None})) == ""


def test_knock_outs_play_no_part():
    hybrid, full = made.seeds("LS", [0.9])[0], made.seeds("SS", [1.0])[0]
    gone = {**hybrid, "name": "LS without attention", "ablate": "attention"}
    assert headline(made.run(gone, hybrid, full)).startswith("LS seed 0 keeps")


def test_one_seed_is_said_with_the_way_to_three():
    one = run([0.9], [1.0], [0.1])
    assert "trained once" in seed_note(one)
    assert "--seeds 0,1,2" in seed_note(one)
    assert "3 seeds" in seed_note(pooled(run([0.9] * 3, [1.0] * 3, [0.1] * 3)))
    assert seed_note(made.run(made.seeds("LS", [0.9])[0])) == ""


def test_terms_are_explained_before_the_tables(tmp_path):
    results = run([0.9] * 2, [1.0] * 2, [0.1] * 2)
    html = write_report(results, tmp_path).read_text()
    words = dict(terms(pooled(results), results["models"][0]["results"]))
    assert words["LLLS"] == "layers 0 to 2 Lightning (a state); layer 3 Softmax (softmax)"
    for word in ("mqar", "heldout", "softmax", "a state", "chance"):
        assert word in words
        assert html.index(f"<dt>{word}</dt>") < html.index("<h2>Summary</h2>")
    # sentence, then picture, then terms
    assert html.index('class="lead"') < html.index("<figure>") < html.index('class="terms"')


def test_the_frontier_joins_what_no_other_beats():
    points = [
        Point(label, (x, x, x), (y, y, y))
        for label, x, y in (("a", 1, 0.1), ("b", 4, 0.9), ("worse", 5, 0.8), ("c", 16, 0.95))
    ]
    twice = [*points, Point("dearer", (8, 8, 8), (0.9, 0.9, 0.9))]
    assert [p.label for p in on_frontier(twice)] == ["a", "b", "c"]


@pytest.mark.parametrize("count", [1, 4])
def test_length_curves_are_one_picture(tmp_path, count):
    models = made.seeds("LS", [0.9])
    for number in range(count):
        cells = [
            {"length": length, "depth": depth, "accuracy": depth, "n": 4}
            for length in (64, 128)
            for depth in (0.0, 1.0)
        ]
        models[0]["results"][f"needle{number}"] = made.result([1.0, 0.0], cells=cells)
    write_report(made.run(*models), tmp_path)
    for kind in ("png", "svg", "pdf"):
        assert (tmp_path / f"accuracy_by_length.{kind}").is_file()
    svg = (tmp_path / "accuracy_by_length.svg").read_text()
    assert svg.count(">needle") == count


def test_loss_by_position_is_a_picture(tmp_path):
    models = made.seeds("LS", [0.9, 0.8])
    for shift, model in enumerate(models):
        losses = ((1, 63, 3.0), (64, 127, 2.0 + shift))
        model["results"]["heldout"]["positions"] = [
            {"first": first, "last": last, "loss": loss} for first, last, loss in losses
        ]
    write_report(made.run(*models), tmp_path)
    assert "heldout: loss by position" in (tmp_path / "heldout_by_position.svg").read_text()
    (one,) = pooled(made.run(*models))["models"]
    assert [b["loss"] for b in one["results"]["heldout"]["positions"]] == [3.0, 2.5]
