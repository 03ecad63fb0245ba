"""A run of 2^16 tokens does not drift: every mixer with a state, in one pass and in pieces."""

import pytest
import torch
from transformers import DynamicCache

import hybrid
from hybrid.config.registry import mixers
from hybrid.modeling.cache import CacheSlot

D, TIME, PIECE = 32, 2**16, 4096
BOUNDED = [name for name in mixers.names() if mixers.get(name).layer_type != "full_attention"]


@pytest.mark.parametrize("name", BOUNDED)
def test_a_long_run_does_not_drift(name):
    """One pass in float32 against pieces through a cache in float64: the last as near as the second."""
    torch.manual_seed(0)
    config = hybrid.HybridConfig(
        layout="Q", ffn="", hidden_size=D, vocab_size=1, initializer_range=0.3,
        mixers={"Q": {"type": name, **mixers.get(name).samples()[0]}},
    )  # fmt: skip
    model = hybrid.HybridForCausalLM(config).model
    mixer = model.layers[0].mixer.eval()
    x = torch.randn(1, TIME, D)
    cache = CacheSlot(DynamicCache(config=config), 0)
    with torch.no_grad():
        found = mixer(x, **positions(model, x, 0))[0].split(PIECE, dim=1)
        mixer = mixer.double()
        expected = [
            mixer(piece, cache=cache, **positions(model, piece, number * PIECE))[0]
            for number, piece in enumerate(x.double().split(PIECE, dim=1))
        ]
    errors = [
        float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
        for a, b in zip(found, expected, strict=True)
    ]
    assert errors[1] <= 1e-6  # a few roundings to float32
    # a sum without decay gathers roundings at random: 16 pieces, so up to 4 times those of one
    assert max(errors[1:]) <= 4 * errors[1]
    # mLSTM's stabiliser m falls from 0 to -10 in the first piece, and h is divided by exp(-m), which
    # has the absolute rounding of m as its relative error: a few times 10 eps
    nats = 10 if name == "mlstm" else 1
    assert errors[0] <= 4 * max(errors[1], nats * torch.finfo(torch.float32).eps)


def positions(model, x, start):
    """Keywords of a mixer for x (1, T, D) after `start` tokens."""
    places = torch.arange(start, start + x.shape[1])[None]
    angles = {symbol: rotary(x, places) for symbol, rotary in model.rotary.items()}
    return {"position_ids": places, "position_embeddings": angles.get("Q")}
