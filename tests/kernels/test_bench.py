"""The benchmark runs and says what it measured; its figures are nobody's business here."""

import json
import subprocess
import sys

import pytest
import torch

from hybrid_kernels import bench


def test_it_runs_and_writes_its_figures(tmp_path):
    """In a process of its own: transformers warns at import when an optional package is odd."""
    out = tmp_path / "out.json"
    options = ["--ops", "conv1d", "step_ssd", "--lengths", "64", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "hybrid_kernels.bench", *options, "--json", str(out)],
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
        ("step_ssd", "forward"),
    }


def test_a_pair_that_disagrees_is_refused(monkeypatch):
    """No speed-up is reported for a wrong answer."""
    pair = bench.rivals.Pair(lambda length: {"x": torch.ones(length)}, lambda x: 2 * x, lambda x: x)
    monkeypatch.setitem(bench.rivals.PAIRS, "wrong", pair)
    with pytest.raises(AssertionError, match="the two sides differ"):
        bench.measure("wrong", 8, 1, True, 1.0)
