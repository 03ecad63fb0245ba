"""Document boundaries are read once for all layers, and read again when they change."""

import pytest
import torch

from hybrid_kernels import causal_conv1d, linear_attention, packing, selective_scan
from hybrid_kernels.chunked import chunk_plan
from hybrid_kernels.testing import FORMS, sample, sample_scan

LENGTHS = [30, 0, 25, 15]


@pytest.fixture
def counts(monkeypatch):
    """Count how often offsets are read, and how often a plan is made."""
    found = {"read": 0, "planned": 0}
    lengths, pack = packing._lengths, chunk_plan.ChunkPlan._pack

    def read(*args):
        found["read"] += 1
        return lengths(*args)

    def planned(*args):
        found["planned"] += 1
        return pack(*args)

    monkeypatch.setattr(packing, "_lengths", read)
    monkeypatch.setattr(chunk_plan.ChunkPlan, "_pack", planned)
    return found


def layer(cu_seqlens, backend="torch"):
    """Run all three ops on documents, forward and backward, and return the outputs."""
    inputs = sample(FORMS[0], lengths=LENGTHS)
    inputs["q"].requires_grad_()
    scan = sample_scan(lengths=LENGTHS)
    scan["u"].requires_grad_()
    x = scan["u"].detach().clone().requires_grad_()
    outputs = [
        linear_attention(**{**inputs, "cu_seqlens": cu_seqlens}, backend=backend)[0],
        selective_scan(**{**scan, "cu_seqlens": cu_seqlens}, backend=backend)[0],
        causal_conv1d(x, torch.ones(6, 4), cu_seqlens=cu_seqlens, backend=backend)[0],
    ]
    sum(o.square().sum() for o in outputs).backward()
    return [*outputs, inputs["q"].grad, scan["u"].grad, x.grad]


def offsets(lengths=LENGTHS):
    return torch.tensor([0, *lengths]).cumsum(0)


def test_read_and_planned_once_for_many_layers(counts):
    cu_seqlens = offsets()
    first = layer(cu_seqlens)
    assert counts["read"] == 1
    planned = counts["planned"]
    for _ in range(3):
        for got, expected in zip(layer(cu_seqlens), first, strict=True):
            assert torch.equal(got, expected)
    assert counts == {"read": 1, "planned": planned}
    for got, expected in zip(layer(offsets()), first, strict=True):
        assert torch.equal(got, expected)
    assert counts == {"read": 2, "planned": 2 * planned}


def test_offsets_that_are_written_to_are_read_again():
    cu_seqlens = offsets()
    layer(cu_seqlens)
    other = [10, 20, 30, 10]
    cu_seqlens.copy_(offsets(other))
    for got, expected in zip(layer(cu_seqlens), layer(offsets(other)), strict=True):
        assert torch.equal(got, expected)
    cu_seqlens[-1] += 1
    with pytest.raises(ValueError, match="end at T = 70, got 0 and 71"):
        layer(cu_seqlens)


def test_other_lengths_of_time_are_refused_although_known():
    cu_seqlens = offsets()
    layer(cu_seqlens)
    q = torch.randn(1, 71, 2, 8)
    with pytest.raises(ValueError, match="end at T = 71, got 0 and 70"):
        linear_attention(q, q, q, cu_seqlens=cu_seqlens)


def test_inference_then_training():
    cu_seqlens = offsets()
    inputs = sample(FORMS[0], lengths=LENGTHS)
    inputs["cu_seqlens"] = cu_seqlens
    with torch.inference_mode():
        linear_attention(**inputs)
        causal_conv1d(torch.ones(1, 70, 6), torch.ones(6, 4), cu_seqlens=cu_seqlens)
    for got, expected in zip(layer(cu_seqlens), layer(cu_seqlens, "reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        within = offsets()
        first, _ = linear_attention(**{**inputs, "cu_seqlens": within})
        within.copy_(offsets([10, 20, 30, 10]))
        second, _ = linear_attention(**{**inputs, "cu_seqlens": within})
        assert not torch.equal(first, second)


def test_what_is_known_of_offsets_goes_with_them():
    cu_seqlens = offsets()
    packing.documents(cu_seqlens, 70)
    before = len(packing._KNOWN)
    del cu_seqlens
    assert len(packing._KNOWN) == before - 1
