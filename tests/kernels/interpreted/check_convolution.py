"""causal_conv1d in triton's interpreter against the reference in float64."""

import pytest
import torch

from hybrid_kernels import causal_conv1d
from hybrid_kernels.testing import TOLERANCE, assert_agrees, evaluate


def compare(dtype=torch.float32, activation="silu", lengths=None, time=37, **changes):
    generator = torch.Generator().manual_seed(0)
    batch, channels, width = 2, changes.get("channels", 7), changes.get("width", 4)
    inputs, rows = {}, batch
    if lengths is not None:
        batch, time, rows = 1, sum(lengths), len(lengths)
        inputs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    shapes = {
        "x": (batch, time, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (rows, channels, width - 1),
    }
    for name, shape in shapes.items():
        if name not in changes.get("without", ()):
            inputs[name] = torch.randn(shape, generator=generator).to(dtype)
    run = {"activation": activation}
    expected = evaluate(causal_conv1d, inputs, dtype=torch.float64, backend="reference", **run)
    found = evaluate(causal_conv1d, inputs, backend="triton", **run)
    assert_agrees(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_agrees(dtype, activation):
    compare(dtype, activation)


@pytest.mark.parametrize("lengths", [[5, 0, 1, 40], [0, 33], [2, 2]])
def test_documents_do_not_see_each_other(lengths):
    compare(lengths=lengths)


@pytest.mark.parametrize("time", [0, 1, 2, 32, 33])
def test_any_length(time):
    compare(time=time)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_any_width(width):
    compare(width=width, channels=40)


def test_without_bias_and_state():
    compare(without=("bias", "initial_state"))
    compare(without=("bias", "initial_state"), lengths=[3, 0, 9])


def test_long_filters_are_refused():
    with pytest.raises(ValueError, match="at most 16 taps, got 17"):
        causal_conv1d(torch.zeros(1, 4, 2), torch.zeros(2, 17), backend="triton")
