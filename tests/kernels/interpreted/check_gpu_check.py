"""The script for a day with a GPU, as far as it can be run without one."""

import importlib
import json
import pkgutil

import pytest
import torch

import gpu_bench
import gpu_check
import hybrid_kernels.triton
from hybrid_kernels import linear_attention
from hybrid_kernels.testing import FORMS, sample
from hybrid_kernels.triton import launch

CPU = torch.device("cpu")
DELTA = next(form for form in FORMS if form.name == "delta_scalar")


def test_agreement_is_found():
    inputs = sample(DELTA, lengths=[5, 0, 9], key_dim=8)
    row = gpu_check.agreement(linear_attention, inputs, 1e-5)
    assert not row["wrong"]
    assert row["same_bits_twice"]
    assert row["causal"]
    where = {"form": "delta_scalar", "dtype": "float32", "gates": "mild", "packed": True}
    assert gpu_check._line({**where, **row}).startswith("ok  delta_scalar float32 mild packed")
    wrong = {**row, "wrong": {"output": 1.0}}
    assert gpu_check._line({**where, **wrong}).startswith("BAD")


def test_disagreement_is_found():
    """A backend that looks ahead, and adds noise."""

    def op(*, backend, **inputs):
        o, state = linear_attention(**inputs, backend="reference")
        if backend == "triton":
            o = o + inputs["v"].flip(1) + 1e-3 * torch.randn(o.shape)
        return o, state

    row = gpu_check.agreement(op, sample(DELTA, batch=1, time=6), 1e-5)
    assert "output" in row["wrong"]
    assert "final_state" not in row["wrong"]
    assert not row["same_bits_twice"]
    assert not row["causal"]


def dry(tmp_path, what, *forms):
    status = gpu_check.main([what, "--form", *forms, "--dry-run", "--out", str(tmp_path)])
    return status, json.loads((tmp_path / f"{what}.json").read_text())


def test_correctness_dry(tmp_path, capsys):
    status, found = dry(tmp_path, "correctness", "additive", "selective_scan")
    assert status == 0
    assert [row["form"] for row in found["rows"]] == ["additive"] * 4 + ["selective_scan"] * 3
    assert [row["walk"] for row in found["rows"]] == [True, False, True, True] + [False] * 3
    assert capsys.readouterr().out.count("ok ") == 7
    assert "dry run" in found["environment"]["device"]
    assert found["failures"] == found["left_out"] == []


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 0),
        ({"wrong": {"output": 1.0}}, 1),
        ({"causal": False}, 1),
        ({"same_bits_twice": False}, 1),
    ],
)
def test_correctness_fails_if_something_is_wrong(tmp_path, monkeypatch, change, status):
    row = {"errors": {"output": 0.0}, "wrong": {}, "causal": True, "same_bits_twice": True}
    monkeypatch.setattr(gpu_check, "agreement", lambda *_: {**row, **change})
    assert dry(tmp_path, "correctness", "additive")[0] == status


def test_one_failure_does_not_end_a_section(tmp_path, monkeypatch, capsys):
    def agreement(op, inputs, tolerance, expected):
        if "cu_seqlens" in inputs:
            raise RuntimeError("an illegal memory access")
        return {"errors": {"o": 0.0}, "wrong": {}, "causal": True, "same_bits_twice": True}

    monkeypatch.setattr(gpu_check, "agreement", agreement)
    status, found = dry(tmp_path, "correctness", "additive", "delta")
    assert status == 1
    assert len(found["rows"]) == 6
    failed = "torch.float32 mild packed walk: RuntimeError: an illegal memory access"
    assert found["failures"] == [f"additive {failed}", f"delta {failed}"]
    assert "6 rows, 0 bad, 2 failures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "dtype", "dim", "walks"),
    [
        ("additive_scalar", torch.float32, 64, True),
        ("additive_scalar", torch.float32, 128, False),
        ("delta_vector", torch.float16, 128, True),
        ("delta_vector", torch.bfloat16, 144, False),
        ("additive_fixed", torch.bfloat16, 128, False),
        ("additive_outer", torch.bfloat16, 64, False),
        ("selective_scan", torch.bfloat16, 64, False),
    ],
)
def test_only_what_walks_is_said_to(name, dtype, dim, walks):
    with launch.record("sm_90", lambda *_: None):
        assert gpu_check._can_walk(name, dtype, dim, CPU) == walks


def test_every_kernel_is_launched_where_the_device_is_another():
    """Of a device that is not the CPU, all that is computed around the kernels."""
    gpu_check.launch_each(torch.device("meta"))


def test_neighbours_of_shipped_blocks():
    found = gpu_check.candidates("pairs", launch.Config(32, 32, 8, 1))
    assert launch.Config(64, 16, 8, 1) in found
    assert launch.Config(32, 32, 4, 3) in found
    assert launch.Config(32, 32, 8, 1) not in found
    assert len(found) == len(set(found)) <= 14
    whole = gpu_check.candidates("fused_chunk_forward", launch.Config(128, 64, 4, 2))
    assert {config.keys for config in whole} == {128}


def test_what_the_budget_leaves_out_is_named(tmp_path):
    words = ["correctness", "--dry-run", "--out", str(tmp_path), "--form", "additive"]
    assert gpu_check.main([*words, "--budget", "-1"]) == 0
    found = json.loads((tmp_path / "correctness.json").read_text())
    assert found["rows"] == []
    assert len(found["left_out"]) == 4


def test_processes_share_a_section(tmp_path):
    words = [
        "correctness",
        "--dry-run",
        "--out",
        str(tmp_path),
        "--form",
        "additive",
        "additive_fixed",
    ]
    assert gpu_check.main([*words, "--jobs", "2"]) == 0
    found = json.loads((tmp_path / "correctness.json").read_text())
    assert [row["form"] for row in found["rows"]] == ["additive"] * 4 + ["additive_fixed"] * 4


@pytest.mark.parametrize("name", gpu_bench.BENCHED)
def test_bench_dry(tmp_path, name):
    _, found = dry(tmp_path, "bench", name)
    reached, *rows = found["rows"]
    assert set(reached) == {"copy_gb_per_s", "product_tflop_per_s"}
    labels = [(row["backend"], row["pass"]) for row in rows]
    both = ("triton", "reference")
    # One size with all passes, then a decode step.
    assert labels == [(who, p) for p in (*gpu_bench.PASSES, "forward") for who in both]
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.parametrize("name", gpu_bench.BENCHED)
def test_contestants_compute_the_same(name):
    subject = gpu_bench.SUBJECTS[name]
    torch.manual_seed(0)
    inputs = subject.draw((1, 5, 2, 8), CPU)
    wide = {key: x.float() for key, x in inputs.items()}
    ours, theirs = (subject.contestants[who].run(**wide) for who in ("triton", "reference"))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_goals_stand_beside_the_figures():
    for subject, label, size in gpu_bench.GOALS:
        assert subject in gpu_bench.BENCHED
        assert label in gpu_bench.PASSES
        assert size in (gpu_bench.SIZES[0], gpu_bench.DECODE)
    row = {"subject": "x", "size": (1, 2, 3, 4), "pass": "forward", "backend": "triton"}
    goal = {"goal_ms": 0.4, "floor_ms": 0.125}
    assert gpu_bench.line({**row, **goal, "ms": 0.3}).endswith("goal 0.4 (floor 0.125): met")
    assert gpu_bench.line({**row, **goal, "ms": 0.5}).endswith("MISSED")
    assert gpu_bench.line({**row, "goal_ms": None, "ms": 0.5}).endswith("0.500 ms")


def test_traffic_counts_a_state_both_ways():
    inputs = gpu_bench.SUBJECTS["delta_scalar"].draw((2, 1, 3, 8), CPU)
    vectors, numbers, states = 4 * 2 * 3 * 8 * 2, 2 * 3 * (4 + 2), 2 * 2 * 3 * 8 * 8 * 4
    assert gpu_bench.traffic(inputs, inputs["v"]) == vectors + numbers + states


def test_tune_dry(tmp_path, capsys):
    _, found = dry(tmp_path, "tune", "selective_scan")
    assert [row["kernel"] for row in found["rows"]] == ["scan_backward", "scan_forward"]
    assert all(row["best_ms"] > 0 for row in found["rows"])
    assert '"scan_backward": Config(keys=' in capsys.readouterr().out


def all_kernels():
    """Return the names of all kernels of the package."""
    found = set()
    for module in pkgutil.iter_modules(hybrid_kernels.triton.__path__, "hybrid_kernels.triton."):
        names = vars(importlib.import_module(module.name))
        found |= {name for name in names if name.endswith("_kernel")}
    return found


def test_the_sanitizer_sees_every_kernel():
    launched = set()
    with launch.record("interpreter", lambda kernel, *_: launched.add(kernel.__name__)):
        gpu_check.launch_each(CPU)
    assert launched == all_kernels()


def test_sanitize_dry(capsys):
    assert gpu_check.main(["sanitize", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == list(gpu_check.SANITIZERS)
    assert all(line.endswith("gpu_check.py once") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--out", "x"], "no GPU here"),
        (["bench", "--dry-run"], "needs --out"),
        (["bench", "--dry-run", "--out", "x", "--form", "bonus"], "unknown form 'bonus'"),
        (["correctness", "--dry-run", "--out", "x", "--form", "ssd"], "correctness knows additive"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_check.main(arguments)
    assert words in capsys.readouterr().err
