"""Grids, sweeps, metrics of cells and knock-outs, predictions."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from hybrid.ablate import plan_runs, run_design, summarise, write_report
from hybrid.ablate.config import load_ablation, parse_ablation, predictions
from hybrid.ablate.expect import judge, parse_prediction
from hybrid.ablate.metrics import Metric, parse_metric
from hybrid.config.options import ConfigError
from hybrid_eval.seeds import Score


@pytest.fixture
def values(tmp_path):
    """Runs of a fraction of a second."""
    return {
        "name": "tiny",
        "baseline": {
            "model": {"layout": "L", "hidden_size": 16, "mixers": {"L": {"num_heads": 2}}},
            "data": {"source": "mqar", "pairs": 3, "repeat": True},
            "eval_data": {"source": "mqar", "pairs": 3, "repeat": True},
            "eval_rows": 8,
            "sequence_length": 16,
            "training": {
                "max_steps": 6,
                "eval_steps": 6,
                "logging_steps": 1,
                "per_device_train_batch_size": 4,
                "learning_rate": 3e-2,
                "save_strategy": "no",
                "disable_tqdm": True,
            },
        },
        "changes": {"softmax": {"model.layout": "S"}},
        "seeds": [0, 1, 2],
        "out": str(tmp_path / "out"),
    }


def parsed(values, evaluator=None, **more):
    return parse_ablation({**copy.deepcopy(values), **more}, evaluator)


def mistakes(values, **more):
    with pytest.raises(ConfigError) as caught:
        plan_runs(parsed(values, **more))
    return caught.value.mistakes


GRID = {
    "model.hidden_size": [16, 32],
    "pairs": {
        "3": {"data.pairs": 3, "evaluate.options.mqar.pairs": 3},
        "5": {"data.pairs": 5, "evaluate.options.mqar.pairs": 5, "sequence_length": 32},
    },
}


def test_every_variant_is_in_every_cell(values):
    design = plan_runs(parsed(values, grid=GRID))
    assert [v.name for v in design.variants] == [
        f"{name}@hidden_size={width},pairs={pairs}"
        for width in (16, 32)
        for pairs in (3, 5)
        for name in ("baseline", "softmax")
    ]
    for variant in design.variants:
        width, pairs = (label for _, label in variant.cell.labels)
        assert variant.config.model["hidden_size"] == int(width)
        assert variant.config.as_dict()["data"][0]["pairs"] == int(pairs)
        assert variant.config.sequence_length == (32 if pairs == "5" else 16)
        assert variant.evaluate["options"]["mqar"]["pairs"] == int(pairs)
        assert variant.config.model["layout"] == ("S" if variant.base_name == "softmax" else "L")
    # each change is compared with the baseline of its own cell
    for contrast in design.contrasts:
        assert contrast.changed.partition("@")[2] == contrast.unchanged.partition("@")[2]
    assert len(design.contrasts) == 4


def test_what_is_matched_is_the_baseline_of_the_cell(values):
    match = {"cost": "parameters", "step": 2, "within": 0.05}
    width = "model.feed_forwards.-.intermediate_size"
    design = plan_runs(
        parsed(values, grid={"model.hidden_size": [16, 64]}, match={**match, "width": width})
    )
    costs = {v.name: v.cost.parameters for v in design.variants}
    for cell in ("hidden_size=16", "hidden_size=64"):
        ratio = costs[f"softmax@{cell}"] / costs[f"baseline@{cell}"]
        assert abs(ratio - 1) <= 0.05


class Tried:
    """Trainings that end with a loss that depends on the learning rate and the layout."""

    def __init__(self, losses):
        self.losses, self.runs = losses, []

    def __call__(self, path):
        import yaml

        config = yaml.safe_load(Path(path).read_text())
        rate, layout = config["training"]["learning_rate"], config["model"]["layout"]
        self.runs.append((layout, rate, config["training"]["seed"]))
        loss = self.losses[layout, rate] + 0.001 * config["training"]["seed"]
        found = {"losses": [[6, loss]], "eval_losses": [[6, loss]], "tokens_per_second": 1.0}
        found |= {"steps": 6, "tokens": 1, "resumed_from": 0}
        (Path(path).parent / "train_result.json").write_text(json.dumps(found))


def test_a_sweep_chooses_by_the_first_seed_and_trains_the_others_with_it(values):
    sweep = {"key": "training.learning_rate", "values": [0.001, 0.01], "by": "eval_loss"}
    losses = {("L", 0.001): 1.0, ("L", 0.01): 2.0, ("S", 0.001): 4.0, ("S", 0.01): 3.0}
    # what chooses need not be among the metrics
    design = plan_runs(parsed(values, sweep=sweep, metrics=["loss"]))
    launch = Tried(losses)
    measured = run_design(design, launch=launch, report=lambda line: None)
    # both rates with seed 0, then the best of each variant with the others
    assert sorted(launch.runs) == sorted(
        [("L", 0.001, 0), ("L", 0.01, 0), ("S", 0.001, 0), ("S", 0.01, 0)]
        + [(layout, rate, seed) for seed in (1, 2) for layout, rate in (("L", 0.001), ("S", 0.01))]
    )
    report = summarise(design, measured)
    found = {v["name"]: v["metrics"]["loss"] for v in report["variants"]}
    assert found["baseline"]["mean"] == pytest.approx(1.001)
    assert found["softmax"]["mean"] == pytest.approx(3.001)
    assert [(s["variant"], s["chosen"]) for s in report["sweeps"]] == [
        ("baseline", 0.001),
        ("softmax", 0.01),
    ]
    assert report["sweeps"][0]["scores"] == {"0.001": 1.0, "0.01": 2.0}
    text = write_report(report, values["out"]).read_text()
    assert "| baseline | training.learning_rate | 0.001: 1, 0.01: 2 (eval_loss) | 0.001 |" in text
    # the same call again trains nothing
    again = Tried(losses)
    run_design(design, launch=again, report=lambda line: None)
    assert again.runs == []


def test_names_of_metrics():
    assert parse_metric("mqar") == Metric("mqar")
    assert parse_metric("needle@length=256,depth=0.5 without  attention") == Metric(
        "needle", (("length", 256.0), ("depth", 0.5)), "attention"
    )
    for text in ("needle@length=256,depth=0.5 without 0,3", "mqar", "mqar without linear"):
        assert parse_metric(text).name == text
    for text in ("a b", "needle@256", "needle@length=x", "mqar without"):
        with pytest.raises(ValueError, match=r"expected"):
            parse_metric(text)


AXES = {"hidden_size": ["16", "32"], "pairs": ["3", "5"]}


def test_words_of_a_prediction():
    found = parse_prediction("mqar: a > b by 0.2 at pairs=5, length=64", ["loss"], AXES)
    assert (found.left, found.above, found.right, found.by) == ("a", True, "b", 0.2)
    assert found.metric == Metric("mqar", (("length", 64.0),))
    assert found.cell == (("pairs", "5"),)
    found = parse_prediction("a < 0.1", ["mqar without linear"], AXES)
    assert (found.metric.name, found.right, found.above) == ("mqar without linear", 0.1, False)
    for text, words in (
        ("a >= b", "expected .*VARIANT > VARIANT"),
        ("a > b at pairs=4", "expected one of 3, 5 for pairs, got '4'"),
        ("a > b at length=x", "expected KEY=NUMBER"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_prediction(text, ["mqar"], AXES)


def scores(values, items=()):
    return [Score(value, tuple(items), bool(items)) for value in values]


@pytest.mark.parametrize(
    ("text", "left", "right", "verdict"),
    [
        ("a > b", [0.9, 0.91, 0.92], [0.5, 0.5, 0.51], "holds"),
        ("a < b", [0.9, 0.91, 0.92], [0.5, 0.5, 0.51], "fails"),
        ("a > b", [0.9, 0.1, 0.5], [0.5, 0.5, 0.5], "open"),
        ("a > b by 0.3", [0.9, 0.91, 0.92], [0.5, 0.5, 0.51], "holds"),
        ("a > b by 0.6", [0.9, 0.91, 0.92], [0.5, 0.5, 0.51], "fails"),
        ("a < b by 0.3", [0.1, 0.11, 0.1], [0.5, 0.5, 0.51], "holds"),
        ("a > 0.8", [0.9, 0.91, 0.92], [], "holds"),
        ("a > 0.95", [0.9, 0.91, 0.92], [], "fails"),
        ("a < 0.2", [0.1, 0.11, 0.1], [], "holds"),
        # as good as, up to 0.05
        ("a > b by -0.05", [0.9, 0.91, 0.92], [0.91, 0.92, 0.92], "holds"),
        ("a > b", [0.9, 0.91, 0.92], [0.91, 0.92, 0.92], "open"),
        # too few seeds, whatever they say
        ("a > b", [0.9, 0.9], [0.1, 0.1], "open"),
    ],
)
def test_a_prediction_holds_only_with_its_whole_interval(text, left, right, verdict):
    prediction = parse_prediction(text, ["mqar"], {})
    found = judge(prediction, scores(left), scores(right), 0.95)
    assert found.verdict == verdict
    assert bool(found.why) == (verdict == "open")


def test_a_perfect_score_of_few_items_is_not_above_a_high_bar():
    prediction = parse_prediction("a > 0.95", ["mqar"], {})
    assert judge(prediction, scores([1.0] * 3, [1.0] * 8), [], 0.95).verdict == "open"
    assert judge(prediction, scores([1.0] * 3, [1.0] * 400), [], 0.95).verdict == "holds"


def test_false_predictions_rarely_hold():
    """Two variants that are the same: "a > b" holds by chance in 2.5% at most."""
    rng = np.random.default_rng(0)
    prediction = parse_prediction("a > b", ["mqar"], {})
    held = 0
    for _ in range(400):
        sides = [
            [Score(float(row.mean()), tuple(row), True) for row in rows]
            for rows in (rng.random((2, 3, 32)) < 0.8).astype(float)
        ]
        held += judge(prediction, *sides, 0.95).verdict == "holds"
    assert held / 400 <= 0.025 + 3 * np.sqrt(0.025 * 0.975 / 400)


def test_predictions_of_a_grid_hold_in_every_cell_or_in_one(values):
    losses = {("L", 3e-2): 2.0, ("S", 3e-2): 1.0}
    expect = ["eval_loss: softmax < baseline", "loss: softmax < 0.5 at hidden_size=16"]
    ablation = parsed(values, grid={"model.hidden_size": [16, 32]}, expect=expect)
    # the metrics of predictions are measured, too
    assert ablation.metrics == ["loss", "eval_loss"]
    assert len(predictions(ablation)) == 2
    design = plan_runs(ablation)
    report = summarise(design, run_design(design, launch=Tried(losses), report=lambda line: None))
    found = [(e["text"], e["cell"], e["verdict"]) for e in report["expectations"]]
    assert found == [
        (expect[0], "hidden_size=16", "open"),
        (expect[0], "hidden_size=32", "open"),
        (expect[1], "hidden_size=16", "fails"),
    ]
    # differences that are the same in all seeds have no interval
    assert "no interval" in report["expectations"][0]["why"]


def test_two_cells_of_a_grid_are_compared(values):
    class Wider(Tried):
        def __call__(self, path):
            import yaml

            width = yaml.safe_load(Path(path).read_text())["model"]["hidden_size"]
            seed = yaml.safe_load(Path(path).read_text())["training"]["seed"]
            self.losses = {(layout, 3e-2): 1 / width + 0.0001 * seed**2 for layout in "LS"}
            super().__call__(path)

    expect = [
        "loss: baseline@hidden_size=32 < baseline@hidden_size=16 by 0.01",
        "loss: softmax@hidden_size=32 < baseline@hidden_size=16 by 0.01 at pairs=3",
        "loss: baseline@hidden_size=32 > 0.5",
    ]
    grid = {**GRID, "model.hidden_size": [16, 32]}
    design = plan_runs(parsed(values, grid=grid, expect=expect))
    report = summarise(design, run_design(design, launch=Wider({}), report=lambda line: None))
    found = [(e["text"], e["cell"], round(e["mean"], 4)) for e in report["expectations"]]
    gain = round(1 / 32 - 1 / 16, 4)
    assert found == [
        (expect[0], "pairs=3", gain),
        (expect[0], "pairs=5", gain),
        (expect[1], "pairs=3", gain),
        (expect[2], "pairs=3", pytest.approx(1 / 32 - 0.5, abs=2e-3)),
        (expect[2], "pairs=5", pytest.approx(1 / 32 - 0.5, abs=2e-3)),
    ]
    lines = mistakes(values, grid=grid, expect=["loss: baseline@depth=3 > 1"])
    assert "expected an axis of the grid (hidden_size, pairs), got 'depth=3'" in lines[0]


def test_the_figure_has_a_line_for_each_variant(values):
    losses = {("L", 3e-2): 2.0, ("S", 3e-2): 1.0}
    grid = {"model.hidden_size": [16, 32], "pairs": {"3": {"data.pairs": 3}}}
    figure = {"x": "hidden_size", "y": "eval_loss"}
    design = plan_runs(parsed(values, grid=grid, figure=figure))
    measured = run_design(design, launch=Tried(losses), report=lambda line: None)
    report = summarise(design, measured)
    lines = report["figure"]["lines"]
    assert list(lines) == ["baseline, pairs=3", "softmax, pairs=3"]
    assert [point["x"] for point in lines["softmax, pairs=3"]] == [16, 32]
    assert lines["softmax, pairs=3"][0]["mean"] == pytest.approx(1.001)
    write_report(report, values["out"])
    assert (Path(values["out"]) / "figure.png").read_bytes()[:4] == b"\x89PNG"
    # against a cost, a line joins all cells
    figure = {"x": "state_bytes", "y": "eval_loss"}
    by_cost = plan_runs(parsed(values, grid=grid, figure=figure))
    report = summarise(by_cost, run_design(by_cost, launch=Tried(losses), report=lambda line: None))
    lines = report["figure"]["lines"]
    assert list(lines) == ["baseline", "softmax"]
    xs = {name: [point["x"] for point in points] for name, points in lines.items()}
    assert 0 < xs["baseline"][0] < xs["baseline"][1]
    assert xs["softmax"] == [0, 0]


def test_cells_and_knock_outs_are_measured(values, tmp_path):
    from hybrid.ablate.evaluation import EvaluationTasks

    tasks = EvaluationTasks()
    metrics = ["needle@length=32", "needle@length=64", "mqar", "mqar without linear"]
    evaluate = {"lengths": [32, 64], "depths": [0.0], "limit": 4}
    evaluate["options"] = {"mqar": {"sequence_length": 16, "pairs": 3}}
    ablation = parsed(
        values,
        tasks,
        metrics=metrics,
        evaluate=evaluate,
        changes={},
        expect=["baseline > 0.5"],
        seeds=1,
    )
    design = plan_runs(ablation)
    (run,) = run_design(design, tasks, report=lambda line: None)
    assert list(run.metrics) == metrics
    assert len(run.scores["needle@length=32"].items) == 4
    report = summarise(design, [run], tasks)
    assert report["metrics"]["mqar without linear"] == "higher"
    assert report["expectations"][0]["verdict"] == "open"
    # a cell that is not measured is refused before anything runs
    (line,) = mistakes_with(tasks, values, metrics=["needle@length=99"], evaluate=evaluate)
    assert line == "metrics: 'needle@length=99': evaluate.lengths has no 99"


def mistakes_with(evaluator, values, **more):
    with pytest.raises(ConfigError) as caught:
        parsed(values, evaluator, **more)
    return caught.value.mistakes


def test_mistakes_are_named(values):
    found = mistakes(values, expect=["softmax > bassline", "what?"])
    assert found[0] == "expect[0]: unknown variant 'bassline', did you mean 'baseline'?"
    assert found[1].startswith("expect[1]: expected [METRIC:] VARIANT > VARIANT")
    grid = {"model.hidden_size": 16, "a": {"x": 3}, "b.pairs": [1], "c.pairs": [1]}
    assert mistakes(values, grid=grid) == [
        "grid.model.hidden_size: expected a list of values, or labels with keys; got 16",
        "grid.a.x: expected {key: value}, got 3",
        "grid: expected different names of axes, got 'pairs' twice",
    ]
    lines = mistakes(values, sweep={"values": [1e-3, -1.0]})
    assert any("sweep.values -1.0: training.learning_rate" in line for line in lines)
    lines = mistakes(values, grid={"model.hidden_sise": [16]})
    assert any("did you mean 'hidden_size'" in line for line in lines)


def test_scales_are_sizes_of_one_file(values, tmp_path):
    import yaml

    scales = {"gpu": {"baseline.training.max_steps": 99, "seeds": [7]}}
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump({**values, "scales": scales}))
    assert load_ablation(path).baseline["training"]["max_steps"] == 6
    large = load_ablation(path, scale="gpu")
    assert (large.baseline["training"]["max_steps"], large.seeds) == (99, [7])
    with pytest.raises(ConfigError, match="scales: expected one of gpu, got 'tpu'"):
        load_ablation(path, scale="tpu")
