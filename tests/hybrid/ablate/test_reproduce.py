"""Every finding plans at both scales; the exit status is that of its predictions."""

import re

import pytest

from hybrid.ablate import plan_runs
from hybrid.ablate.config import load_ablation, predictions
from hybrid.ablate.evaluation import EvaluationTasks
from hybrid.ablate.reproduce import findings
from hybrid.cli import main

NAMES = ("knockout", "mqar-width", "parity", "phonebook", "placement", "ratio", "state-bytes")


def test_the_findings_are_these():
    assert tuple(findings()) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [None, "gpu"])
def test_a_finding_plans(name, scale):
    ablation = load_ablation(findings()[name], evaluator=EvaluationTasks(), scale=scale)
    assert re.search(r"arXiv \d{4}\.\d{5}", ablation.paper)
    assert ablation.finding
    assert len(ablation.seeds) >= 3
    assert predictions(ablation)
    design = plan_runs(ablation)
    assert len(list(design.runs())) == len({folder for *_, folder in design.runs()})


def test_the_status_says_whether_predictions_hold(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [
        "baseline.training.max_steps=1",
        "baseline.training.per_device_train_batch_size=2",
        "evaluate.limit=2",
        "seeds=[0]",
    ]
    assert main(["reproduce", "knockout", *small]) == 1
    assert "predictions" in capsys.readouterr().out
    folder = tmp_path / "runs" / "reproduce" / "knockout"
    assert "open: 1 seed(s): a verdict requires 3" in (folder / "report.md").read_text()
    html = (folder / "report.html").read_text()
    # what is to be shown, then predictions, then the variants
    places = [html.index(words) for words in ("softmax layers retrieve", "Predictions", "Variants")]
    assert places == sorted(places)


def test_findings_are_listed_and_others_refused(capsys):
    assert main(["reproduce"]) == 0
    out = capsys.readouterr().out
    assert "parity" in out
    assert "2411.12537" in out
    assert main(["reproduce", "parrity"]) == 2
    assert "did you mean 'parity'" in capsys.readouterr().err
    assert main(["reproduce", "parity", "--scale", "tpu"]) == 2
    assert "--scale: expected laptop or gpu, got 'tpu'" in capsys.readouterr().err
