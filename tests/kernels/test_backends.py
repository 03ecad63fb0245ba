"""Choosing a backend, and what a wrong argument is told."""

import importlib
import logging
import re

import pytest
import torch

import hybrid_kernels
from hybrid_kernels import (
    arguments,
    available_backends,
    backends,
    causal_conv1d,
    linear_attention,
    selective_scan,
)

RECORDS = {
    record.OP: record
    for record in (arguments.LinearAttention, arguments.SelectiveScan, arguments.CausalConv1d)
}


def rows(**changes):
    found = {name: torch.randn(2, 5, 4, 8) for name in "qkv"}
    found.update(changes)
    return found


def test_reference_and_torch_are_always_there():
    for op in backends.OPS:
        assert {"reference", "torch"} <= set(available_backends(op))


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_announced", set())
    monkeypatch.setattr(backends, "_KNOWN", {})
    with caplog.at_level(logging.INFO, logger="hybrid_kernels"):
        for _ in range(3):
            linear_attention(**rows())
    said = [r.message for r in caplog.records if "linear_attention on cpu" in r.message]
    assert len(said) == 1
    assert "'torch'" in said[0]


def test_an_unknown_backend_gets_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'torch'"):
        linear_attention(**rows(), backend="pytorch")


def test_a_scale_that_is_no_number():
    with pytest.raises(ValueError, match="scale: expected a number or None, got str 'a'"):
        linear_attention(**rows(), scale="a")


def test_an_absent_backend_names_the_command():
    absent = [b for b in backends.BACKENDS if backends._missing(b.name)]
    assert absent, "this test needs one optional package to be absent"
    for backend in absent:
        op = getattr(hybrid_kernels, backend.ops[0])
        arguments = {
            linear_attention: [torch.randn(1, 5, 2, 4)] * 3,
            selective_scan: scan(),
            causal_conv1d: [torch.randn(1, 4, 2), torch.randn(2, 4)],
        }
        with pytest.raises(ImportError, match=re.escape(backend.pip)):
            op(*arguments[op], backend=backend.name)


def test_a_gpu_backend_refuses_a_cpu_by_name():
    for backend in backends.BACKENDS:
        if backend.gpu_only and backends._missing(backend.name) is None:
            op = backend.ops[0]
            with pytest.raises(ValueError, match="GPU"):
                backends.choose(RECORDS[op](*[torch.zeros(1)] * 5), backend.name)


def scan(**changes):
    found = {
        "u": torch.randn(1, 5, 3),
        "delta": torch.rand(1, 5, 3),
        "A": -torch.rand(3, 2),
        "B": torch.randn(1, 5, 2),
        "C": torch.randn(1, 5, 2),
    }
    found.update(changes)
    return found.values()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(2, 5, 8)}, r"q: expected \(B, T, heads, dim\)"),
        ({"q": torch.ones(2, 5, 4, 8, dtype=torch.int64)}, "q: expected float64"),
        ({"q": [1.0]}, "q: expected a tensor, got list"),
        ({"v": torch.randn(2, 6, 4, 8)}, "agree in batch and time"),
        ({"k": torch.randn(2, 5, 4, 7)}, "agree in key dim"),
        ({"v": torch.randn(2, 5, 3, 8)}, "v: expected a number of heads that divides"),
        ({"v": torch.randn(2, 5, 4, 257)}, "v: expected a value dim between 1 and 256, got 257"),
        ({"log_decay": torch.randn(2, 5, 3)}, r"log_decay: expected \(H,\)"),
        ({"beta": torch.rand(2, 5, 1)}, r"beta: expected \(B, T, H\) = \(2, 5, 4\)"),
        ({"bonus": torch.rand(4, 7)}, r"bonus: expected \(H, K\)"),
        (
            {"bonus": torch.rand(4, 8), "beta": torch.rand(2, 5, 4)},
            "bonus: expected None beside beta",
        ),
        (
            {"value_log_decay": -torch.rand(2, 5, 4, 8), "beta": torch.rand(2, 5, 4)},
            "value_log_decay: expected None beside beta",
        ),
        ({"write_scale": torch.rand(2, 5, 4), "beta": torch.rand(2, 5, 4)}, "has its part there"),
        ({"write_scale": torch.rand(2, 5)}, r"write_scale: expected \(B, T, H\) = \(2, 5, 4\)"),
        ({"erase_key": torch.randn(2, 5, 4, 8)}, "erase_query: expected a tensor beside erase_key"),
        ({"erase_query": torch.randn(2, 5, 4, 8)}, "erase_key: expected a tensor beside erase_q"),
        (
            {"erase_key": torch.randn(2, 5, 4, 8), "beta": torch.rand(2, 5, 4)},
            "erase_key: expected None beside beta",
        ),
        (
            {"erase_key": torch.randn(2, 5, 4), "erase_query": torch.randn(2, 5, 4, 8)},
            r"erase_key: expected \(B, T, H, K\)",
        ),
        ({"initial_state": torch.zeros(2, 4, 8, 7)}, r"initial_state: expected \(B or N"),
        ({"chunk_size": -1}, "at least 16, got -1"),
        ({"chunk_size": 24}, "power of two"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "batch of 1, got B = 2"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "int32 or int64"),
        ({"cu_seqlens": [0, 5]}, "cu_seqlens: expected a tensor, got list"),
        (
            {"q": torch.randn(2, 5, 4, 8, device="meta")},
            "k: expected the device of q, meta, got cpu",
        ),
    ],
)
def test_linear_attention_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**rows(**changes))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 5], "start at 0"),
        ([0, 4], "end at T = 5"),
        ([0, 4, 3, 5], "ascending offsets, got 4 then 3"),
    ],
)
def test_wrong_offsets(backend, offsets, message):
    x = torch.randn(1, 5, 2, 4)
    cu_seqlens = torch.tensor(offsets)
    with pytest.raises(ValueError, match=message):
        linear_attention(x, x, x, cu_seqlens=cu_seqlens, backend=backend)
    with pytest.raises(ValueError, match=message):
        causal_conv1d(x[:, :, 0], torch.randn(4, 3), cu_seqlens=cu_seqlens, backend=backend)
    with pytest.raises(ValueError, match=message):
        selective_scan(*scan(), cu_seqlens=cu_seqlens, backend=backend)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(5, 3)}, r"x: expected \(B, T, D\)"),
        ({"weight": torch.randn(4, 4)}, r"weight: expected \(D, W\) with D = 3"),
        ({"bias": torch.randn(4)}, r"bias: expected \(D,\)"),
        ({"activation": "silo"}, "did you mean 'silu'"),
        ({"initial_state": torch.randn(2, 3, 4)}, "W-1"),
    ],
)
def test_causal_conv1d_names_what_is_wrong(changes, message):
    arguments = {"x": torch.randn(2, 5, 3), "weight": torch.randn(3, 4), **changes}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.randn(5, 3)}, r"u: expected \(B, T, D\)"),
        ({"A": torch.randn(4, 2)}, r"A: expected \(D, N\) with D = 3"),
        ({"delta": torch.randn(1, 5, 4)}, "delta: expected"),
        ({"C": torch.randn(1, 5, 3)}, "C: expected"),
    ],
)
def test_selective_scan_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(*scan(**changes))


@pytest.mark.parametrize("grad", [False, True])
def test_inputs_of_a_form_that_was_right_are_not_checked_again(grad, monkeypatch):
    """And those of any other form are, wherever they differ."""
    seen = []
    check = backends.choose
    monkeypatch.setattr(backends, "_KNOWN", {})
    monkeypatch.setattr(backends, "choose", lambda *args: seen.append(1) or check(*args))
    with torch.set_grad_enabled(grad):
        beta = torch.rand(2, 5, 4)
        for _ in range(3):
            linear_attention(**rows(), beta=beta)
        assert len(seen) == 1
        for wrong in (beta[:, :4], beta.long(), beta.to("meta"), beta.tolist(), [[]]):
            with pytest.raises(ValueError, match="beta"):
                linear_attention(**rows(), beta=wrong)
        for size in (24, "16", [16]):
            with pytest.raises((ValueError, TypeError)):
                linear_attention(**rows(), beta=beta, chunk_size=size)
        assert len(seen) == 1
        linear_attention(**rows(), beta=beta.double())
        linear_attention(**rows(), beta=beta, chunk_size=16)
        linear_attention(**rows(), log_decay=-beta)
        linear_attention(**rows(), beta=beta.requires_grad_())
        assert len(seen) == (5 if grad else 4)


def test_an_activation_that_cannot_be_hashed_is_named():
    with pytest.raises(ValueError, match=r"activation: expected None or 'silu', got \['silu'\]"):
        causal_conv1d(torch.randn(2, 5, 3), torch.randn(3, 4), activation=["silu"])


def test_int32_offsets_do_too():
    x = torch.randn(1, 5, 2, 4)
    long = linear_attention(x, x, x, cu_seqlens=torch.tensor([0, 2, 5]))[0]
    short = linear_attention(x, x, x, cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32))[0]
    assert torch.equal(long, short)


@pytest.mark.parametrize("module", ["triton", "adapters"])
def test_backends_without_erase_keys_name_them(module):
    """So that ``backend=None`` passes them over; neither runs without a GPU."""
    q, a = torch.randn(2, 1, 5, 2, 8)
    given = arguments.LinearAttention(q, q, q, erase_key=a, erase_query=a)
    unsupported = importlib.import_module(f"hybrid_kernels.{module}").unsupported
    assert "erase_key" in unsupported(given)
    assert unsupported(given.replace(erase_key=None, erase_query=None)) is None
