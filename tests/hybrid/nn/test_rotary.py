"""Rotation in training: equal to transformers', with derivatives."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hybrid.nn.rotary import apply_rotary, rotate


def angles(time: int, rotated: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (1, T, R) of random angles, the halves alike."""
    half = torch.rand(1, time, rotated // 2, dtype=dtype) * 6
    whole = torch.cat([half, half], dim=-1)
    return whole.cos(), whole.sin()


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """By the definition, whatever the halves."""
    half = cos.shape[-1] // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat(
        [
            a * cos[..., :half] - b * sin[..., :half],
            b * cos[..., half:] + a * sin[..., half:],
            rest,
        ],
        dim=-1,
    )


@pytest.mark.parametrize("training", [True, False])
def test_whole_heads_are_rotated_as_transformers_does(training):
    torch.manual_seed(0)
    q, k = torch.randn(2, 7, 3, 8).transpose(1, 2), torch.randn(2, 7, 1, 8).transpose(1, 2)
    cos, sin = angles(7, 8, torch.float32)
    wanted = apply_rotary_pos_emb(q, k, cos, sin)
    found = apply_rotary(q.requires_grad_(training), k.requires_grad_(training), cos, sin)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rotated", [2, 4, 6])
def test_derivatives_of_a_rotated_share(rotated):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 2, 6, dtype=torch.float64).transpose(1, 2).requires_grad_()
    # halves that differ: the gradient has to change them over
    cos, sin = torch.randn(2, 1, 3, rotated, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, cos, sin), turned(x, cos, sin))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x)
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, cos, sin), x)


def test_nothing_but_the_angles_is_kept():
    x = torch.randn(1, 2, 3, 8, requires_grad=True)
    cos, sin = angles(3, 4, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        rotate(x, cos, sin)
    assert sum(y.numel() for y in kept) == cos.numel() + sin.numel()


def test_dtypes_are_promoted_as_elsewhere():
    cos, sin = angles(3, 4, torch.float32)
    for training in (True, False):
        x = torch.randn(1, 2, 3, 8, dtype=torch.bfloat16, requires_grad=training)
        y = rotate(x, cos, sin)
        assert y.dtype == torch.float32
        if training:
            y.sum().backward()
            assert x.grad is not None
            assert x.grad.dtype == torch.bfloat16


def test_compiled_without_a_graph_break():
    x = torch.randn(1, 2, 3, 8, requires_grad=True)
    cos, sin = angles(3, 4, torch.float32)
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, cos, sin), rotate(x, cos, sin))
