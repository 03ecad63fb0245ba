"""The script for a day with a GPU, as far as it can be run without one."""

import pytest
import torch

from hybrid_kernels import gpu_check
from hybrid_kernels.testing import FORMS


def test_correctness_finds_agreement():
    form = next(form for form in FORMS if form.name == "delta_scalar")
    cpu = torch.device("cpu")
    row = gpu_check._agreement(form, torch.float32, "mild", [5, 0, 9], cpu, 14, 8)
    assert not row["wrong"]
    assert row["same_bits_twice"]
    assert row["causal"]
    assert gpu_check._line(row).startswith("ok")


def test_correctness_finds_disagreement(monkeypatch):
    form = next(form for form in FORMS if form.name == "additive")
    monkeypatch.setitem(gpu_check.TOLERANCE, torch.float32, 0.0)
    row = gpu_check._agreement(form, torch.float32, "mild", None, torch.device("cpu"), 9, 4)
    assert row["wrong"]
    assert gpu_check._line(row).startswith("BAD")


@pytest.mark.parametrize("name", gpu_check.BENCHED)
def test_what_is_timed_runs(name):
    form = next(form for form in FORMS if form.name == name)
    (inputs, *_) = gpu_check.draw(form, (1, 5, 1, 8), torch.device("cpu"))
    gpu_check.forward_of(inputs, "triton")()
    grads = gpu_check.training_of(inputs, "triton")()
    assert all(g.isfinite().all() for g in grads)
    assert gpu_check.traffic(inputs) > 4 * inputs["v"].numel() * 2
