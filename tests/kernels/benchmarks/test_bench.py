"""The benchmark runs and says what it measured; its figures are nobody's business here."""

import json
import subprocess
import sys

import pytest
import torch

import bench
import bench_report
from baseline_steps import STEPS


@pytest.mark.slow
def test_it_runs_and_writes_its_figures(tmp_path):
    """In a process of its own: transformers warns at import when an optional package is odd.

    Every step is run, which is refused where the two sides differ.
    """
    out, table = tmp_path / "out.json", tmp_path / "out.md"
    options = ["--ops", "conv1d", *STEPS, "--lengths", "64", "--repeats", "1"]
    options += ["--json", str(out), "--markdown", str(table)]
    done = subprocess.run(
        [sys.executable, bench.__file__, *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["run"]["torch"] == torch.__version__
    measured = {(r["op"], r["direction"]) for r in found["results"]}
    assert measured == {
        ("conv1d", "forward"),
        ("conv1d", "forward+backward"),
        *((step, "forward") for step in STEPS),
    }
    assert done.stdout.count(">= 2 ") == len(STEPS)
    assert all(r["op"] in table.read_text() for r in found["results"])


def test_a_pair_that_disagrees_is_refused(monkeypatch):
    """No speed-up is reported for a wrong answer."""
    pair = bench.baselines.Pair(
        lambda length: {"x": torch.ones(length)}, lambda x: 2 * x, lambda x: x
    )
    monkeypatch.setitem(bench.PAIRS, "wrong", pair)
    with pytest.raises(AssertionError, match="the two sides differ"):
        bench.measure("wrong", 8, 1, True, 1.0, [])


def test_a_baseline_that_would_take_too_long_is_left_out(monkeypatch):
    """And what only it would tell is said to be unknown."""
    calls = []
    pair = bench.baselines.Pair(
        lambda length: {"x": torch.ones(length)},
        lambda x: 2 * x,
        lambda x: calls.append(len(x)) or 2 * x,
        backward=True,
    )
    monkeypatch.setitem(bench.PAIRS, "slow", pair)
    results = bench.measure("slow", 4096, 1, True, 1.0, ["forward"])
    assert not calls
    assert results[0].ratio is None
    monkeypatch.setitem(bench_report.TARGETS, "slow", (2.0, 2.0, None))
    assert ">= 2 unknown" in bench_report.row(results[0])


def test_the_verdict_names_what_is_missed():
    met = bench_report.Result("conv1d", 4096, "forward", 1.0, 1.5, 1, 1, None)
    missed = bench_report.Result("ssd", 4096, "forward+backward", 1.0, 7.9, 1, 8, None)
    growth = bench_report.Growth("ssd", "forward", 4096, 16384, 1.0, 4.5)
    assert bench_report.verdict([met], []) == "1 of 1 targets met"
    found = bench_report.verdict([met, missed], [growth])
    assert found.startswith("2 of 4 targets met")
    assert "ssd forward+backward 7.90x of 8x" in found
    assert "ssd forward growth 4.50" in found
