"""The script for a day with a GPU, as far as it can be run without one."""

import json
import sys

import pytest
import torch

from hybrid.train import gpu_benchmark


def test_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fla", None)
    arguments = ["--dry-run", "--layouts", "LLLS", "--out", str(tmp_path)]
    assert gpu_benchmark.main(arguments) == 0
    found = json.loads((tmp_path / "model.json").read_text())
    rows = found["rows"]
    assert [(row["side"], row["length"]) for row in rows] == [
        (side, length) for length in (32, 64) for side in gpu_benchmark.SIDES
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert found["unequal"] == []
    assert capsys.readouterr().out.count("tokens/s") == 4


def test_a_model_that_fails_is_a_row(monkeypatch):
    def measure(layout, side, *_):
        if side == "ours":
            raise RuntimeError("out of memory")
        return {"tokens_per_second": 1.0, "parameters": 10}

    monkeypatch.setattr(gpu_benchmark, "measure", measure)
    cpu = torch.device("cpu")
    ours, theirs = gpu_benchmark.rows(["LLLS"], [32], gpu_benchmark.TINY, cpu)
    assert ours["error"] == "RuntimeError: out of memory"
    assert "FAILED" in gpu_benchmark.line(ours)
    assert "error" not in theirs


def test_unequal_sides_are_named():
    rows = [
        {"layout": "LLLS", "side": side, "parameters": parameters}
        for side, parameters in zip(gpu_benchmark.SIDES, (100, 110), strict=True)
    ]
    assert gpu_benchmark.unequal(rows) == ["LLLS: 100 parameters against 110"]


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_benchmark.main(["--out", str(tmp_path)])
    assert "expected a GPU" in capsys.readouterr().err
