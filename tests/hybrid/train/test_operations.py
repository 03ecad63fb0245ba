"""The budget of a step by operation."""

from __future__ import annotations

import time

import torch

from hybrid.train.benchmark import Size, build
from hybrid.train.operations import OperationTimes, table, watch


def test_operations_of_forward_and_backward_are_on_the_clock():
    x = torch.randn(300, 300, requires_grad=True)
    with OperationTimes() as times:
        (x @ x).sum().backward()
    assert times.calls["aten.mm.default"] == 3
    assert times.calls["aten.sum.default"] == 1


def test_a_step_of_both_sides_is_accounted_for():
    start = time.thread_time()
    for model in build("LLLS", Size(128, 32, 64)):
        times = watch(model, 64, 16, steps=2)
        assert times.calls["aten._fused_adamw_.default"] == 2
        total = sum(times.seconds.values())
        assert 0 < total < time.thread_time() - start
        *_, longest, last = table(times, 2, rows=1)
        name = max(times.seconds, key=lambda name: times.seconds[name])
        assert longest.startswith(f"| {name} |")
        assert f"| {times.seconds[name] / 2:.4f} |" in longest
        assert f"| {total / 2:.4f} |" in last
