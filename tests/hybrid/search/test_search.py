"""Searches on a model with one softmax layer that matters: each method keeps it, within the budget."""

import csv
import json
import shlex

import pytest
import torch
import yaml

import hybrid
from hybrid.cli import main
from hybrid.config.options import ConfigError
from hybrid.convert.replace_mixers import replace_mixers
from hybrid.plan import plan
from hybrid.search import load_config, on_frontier, parse_config, search
from hybrid.search.importance import ranking
from hybrid.search.models import Models
from hybrid.search.placement import layout_string, measure_space, softmax_layers
from hybrid.search.scores import Score
from search_cases import BEST, LAYERS, MATTERS, letters, proposed, space_of


def test_importance_keeps_the_layer_that_matters(values):
    report = search(parse_config(values))
    for method in ("rank by kl", "greedy backward", "greedy forward"):
        assert proposed(report, method) == [BEST], method
    assert {letters(p["layout"]) for p in report["points"] if p["frontier"]} >= {BEST}
    best = next(p for p in report["points"] if letters(p["layout"]) == BEST)
    assert best["kl"] == pytest.approx(0, abs=1e-6)
    for p in report["points"]:
        if MATTERS not in p["kept"]:
            assert p["kl"] > 1e-3


def test_all_points_but_the_teacher_are_within_the_budget(values):
    values["budget"] = {"layers": 2}
    report = search(parse_config(values))
    outside = [p for p in report["points"] if not p["fits"]]
    assert [p["methods"] for p in outside] == [["teacher"]]
    assert all(p["softmax_layers"] <= 2 for p in report["points"] if p["fits"])
    assert not any(p["frontier"] for p in outside)


def test_a_budget_of_bytes_holds_as_plan_counts_them(values, searched_model):
    config = hybrid.HybridConfig.from_pretrained(searched_model)
    linear = replace_mixers(hybrid.HybridForCausalLM(config), "D5").config
    two = replace_mixers(hybrid.HybridForCausalLM(config), "DSDSD").config
    most = plan(two, 256).cache_bytes
    report = search(parse_config({**values, "budget": {"cache": most}}))
    counts = {p["softmax_layers"] for p in report["points"] if p["fits"]}
    assert max(counts) == 2
    by_layout = {letters(p["layout"]): p["cache_bytes"] for p in report["points"]}
    assert by_layout["D" * LAYERS] == plan(linear, 256).cache_bytes
    assert by_layout["S" * LAYERS] == plan(config, 256).cache_bytes
    assert max(b for b in by_layout.values() if b <= most) == most


def test_assembled_models_compute_what_replaced_ones_do(pair, assert_close_to_rounding):
    teacher, student = pair
    space = space_of(pair, most_layers=3)
    models = Models(teacher, student, space)
    ids = torch.randint(0, 259, (2, 17))
    for kept in (frozenset(), frozenset({1, 3}), frozenset({0}), space.complete):
        built = models.build(kept)
        assert letters(built.config.layout) == letters(space.layout(kept))
        expected = replace_mixers(teacher, space.layout(kept)) if len(kept) < LAYERS else teacher
        with torch.no_grad():
            assert_close_to_rounding(built(ids).logits, expected(ids).logits)
    # a model stays what it was when the next one is built
    first = models.build(frozenset({1}))
    with torch.no_grad():
        before = first(ids).logits
        models.build(frozenset({2}), {i: teacher.model.layers[i].mixer for i in space.layers})
        assert torch.equal(first(ids).logits, before)


def test_models_with_a_window_and_rotary_positions(pair, assert_close_to_rounding):
    teacher = pair[0]
    options = {"W": {"window": 4}}
    student = replace_mixers(teacher, "W5", options)
    space = measure_space(
        teacher, student, tuple(range(LAYERS)), "W", most_layers=2, most_bytes=None, context=64
    )
    built = Models(teacher, student, space).build(frozenset({3, 4}))
    ids = torch.randint(0, 259, (1, 12))
    with torch.no_grad():
        expected = replace_mixers(teacher, "WWWSS", options)(ids).logits
        assert_close_to_rounding(built(ids).logits, expected)


def test_placements():
    assert softmax_layers(hybrid.HybridConfig(layout="SL[SL]S", hidden_size=32)) == (0, 3)
    literal = hybrid.HybridConfig(layout="S-M-S-", hidden_size=32)
    assert softmax_layers(literal) == (0, 4)
    assert letters(layout_string(literal, [("D",), (), ("M",), (), ("S",), ()])) == "D-M-S-"


@pytest.mark.parametrize(
    ("count", "uniform", "last"),
    [(1, {4}, {4}), (2, {1, 4}, {3, 4}), (4, {0, 1, 2, 4}, {1, 2, 3, 4})],
)
def test_baselines(pair, count, uniform, last):
    space = space_of(pair, most_layers=4)
    assert space.uniform(count) == uniform
    assert space.last(count) == last


def test_the_second_call_measures_nothing(values, monkeypatch):
    values["distill"]["outputs"] = {"training": {"max_steps": 1}}  # the mixers are distilled first
    config = parse_config(values)
    before = search(config)
    monkeypatch.setattr(Models, "build", lambda *_, **__: pytest.fail("measured again"))
    assert search(config) == before


def test_an_interrupted_search_goes_on(values, monkeypatch, capsys):
    config = parse_config(values)
    build, calls = Models.build, []

    def interrupted(self, kept, *args):
        calls.append(kept)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return build(self, kept, *args)

    monkeypatch.setattr(Models, "build", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"3 scores in .* are kept"):
        search(config)
    monkeypatch.setattr(Models, "build", build)
    report = search(config)
    assert proposed(report, "greedy backward") == [BEST]


def test_another_search_in_the_folder_is_refused(values):
    search(parse_config(values))
    with pytest.raises(ConfigError, match="rows: was 3, is 2"):
        search(parse_config({**values, "rows": 2}))


def test_a_search_that_was_refused_can_be_mended(values):
    with pytest.raises(ConfigError, match=r"budget\.layers"):
        search(parse_config({**values, "budget": {"layers": 9}, "rows": 2}))
    assert search(parse_config(values))["points"]


def test_recall_ranks_and_is_reported(values):
    values |= {
        "metrics": ["phone_book@length=64"],
        "evaluate": {"lengths": [64], "limit": 2, "options": {"phone_book": {"queries": 2}}},
        "importance": {"greedy": ["forward"], "greedy_by": "recall"},
    }
    report = search(parse_config(values))
    assert proposed(report, "rank by recall") == [BEST]
    assert all(0 <= p["phone_book@length=64"] <= 1 for p in report["points"])
    (table,) = report["tables"]
    assert table[2][-1] == "phone_book@length=64 lost"


def test_rankings_by_either_measure():
    def score(layer, kl, recall):
        return Score((layer,), kl, None, 1.0, {"a": recall, "b": 0.5})

    scores = {0: score(0, 0.1, 0.9), 1: score(1, 0.3, 0.9), 2: score(2, 0.2, 0.1)}
    assert ranking(scores, "kl") == [1, 2, 0]
    # what loses most recall first, and of equals what diverges most
    assert ranking(scores, "recall") == [2, 1, 0]


def test_the_files_agree_and_a_printed_command_runs(values, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    report = search(parse_config(values))
    out = tmp_path / "out"
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    rows = list(csv.DictReader((out / "layouts.csv").read_text().splitlines()))
    assert [r["layout"] for r in rows] == [p["layout"] for p in report["points"]]
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    best = next(r for r in rows if letters(r["layout"]) == BEST)
    assert best["command"] in (out / "report.md").read_text()
    words = shlex.split(best["command"])
    assert words[0] == "hybrid"
    assert main(words[1:]) == 0
    folder = next(word.partition("=")[2] for word in words if word.startswith("output_dir="))
    student = json.loads((tmp_path / folder / "report.json").read_text())
    assert letters(student["layout"]) == BEST


def test_from_the_command_line(values, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    distill = values.pop("distill")
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(distill))
    values["distill"] = "distill.yaml"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**values, "name": "mine"}))
    assert main(["search", "mine.yaml", "budget.layers=2", "importance.greedy=[]"]) == 0
    shown = capsys.readouterr().out
    assert "hybrid distill" in shown
    assert "report:" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": {}}, "budget: expected exactly one of layers and cache"),
        ({"budget": {"layers": 1, "cache": 5}}, "budget: expected exactly one of layers and cache"),
        ({"budget": {"cache": "much"}}, "budget.cache: expected a number of bytes, or a size"),
        ({"methods": ["importence"]}, r"methods\[0\]: .*try 'importance'"),
        ({"linear": "DD"}, "linear: expected one letter, the symbol of a mixer, got 'DD'"),
        ({"metrics": ["mqar without linear"]}, "expected a task without a knock-out"),
        ({"metrics": ["heldout"]}, "expected a task of which more is better"),
        ({"importance": {"greedy_by": "recall"}}, "greedy_by: expected kl without metrics"),
        ({"distill": {"teacher": {"path": "x"}}}, "distill.data: expected a value, got none"),
        ({"rows": 0}, "rows: expected at least 1, got 0"),
        ({"sed": 1}, "sed: unknown key, did you mean 'seed'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(values, change, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({**values, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": {"layers": 5}}, "budget.layers: expected at most 4"),
        ({"budget": {"cache": 10}}, "budget.cache: expected at least"),
        ({"budget": {"cache": "1GiB"}}, "budget.cache: expected at most"),
        (
            {"layers": [1, 9]},
            r"layers: expected some of the softmax layers \[0, 1, 2, 3, 4\], got \[9\]",
        ),
        ({"layers": [1]}, "expected at least two layers of softmax attention"),
        ({"counts": [2]}, "counts: expected numbers of layers within the budget, at most 1"),
        ({"linear": "Q"}, "Q"),
    ],
)
def test_what_the_model_does_not_allow_is_refused(values, change, message):
    with pytest.raises(ValueError, match=message):
        search(parse_config({**values, **change}))


def test_layers_that_are_not_searched_keep_their_mixer(values):
    report = search(parse_config({**values, "layers": [1, 3, 4]}))
    for p in report["points"]:
        assert letters(p["layout"])[0] == letters(p["layout"])[2] == "S"
    assert proposed(report, "rank by kl") == ["SDSSD"]


def test_the_frontier_is_pareto():
    points = [
        {"loss": loss, "recall": recall, "bytes": size}
        for loss, recall, size in [
            (1, 0.5, 3),
            (1, 0.5, 4),
            (2, 0.9, 3),
            (2, 0.9, 3),
            (3, 0.1, 1),
            (1, 0.4, 3),
        ]
    ]
    best = on_frontier(points, {"loss": "lower", "recall": "higher", "bytes": "lower"})
    assert best == [points[0], points[2], points[3], points[4]]


def test_a_file_beside_the_search_is_found(values, tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "distill.yaml").write_text(yaml.safe_dump(values["distill"]))
    (folder / "s.yaml").write_text(
        yaml.safe_dump({"distill": "distill.yaml", "linear": "D", "budget": {"layers": 1}})
    )
    config = load_config(folder / "s.yaml", ["distill.sequence_length=16"])
    assert config.distill["sequence_length"] == 16
    assert config.name == "s"
    assert config.out == "runs/search/s"
