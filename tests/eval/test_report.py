"""Tables, merged runs and files of a report."""

import csv
import io
import json

import pytest

from hybrid_eval import Settings, evaluate, load, merge, write_report
from hybrid_eval.cli import main
from hybrid_eval.contrast import aggregate
from hybrid_eval.tables import Table, context_table, effective, latex_text, length_table, weighted

QUICK = Settings(lengths=(32, 64), depths=(0.0, 1.0), limit=2)


def model(name, **results):
    return {"name": name, "results": results}


def result(scores, axis="retrieval", **more):
    cells = [{"length": at, "accuracy": score} for at, score in scores.items()]
    return {"axis": axis, "metric": "accuracy", "cells": cells, **more}


def test_a_table_of_tasks_by_lengths_takes_means_over_depths():
    grid = result({})
    grid["cells"] = [
        {"length": 1024, "depth": depth, "accuracy": score}
        for depth, score in ((0.0, 0.2), (1.0, 0.6))
    ]
    results = {
        "models": [
            model("a", niah_grid={**grid, "mode": "forced"}, cost={"axis": "cost"}),
            model("b", long_vt=result({1024: 0.5, 4096: 0.25})),
        ]
    }
    (table,) = length_table(results)
    assert [words for words, _ in table.headings] == ["task", "1k", "4k"]
    assert table.rows == [
        ["a: niah_grid (forced)", "0.400", "-"],
        ["b: long_vt", "0.500", "0.250"],
    ]


def test_the_effective_length_ends_where_a_score_first_falls():
    scores = {1024: 0.95, 2048: 0.9, 4096: 0.7, 8192: 0.99}
    assert effective(scores, 0.856) == 2048
    assert effective(scores, 0.6) == 8192
    assert effective(scores, 0.97) is None
    # weights 1, 2, 3 over a score of one at the longest length: 3 / 6
    assert weighted([0, 0, 1], rising=True) == pytest.approx(0.5)
    assert weighted([0, 0, 1], rising=False) == pytest.approx(1 / 6)


def test_rulers_mean_counts_its_tasks():
    tasks = {
        "ruler_niah_single_1": result({1024: 1.0, 2048: 1.0}),
        "ruler_variable_tracking": result({1024: 0.8, 2048: 0.4, 4096: 0.1}),
        "niah_grid": result({1024: 0.0}),
    }
    (table,) = context_table({"models": [model("a", **tasks)]})
    (row,) = table.rows
    # means 0.9 and 0.7: only lengths that both tasks have
    assert row == ["a: RULER", "2 of 13", "0.800", "0.767", "0.833", "1k", "1k"]


def test_axes_are_means_above_chance():
    record = model(
        "a",
        x={"accuracy": 0.75, "interval": [0.5, 1.0], "chance": 0.5},
        y={"accuracy": 0.25, "interval": [0.25, 0.25], "chance": 0.0},
    )
    # x: 0.5 with [0, 1]; y: 0.25 known exactly; the mean has half of x's half-width
    assert aggregate(record, ["x", "y"]) == pytest.approx((0.375, 0.125, 0.625))


def test_wide_tables_are_cut_to_fit_the_page():
    headings = [(f"c{i}", "") for i in range(14)]
    table = Table("Wide", headings, [[f"v{i}" for i in range(14)]], "note")
    parts = table.parts()
    assert [len(part.headings) for part in parts] == [6, 6, 4]
    assert [part.rows[0][0] for part in parts] == ["v0"] * 3
    assert [cell for part in parts for cell in part.rows[0][1:]] == [f"v{i}" for i in range(1, 14)]
    assert [part.title for part in parts] == ["Wide", "", ""]
    assert [part.note for part in parts] == ["", "", "note"]


def test_tables_of_long_words_are_cut_earlier():
    headings = [("model", ""), *((f"a_task_with_a_long_name@length={i}", "") for i in range(4))]
    table = Table("Long", headings, [["m", *["0.123 [0.100, 0.150]"] * 4]])
    parts = table.parts()
    assert [len(part.headings) for part in parts] == [3, 3]
    # a table of one column is left as it is
    assert len(Table("One", headings[:2], [["m", "x" * 200]]).parts()) == 1


def test_tables_are_files_for_a_spreadsheet_and_a_paper(tiny_llama, tmp_path):
    name = "50% & [a]_$x$, more"
    subjects = [load(tiny_llama, name=n, tokenizer="bytes") for n in (name, "_b")]
    results = evaluate(subjects, ("mqar", "needle", "heldout", "cost"), settings=QUICK)
    write_report(results, tmp_path)
    rows = list(csv.reader(io.StringIO((tmp_path / "tables" / "summary.csv").read_text())))
    assert [row[0] for row in rows] == ["model", name, "_b"]
    latex = (tmp_path / "tables" / "summary.tex").read_text()
    assert r"50\% \& {[}a{]}\_\$x\$, more & " in latex
    assert latex.count(r"\\") == 3
    assert latex_text("a\\b~<") == r"a\textbackslash{}b\textasciitilde{}\textless{}"
    assert {path.suffix for path in tmp_path.glob("retrieval_vs_loss.*")} == {
        ".png",
        ".svg",
        ".pdf",
    }
    # text stays text, and names are no formulas
    assert "$x$" in (tmp_path / "retrieval_vs_loss.svg").read_text()
    html = (tmp_path / "report.html").read_text()
    for words in (
        "lengths 32, 64",
        "depths 0, 1",
        "float32",
        f"hash {results['models'][0]['fingerprint'][:16]}",
    ):
        assert words in html


def test_runs_of_several_days_are_one_report(tiny_llama, tmp_path, capsys):
    subject = load(tiny_llama, name="tiny", tokenizer="bytes")
    for day, tasks in (("monday", ["mqar", "cost"]), ("tuesday", ["needle", "heldout", "cost"])):
        write_report(evaluate(subject, tasks, settings=QUICK), tmp_path / day)
    out = tmp_path / "both"
    folders = [str(tmp_path / day) for day in ("monday", "tuesday")]
    assert main(["--merge", *folders, "--out", str(out)]) == 0
    assert "needle: accuracy" in capsys.readouterr().out
    (found,) = json.loads((out / "results.json").read_text())["models"]
    assert list(found["results"]) == ["mqar", "cost", "needle", "heldout"]
    html = (out / "report.html").read_text()
    for folder in folders:
        assert f"{folder}, made " in html


def test_different_models_of_one_name_keep_apart(tiny_llama, tmp_path):
    write_report(evaluate(load(tiny_llama, name="m"), ["mqar"], settings=QUICK), tmp_path / "a")
    tiny_llama.lm_head.weight.data.mul_(2)
    write_report(evaluate(load(tiny_llama, name="m"), ["cost"], settings=QUICK), tmp_path / "b")
    merged = merge([tmp_path / "a", tmp_path / "b"])
    assert [m["name"] for m in merged["models"]] == ["m", "m (b)"]
    # a task that only one of them has
    html = write_report(merged, tmp_path / "both").read_text()
    assert "mqar: accuracy" in html


def test_what_cannot_be_merged_is_named(tiny_llama, tmp_path):
    subject = load(tiny_llama, name="m")
    write_report(evaluate(subject, ["mqar"], settings=QUICK), tmp_path / "a")
    write_report(evaluate(subject, ["mqar"], settings=Settings(limit=4)), tmp_path / "b")
    write_report(evaluate(subject, ["cost"], settings=Settings(seed=3)), tmp_path / "c")
    with pytest.raises(ValueError, match="mqar of m was measured differently in a run before it"):
        merge([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match=r"c: seed 3, but .*a has 0"):
        merge([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(ValueError, match=r"none/results.json|none: no results"):
        merge([tmp_path / "none"])
    (tmp_path / "a" / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"a/results.json: damaged results"):
        merge([tmp_path / "a"])
