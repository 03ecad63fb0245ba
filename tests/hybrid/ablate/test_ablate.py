"""Ablations: equal cost, the right set of runs, resuming, and what counts as established."""

import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from hybrid.ablate import load_ablation, markdown, plan_runs, run_design, summarise, write_report
from hybrid.ablate.config import parse_ablation
from hybrid.ablate.evaluation import EvaluationTasks
from hybrid.ablate.runs import CONFIG
from hybrid.cli import main
from hybrid.config.options import ConfigError
from hybrid.data.mixture import Mixture
from hybrid.plan import load_model_config, plan
from hybrid.train import load_config
from hybrid_eval.seeds import estimate, p_value, t_quantile
from hybrid_eval.stats import holm

ABLATIONS = Path(__file__).parents[3] / "configs" / "ablations"
STEPS = 8


@pytest.fixture
def values(tmp_path):
    """Runs of a fraction of a second: one layer, eight steps, a checkpoint every third."""
    return {
        "name": "tiny",
        "baseline": {
            "model": {
                "layout": "L",
                "hidden_size": 16,
                "mixers": {"L": {"num_heads": 2}, "S": {"num_heads": 2}},
                "feed_forwards": {"-": {"intermediate_size": 24}},
            },
            "data": {"source": "mqar", "pairs": 3, "repeat": True},
            "sequence_length": 16,
            "training": {
                "max_steps": STEPS,
                "save_steps": 3,
                "logging_steps": 1,
                "per_device_train_batch_size": 4,
                "learning_rate": 3e-2,
                "lr_scheduler_type": "constant",
                "disable_tqdm": True,
            },
        },
        "changes": {"other_seed": {"training.data_seed": 77}},
        "out": str(tmp_path / "out"),
    }


def designed(values, **more):
    return plan_runs(parse_ablation({**copy.deepcopy(values), **more}))


def quiet(line):
    pass


def mistakes(values, **more):
    with pytest.raises(ConfigError) as caught:
        designed(values, **more)
    return caught.value.mistakes


# The set of runs


def test_each_change_alone_and_all_but_each(values):
    changes = {
        "a": {"training.warmup_steps": 2},
        "b": {"model.norm": "layernorm"},
        "c": {"training": {"weight_decay": 0.1}},
    }
    design = designed(values, changes=changes, seeds=[3, 4])
    sets = {v.name: set(v.changes) for v in design.variants}
    assert sets == {
        "baseline": set(),
        **{"a": {"a"}, "b": {"b"}, "c": {"c"}, "all": {"a", "b", "c"}},
        **{"all-but-a": {"b", "c"}, "all-but-b": {"a", "c"}, "all-but-c": {"a", "b"}},
    }
    for contrast in design.contrasts:
        differ = sets[contrast.changed] - sets[contrast.unchanged]
        assert differ == {contrast.change}
        assert sets[contrast.unchanged] < sets[contrast.changed]
    assert len(design.contrasts) == 6
    for variant in design.variants:
        training = variant.config.training
        assert (training.get("warmup_steps") == 2) == ("a" in variant.changes)
        assert (variant.config.model.get("norm") == "layernorm") == ("b" in variant.changes)
        assert (training.get("weight_decay") == 0.1) == ("c" in variant.changes)
        assert training["learning_rate"] == 3e-2  # a mapping is merged, not put in its place
    folders = [folder for *_, folder in design.runs()]
    assert len(set(folders)) == len(folders) == 8 * 2


def test_no_set_of_changes_runs_twice(values):
    two = {"a": {"training.warmup_steps": 2}, "b": {"model.norm": "layernorm"}}
    design = designed(values, changes=two)
    assert [v.name for v in design.variants] == ["baseline", "a", "b", "all"]
    assert {(c.change, c.unchanged) for c in design.contrasts if c.kind == "leave-one-out"} == {
        ("a", "b"),
        ("b", "a"),
    }
    assert [v.name for v in designed(values).variants] == ["baseline", "other_seed"]


# Equal cost


@pytest.mark.parametrize(
    ("cost", "width", "step"),
    [
        ("parameters", "model.hidden_size", 4),
        ("flops", "model.feed_forwards.-.intermediate_size", 1),
    ],
)
def test_every_variant_costs_what_the_baseline_costs(values, cost, width, step):
    """Counted anew, on the file that a run is trained from."""
    values["baseline"]["model"] |= {"layout": "LLSS", "hidden_size": 160}
    values["baseline"]["model"]["feed_forwards"]["-"]["intermediate_size"] = 400
    changes = {
        "gated": {"model.mixers.S.output_gate": True},
        "deep": {"model.layout": "LLSSLL"},
        "one_head": {"model.mixers.S": {"num_kv_heads": 1}},
    }
    match = {"cost": cost, "width": width, "step": step, "within": 0.03}
    design = designed(values, changes=changes, match=match, leave_one_out=False)
    found = {}
    for variant in design.variants:
        path = Path(values["out"]) / f"{variant.name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"model": {**variant.config.model, "vocab_size": 259}}))
        counted = plan(load_model_config(str(path.rename(path.with_suffix(".yaml")))), 16)
        figure = "parameters" if cost == "parameters" else "training_flops_per_token"
        found[variant.name] = getattr(counted, figure)
    for variant in design.variants[1:]:
        assert found[variant.name] / found["baseline"] - 1 == pytest.approx(variant.difference)
        assert abs(variant.difference) <= 0.03
        assert variant.width is not None
        assert variant.width % step == 0
    # and the width had to move: six layers instead of four
    assert found["deep"] != pytest.approx(_unmatched(values, changes, "deep", cost), rel=0.1)


def _unmatched(values, changes, name, cost):
    variants = {v.name: v for v in designed(values, changes=changes, leave_one_out=False).variants}
    found = variants[name].cost
    return found.parameters if cost == "parameters" else found.flops_per_token


def test_a_change_that_costs_nothing_keeps_the_width(values):
    design = designed(values, match={"cost": "parameters", "step": 8})
    assert [v.width for v in design.variants] == [None, 16]
    assert design.variants[1].difference == 0


def test_what_agrees_without_the_width_is_accepted(values):
    """A layout without Lightning has no use for its heads' width; it may cost the same anyhow."""
    values["baseline"]["model"]["layout"] = "LS"
    changes = {"softmax": {"model.layout": "SS"}, "gated": {"model.mixers.L.conv_size": 4}}
    match = {"cost": "parameters", "width": "model.mixers.L.value_head_dim", "step": 1}
    loose = designed(values, changes=changes, match={**match, "within": 0.2}, leave_one_out=False)
    softmax = loose.variants[1]
    assert softmax.width is None
    assert 0 < abs(softmax.difference) <= 0.2
    assert loose.variants[2].width is not None
    lines = mistakes(values, changes=changes, match={**match, "within": 0.001})
    assert any(
        line.startswith("softmax: match.width: nothing to match: model.mixers.L.value_head_dim")
        for line in lines
    )


def test_what_cannot_be_matched_is_said(values):
    match = {"cost": "parameters", "step": 16, "within": 0.001}
    (line,) = mistakes(values, match=match, changes={"deep": {"model.layout": "LLL"}})
    assert line.startswith("deep: match.within: expected a model.hidden_size within 0.1% of the")
    assert "parameters, got +" in line
    match = {"cost": "flops", "width": "model.feed_forwards.E.intermediate_size"}
    (line,) = mistakes(values, match=match)
    assert "nothing to match: model.feed_forwards.E.intermediate_size changes no flops" in line
    match = {"cost": "flops", "width": "model.hiden_size"}
    (line,) = mistakes(values, match=match)
    assert "expected a model.hiden_size that the model accepts" in line
    assert "did you mean 'hidden_size'" in line


@pytest.mark.parametrize(
    ("width", "step", "within"),
    [
        ("model.hidden_size", 16, 0.001),
        ("model.hidden_size", 64, 0.03),
        ("model.feed_forwards.-.intermediate_size", 48, 0.01),
        ("model.feed_forwards.-.intermediate_size", 64, 0.0001),
    ],
)
def test_what_a_refused_match_proposes_works(values, width, step, within):
    values["baseline"]["model"] |= {"layout": "LLSS", "hidden_size": 160}
    values["baseline"]["model"]["feed_forwards"]["-"]["intermediate_size"] = 400
    changes = {"gated": {"model.mixers.S.output_gate": True}, "deep": {"model.layout": "LLSSL"}}
    match = {"cost": "parameters", "width": width, "step": step, "within": within}
    lines = mistakes(values, changes=changes, match=match, leave_one_out=False)
    for line in lines:
        name = line.split(":")[0]
        proposed = dict(re.findall(r"match\.(step|within)=([\d.]+)", line))
        assert proposed
        better = {
            **match,
            "step": int(proposed["step"]),
            "within": float(proposed.get("within", within)),
        }
        found = designed(
            values, changes={name: changes[name]}, match=better, leave_one_out=False
        ).variants[1]
        assert f" {found.width}," in line
        assert abs(found.difference) <= better["within"]


# Mistakes


def test_every_mistake_is_named_before_anything_runs(values):
    found = mistakes(
        values,
        changes={
            "a b": {"training.warmup_steps": 1},
            "all": {"training.warmup_steps": 1},
            "typo": {"training.learning_rat": 1.0, "model.hiden_size": 3},
            "owned": {"training.seed": 3},
            "width": {"model.hidden_size": 32},
        },
        match={"cost": "parameters"},
        seeds=[0, 1, 1],
        metrics=["loss", "eval_los", "loss"],
        confidence=95.0,
    )
    assert found == [
        "changes.a b: expected a name of letters, digits and _.+-, got 'a b'",
        "changes.all: expected another name, got one reserved for combined changes",
        "seeds: expected each value once, got 1 twice",
        "metrics: expected each value once, got 'loss' twice",
        "confidence: expected below 1, got 95.0",
        "changes.typo.model.hiden_size: unknown key, did you mean 'hidden_size'?",
        "changes.typo.training.learning_rat: unknown key, did you mean 'learning_rate'?",
        "changes.owned.training.seed: expected none, since each run sets it; try `seeds`, `out`",
        "changes.width.model.hidden_size: expected none, since `match` solves for this width",
        "metrics: unknown metric 'eval_los', did you mean 'eval_loss'?",
    ]
    assert mistakes(values, metrics=["eval_loss"], changes={}, seeds=[]) == [
        "changes: expected at least 1 entry, got {}",
        "seeds: expected at least 1 entry, got []",
        "metrics: expected eval_data in the baseline for 'eval_loss', got none",
    ]
    assert mistakes(values, match={"cost": "flop", "stepp": 3, "within": 2}) == [
        "match.cost: expected one of 'parameters' or 'flops', got 'flop'; try 'flops'",
        "match.within: expected below 1, got 2",
        "match.stepp: unknown key, did you mean 'step'?",
    ]
    assert not Path(values["out"]).exists()


def test_changes_that_cannot_be_on_together(values):
    changes = {"x": {"model.layout": "S"}, "y": {"model": {"layout": "LL"}}}
    (line,) = mistakes(values, changes=changes)
    assert "changes.y: expected other keys than in changes.x, got model.layout in both" in line
    assert "leave_one_out: false" in line
    assert len(designed(values, changes=changes, leave_one_out=False).variants) == 3


def test_a_mistake_in_the_baseline_is_named_once(values):
    values["baseline"]["model"]["hiden_size"] = 3
    assert mistakes(values) == [
        "baseline.model.hiden_size: unknown key, did you mean 'hidden_size'?"
    ]


# Running


def without_clocks(report):
    """A report less what a clock says."""
    kept = copy.deepcopy(report)
    for variant in kept["variants"]:
        assert variant.pop("seconds") > 0
        assert variant.pop("tokens_per_second") > 0
    return kept


def run_all(design):
    return summarise(design, run_design(design, report=quiet))


@pytest.mark.parametrize(
    "own", [{"training.max_steps": 9, "training": {"seed": 3}}, {"training": {"max_steps": 9}}]
)
def test_the_command_line_replaces_the_overrides_of_the_file(values, tmp_path, own):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**values, "overrides": {**own, "sequence_length": 24}}))
    assert load_ablation(path).baseline["training"]["max_steps"] == 9
    found = load_ablation(path, ["baseline.training.max_steps=5", "seeds=[4]"])
    assert (found.baseline["training"]["max_steps"], found.seeds) == (5, [4])
    assert found.baseline["sequence_length"] == 24
    # a change of the overrides themselves still comes last
    assert load_ablation(path, ["overrides.sequence_length=20"]).baseline["sequence_length"] == 20


def test_mistakes_in_both_kinds_of_overrides_are_reported(values, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**values, "overrides": {"sequence_length.x": 24}}))
    with pytest.raises(ConfigError, match=r"overrides\.sequence_length\.x"):
        load_ablation(path, ["baseline.training.max_steps=5"])
    with pytest.raises(ConfigError) as caught:
        load_ablation(path, ["baseline.training.max_steps.x=5", "seeds"])
    assert len(caught.value.mistakes) == 2


def test_the_documented_lines_of_the_quick_ablation_do_what_they_say():
    """docs/ablations.md: more steps by the command line; an interrupted run keeps a checkpoint."""
    overrides = ["baseline.training.max_steps=400"]
    found = load_ablation(ABLATIONS / "quick.yaml", overrides, EvaluationTasks())
    assert found.baseline["training"]["max_steps"] == 400
    assert found.baseline["training"]["save_strategy"] != "no"


@pytest.mark.slow
def test_after_a_kill_the_report_is_that_of_an_uninterrupted_ablation(
    values, tmp_path, monkeypatch
):
    values["seeds"] = [0, 1]
    values["baseline"]["eval_data"] = {"source": "mqar", "pairs": 3}
    values["baseline"]["eval_rows"] = 4
    values["baseline"]["training"]["eval_steps"] = 4
    whole = run_all(designed(values, out=str(tmp_path / "whole")))
    assert list(whole["metrics"]) == ["loss", "eval_loss"]
    design = designed(values)
    real, drawn = Mixture.__getitem__, []

    def killed(self, index):
        drawn.append(index)
        # in the second run, behind the checkpoint of step 6; one evaluation of four rows counts, too
        if len(drawn) == STEPS * 4 + 8 + 7 * 4 + 4:
            raise KeyboardInterrupt
        return real(self, index)

    monkeypatch.setattr(Mixture, "__getitem__", killed)
    with pytest.raises(KeyboardInterrupt):
        run_design(design, report=quiet)
    monkeypatch.undo()
    assert sum((folder / "train_result.json").is_file() for *_, folder in design.runs()) == 1
    told = []
    resumed = summarise(design, run_design(design, report=told.append))
    assert "trained already" in told[0]
    assert "continuing" in told[2]
    assert without_clocks(resumed) == without_clocks(whole)
    # a finished one computes nothing
    monkeypatch.setattr(Mixture, "__getitem__", None)
    assert run_all(design) == resumed


@pytest.mark.slow
def test_noise_is_noise_and_harm_is_established(values):
    """Another order of the data does nothing on average; no learning at all does harm."""
    values["changes"] = {
        "same": {"training.learning_rate": 3e-2},
        "other_data": {"training.data_seed": 77},
        "no_learning": {"training.learning_rate": 0.0},
    }
    values["baseline"]["training"] |= {"max_steps": 24, "save_strategy": "no"}
    report = run_all(designed(values, leave_one_out=False, seeds=3))
    said = {effect["change"]: effect["verdict"] for effect in report["effects"]}
    assert said == {"same": "noise", "other_data": "noise", "no_learning": "worse"}
    effects = {effect["change"]: effect for effect in report["effects"]}
    assert set(effects["same"]["pairs"].values()) == {0.0}
    assert effects["no_learning"]["low"] > 0
    assert len(set(effects["other_data"]["pairs"].values())) == 3
    path = write_report(report, values["out"])
    text = path.read_text()
    assert "| no_learning | no_learning - baseline | loss |" in text
    assert "established: worse |" in text
    assert "with Holm's correction" in text
    assert json.loads((path.parent / "report.json").read_text()) == report
    assert (path.parent / "effects.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_diverges_is_reported_and_the_others_go_on(values):
    values["changes"] = {
        "wild": {"training": {"learning_rate": 1e30, "max_grad_norm": 0}},
    }
    values["seeds"] = [0]
    report = run_all(designed(values))
    wild = report["variants"][1]
    assert wild["diverged"]["0"].startswith("loss: expected a finite number")
    (effect,) = report["effects"]
    assert effect["verdict"] == "no pair of seeds"
    assert "wild, seed 0, diverged: loss: expected a finite number" in markdown(report)
    assert run_all(designed(values)) == report


def test_folders_of_another_ablation_are_refused(values):
    values["seeds"] = [0]
    design = designed(values)
    folder = next(iter(design.runs()))[2]
    folder.mkdir(parents=True)
    values["baseline"]["training"]["learning_rate"] = 0.5
    other = designed(values)
    (folder / CONFIG).write_text(json.dumps(_planned(other)))
    with pytest.raises(ConfigError) as caught:
        run_design(design, report=quiet)
    assert caught.value.mistakes == [f"{folder}: training.learning_rate: was 0.5, is 0.03"]


def _planned(design):
    from hybrid.ablate.runs import run_values

    variant, seed, folder = next(iter(design.runs()))
    return run_values(variant, seed, folder)


# Statistics


def test_t_quantiles_are_those_of_the_printed_tables():
    """Abramowitz and Stegun, table 26.10."""
    printed = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 10: 2.228, 30: 2.042}
    for freedom, value in printed.items():
        assert t_quantile(0.95, freedom) == pytest.approx(value, abs=6e-4)
    assert t_quantile(0.99, 5) == pytest.approx(4.032, abs=6e-4)


def test_an_interval_and_its_p_agree():
    values = [0.3, 0.1, 0.4, 0.2]
    found = estimate(values, 0.95)
    assert found.mean == pytest.approx(0.25)
    # 3.182 times sqrt(0.05 / 3 / 4)
    assert found.high - found.mean == pytest.approx(3.182 * 0.0645497, abs=1e-4)
    assert found.low > 0
    assert p_value(values) < 0.05
    edge = 1 - p_value(values)
    assert estimate(values, edge).low == pytest.approx(0, abs=1e-9)
    assert math.isnan(estimate([1.0], 0.95).low)
    assert math.isnan(p_value([1.0]))


def test_holm_s_own_procedure():
    """Sorted 0.01, 0.02, 0.03, 0.9: times 4, 3, 2, 1, and never falling."""
    assert holm([0.03, 0.9, 0.01, math.nan, 0.02]) == pytest.approx(
        [0.06, 0.9, 0.04, math.nan, 0.06], nan_ok=True
    )


@pytest.mark.slow
def test_changes_that_do_nothing_are_rarely_called_something():
    """500 ablations of five changes without effect: at most 5% may establish any, plus chance."""
    rng = np.random.default_rng(0)
    alarms = raw = 0
    for _ in range(500):
        ps = [p_value(rng.normal(size=3).tolist()) for _ in range(5)]
        if min(ps) < 0.05:  # else Holm's are larger still
            raw += 1
            alarms += min(holm(ps)) < 0.05
    assert alarms <= 500 * 0.05 + 3 * math.sqrt(500 * 0.05 * 0.95)
    # without the correction it would be about 1 - 0.95 ** 5
    assert raw > 90


# The command line


@pytest.mark.parametrize("path", sorted(ABLATIONS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_an_ablation(path):
    tasks = ["metrics=[loss]", "evaluate={}"]
    found = load_ablation(path, tasks)
    assert len(found.seeds) >= 3
    assert found.match is not None
    assert found.out == f"runs/ablations/{path.stem}"


def test_a_dry_run_prints_the_widths_and_trains_nothing(capsys, tmp_path):
    out = tmp_path / "out"
    quick = str(ABLATIONS / "quick.yaml")
    assert main(["ablate", quick, "--dry-run", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "12 runs" in printed
    assert "width: model.mixers.L.value_head_dim" in printed
    assert "all-but" not in printed  # of two changes, all but one is the other
    for name in ("baseline", "no_softmax", "no_conv", "all"):
        (line,) = [x for x in printed.splitlines() if x.startswith(f"  {name} ")]
        assert "%" in line
    assert not out.exists()


def test_the_command_line_names_an_unknown_task_and_option(capsys, monkeypatch):
    # reading lm-eval's list of tasks takes long
    monkeypatch.setattr("hybrid_eval.lm_harness._manager", lambda path: None)
    quick = str(ABLATIONS / "quick.yaml")
    words = ["metrics=[loss, mqa]", "evaluate={limt: 3, options: {mqar: {pears: 2}}}"]
    assert main(["ablate", quick, "--dry-run", *words]) == 2
    said = capsys.readouterr().err
    assert "metrics: unknown metric 'mqa', did you mean 'mqar'?" in said
    assert "evaluate.limt: unknown key, did you mean 'limit'?" in said
    assert "'pears'" in said


def test_the_command_line_trains_measures_and_reports(values, tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    values |= {"metrics": ["loss", "mqar"], "seeds": [0, 1]}
    values["baseline"]["training"]["save_strategy"] = "no"
    values["evaluate"] = {"limit": 4, "options": {"mqar": {"sequence_length": 16, "pairs": 3}}}
    path.write_text(json.dumps(values))
    assert main(["ablate", str(path), "baseline.training.max_steps=2"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metrics"] == {"loss": "lower", "mqar": "higher"}
    assert all(0 <= v["metrics"]["mqar"]["mean"] <= 1 for v in report["variants"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Effect of each change" in page
    assert "data:image/png;base64," in page
    run = load_config(tmp_path / "out" / "baseline" / "seed-0" / CONFIG)
    assert run.training["max_steps"] == 2
    again = load_ablation(path, ["metrics=[loss]", "evaluate={}"])
    assert again.baseline["training"]["max_steps"] == STEPS
