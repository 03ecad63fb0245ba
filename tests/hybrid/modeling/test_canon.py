"""Canon layers against their formula, in every kind of layer, and in generation.

That they keep every invariant of a stack is in test_invariants.py, by cases of conftest.py.
"""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import DynamicCache

import hybrid
from hybrid.mixers import ShortConvolution
from hybrid.plan import plan

MIXERS = {
    "S": {"num_heads": 2, "rope_parameters": None},
    "L": {"num_heads": 2},
    "M": {"num_heads": 4, "head_dim": 8, "state_size": 6, "conv_size": None, "conv_bias": False},
}
EXPERTS = {"num_experts": 4, "top_k": 2, "intermediate_size": 8}
SMALL = {"mixers": MIXERS, "feed_forwards": {"-": {"intermediate_size": 24}, "E": EXPERTS}}


def canon(x, weight):
    """x_t + sum_w a_w x_(t-w), one term after the other; weight (C, W), the last column for x_t."""
    width = weight.shape[1]
    y = x.clone()
    for t in range(x.shape[1]):
        for w in range(width):
            if t >= w:
                y[:, t] = y[:, t] + weight[:, width - 1 - w] * x[:, t - w]
    return y


def attention(mixer, x):
    """Two heads, no positions, canon B on q, k, v."""
    q, k, v = (project(x) for project in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k, v = canon(torch.cat([q, k, v], dim=-1), mixer.conv.weight).chunk(3, dim=-1)
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixer.o_proj(o.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_formula_at_every_position(build, ids, activation):
    dense = {"-": {"intermediate_size": 24, "activation": activation}}
    model = build(layout="S", canon="ABCD", mixers=MIXERS, feed_forwards=dense)
    layer = model.model.layers[0]
    weights = {at: module.weight for at, module in layer.canon.items()}
    x = model.model.embed_tokens(ids(2, 9))
    h = canon(layer.mixer_residual.norm_in(x), weights["A"])
    y = x + attention(layer.mixer, h)
    h, ffn = canon(layer.ffn_residual.norm_in(y), weights["C"]), layer.ffn
    if activation == "swiglu":
        inner = torch.cat([ffn.gate_proj(h), ffn.up_proj(h)], dim=-1)
        gate, up = canon(inner, weights["D"]).chunk(2, dim=-1)
        inner = F.silu(gate) * up
    else:
        inner = F.relu(canon(ffn.up_proj(h), weights["D"])).square()
    y = y + ffn.down_proj(inner)
    assert_close(model.model(ids(2, 9)).last_hidden_state, model.model.norm(y))


def test_an_activation_comes_after_the_residual():
    conv = ShortConvolution(6, 4, activation="silu").double()
    conv.init_parameters(0.02)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    conv.residual = True
    assert_close(conv(x, None, None), F.silu(canon(x, conv.weight)))


def test_by_symbol_and_as_a_list(build):
    model = build(layout="LSM", canon={"S": ["A", "C"], "M": "", "default": "ABD"}, **SMALL)
    linear, softmax, ssm = model.model.layers
    assert [list(layer.canon) for layer in (linear, softmax, ssm)] == [["A", "D"], ["A", "C"], []]
    assert linear.mixer.conv.residual
    assert softmax.mixer.conv is None
    assert model.config.layer_types == ["hybrid_states", "hybrid_keys", "hybrid_states"]


def test_every_convolution_learns(build, ids):
    model = build(layout="[LS]M", canon="ABCD", **SMALL)
    model(ids(2, 9), labels=ids(2, 9)).loss.backward()
    found = [m for m in model.modules() if isinstance(m, ShortConvolution)]
    assert len(found) == 9  # A, C, D twice, and B in each of three mixers
    assert all(m.weight.grad.abs().sum() > 0 for m in found)


@pytest.mark.parametrize("layout", ["S-L-", "[LS]S", "S", "EM-"])
def test_any_layer_decodes(build, ids, layout):
    """Layers of a feed-forward alone have a cache then, and mixers side by side share an input."""
    config = {"canon": {"E": "AC", "default": "ABCD"}}
    model = build(layout=layout, **config, **SMALL)
    x, cache = ids(2, 11), DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [model(piece, past_key_values=cache).logits for piece in x.split([4, 1, 1, 5], 1)]
        assert_close(torch.cat(pieces, dim=1), model(x, use_cache=False).logits)


def greedy(model, prompt, **kwargs):
    mask = torch.ones_like(prompt)
    kwargs = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(prompt, attention_mask=mask, **kwargs)


def test_beams_and_drafts_give_the_tokens_of_the_whole_text(build, ids):
    model = build(layout="SL", canon="ABCD", **SMALL)
    beams = {"num_beams": 3}
    expected = greedy(model, ids(2, 6), use_cache=False, **beams)
    assert torch.equal(greedy(model, ids(2, 6), **beams), expected)
    prompt = ids(1, 4).repeat(1, 3)
    drafted = greedy(model, prompt, prompt_lookup_num_tokens=3)
    assert torch.equal(drafted, greedy(model, prompt, use_cache=False))


def test_cost_is_counted(build, ids):
    model, plain = build(layout="SM", canon="ABCD", **SMALL), build(layout="SM", **SMALL)
    cost, without = (plan(m.config, 8, torch.float64) for m in (model, plain))
    assert cost.parameters == model.num_parameters()
    extra = model.num_parameters() - plain.num_parameters()
    convolutions = [m for m in model.modules() if isinstance(m, ShortConvolution)]
    assert extra == sum(m.weight.numel() for m in convolutions) > 0
    assert cost.flops_per_token - without.flops_per_token == 2 * extra
    cache = model(ids(1, 8), use_cache=True).past_key_values
    slots = [slot for layer in cache.layers for slot in layer.slots.values()]
    held = sum(slot.states["conv"].numel() for slot in slots if "conv" in slot.states) * 8
    recurrent = cost.state_bytes - held  # of Mamba-2, float32
    assert recurrent == 4 * 4 * 8 * 6


def test_saved_and_loaded(build, ids, tmp_path, assert_same_weights, assert_close_to_rounding):
    model = build(layout="SL", canon={"S": "ABCD", "default": ["A"]}, canon_width=3, **SMALL)
    model.save_pretrained(tmp_path)
    again = hybrid.HybridForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    assert_close_to_rounding(again(ids(2, 7)).logits, model(ids(2, 7)).logits)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"canon": "ABX"}, "canon: expected positions of A, B, C, D, got 'X'"),
        ({"canon": ["A", "after"]}, "canon: expected positions of A, B, C, D, got 'after'"),
        ({"canon": {"s": "A"}}, "canon.s: expected the symbol of a mixer or a feed-forward"),
        ({"canon": {"S": 4}}, "canon.S: expected str or list, got int 4"),
        ({"canon": "A", "canon_width": 1}, "canon_width: expected at least 2, got 1"),
        (
            {"layout": "D", "canon": "B"},
            "try mixers.D.conv_size: null, or canon: {D: '', ...} without B",
        ),
        (
            {"layout": "A", "canon": "B"},
            "expected a mixer with a convolution for B, got multi_head_latent_attention of 'A'",
        ),
        ({"layout": "S", "ffn": "E", "canon": "ACD"}, "try canon: {E: AC"),
        (
            {"layout": "[LS]", "canon": {"L": "A"}},
            r"canon A: expected one value for the mixers of \[LS\], which share",
        ),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(hybrid.ConfigError, match=message):
        hybrid.HybridConfig(**{"layout": "SL", **config})
