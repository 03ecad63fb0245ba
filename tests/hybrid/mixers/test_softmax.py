"""Softmax attention's options, each written out again token by token, and against transformers."""

import math

import pytest
import torch
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

import hybrid
from hybrid.mixers.attention import alibi_slopes, capped_attention
from hybrid.modeling.backends import use_backends_of

D, H, KV, K, TIME = 24, 4, 2, 6, 9


def build(layers=1, layer_idx=0, layout=None, **options):
    config = hybrid.HybridConfig(
        layout=layout or "Q" * layers,
        hidden_size=D,
        mixers={
            "Q": {
                "type": "softmax_attention", "num_heads": H, "num_kv_heads": KV, "head_dim": K,
                "rope_parameters": None, **options,
            }
        },
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    mixer = config.stack[layer_idx].mixers[0].build(layer_idx)
    use_backends_of(config, mixer)
    mixer = mixer.double().eval()
    mixer.init_parameters(0.02)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator).double())
    return mixer


def attended(mixer, x, logit, sink=None, gate=None):
    """Softmax attention of one row by its definition; `logit(z, h, t, s)` changes one logit."""
    w = {name: p.detach() for name, p in mixer.named_parameters()}
    rows = []
    for t in range(len(x)):
        q = (w["q_proj.weight"] @ x[t]).view(H, K)
        heads = []
        for h in range(H):
            group = h // (H // KV)
            exps, total = [], math.exp(sink[h]) if sink is not None else 0.0
            for s in range(t + 1):
                k = (w["k_proj.weight"] @ x[s]).view(KV, K)[group]
                exps.append(math.exp(logit(float(q[h] @ k) / math.sqrt(K), h, t, s)))
            total += sum(exps)
            values = [(w["v_proj.weight"] @ x[s]).view(KV, K)[group] for s in range(t + 1)]
            heads.append(sum(e / total * v for e, v in zip(exps, values, strict=True)))
        o = torch.cat(heads)
        if gate is not None:
            o = o / (1 + torch.exp(-(w["gate_proj.weight"] @ x[t])))
        rows.append(w["o_proj.weight"] @ o)
    return torch.stack(rows)


def plain(z, h, t, s):
    return z


CASES = {
    "plain": ({}, lambda mixer: (plain, {})),
    "output_gate": ({"output_gate": True}, lambda mixer: (plain, {"gate": True})),
    "sinks": ({"sinks": True}, lambda mixer: (plain, {"sink": mixer.sinks.tolist()})),
    "soft_cap": (
        {"soft_cap": 0.7},
        lambda mixer: (lambda z, h, t, s: 0.7 * math.tanh(z / 0.7), {}),
    ),
    "alibi": (
        {"alibi": True},
        lambda mixer: (lambda z, h, t, s: z - 2.0 ** (-2 * (h + 1)) * (t - s), {}),
    ),
    "scale": (
        {"scale": 0.9, "sinks": True, "soft_cap": 2.0},
        lambda mixer: (
            lambda z, h, t, s: 2 * math.tanh(0.9 * math.sqrt(K) * z / 2),
            {"sink": mixer.sinks.tolist()},
        ),
    ),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_equals_its_definition(case, implementation):
    options, definition = CASES[case]
    mixer = build(**options)
    mixer.config._attn_implementation = implementation
    x = torch.randn(TIME, D, dtype=torch.float64)
    logit, extra = definition(mixer)
    mask = torch.zeros(1, 1, TIME, TIME, dtype=torch.float64)
    mask.masked_fill_(torch.ones(TIME, TIME).triu(1).bool(), -1e300)
    with torch.no_grad():
        found = mixer(x[None], attention_mask=mask if implementation == "eager" else None)[0][0]
    # transformers' own eager function takes its softmax in float32
    single = implementation == "eager" and not (options.keys() & {"sinks", "soft_cap"})
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if single else {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(found, attended(mixer, x, logit, **extra), **tolerance)


@pytest.mark.parametrize("name", ["sliding_window_attention", "chunked_attention"])
@pytest.mark.parametrize("case", CASES)
def test_a_window_or_chunk_of_the_whole_text_equals_the_same_definition(case, name):
    options, definition = CASES[case]
    size = {"window": TIME} if name == "sliding_window_attention" else {"chunk_size": TIME}
    mixer = build(type=name, **size, **options)
    x = torch.randn(TIME, D, dtype=torch.float64)
    logit, extra = definition(mixer)
    with torch.no_grad():
        found = mixer(x[None])[0][0]
    expected = attended(mixer, x, logit, **extra)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def qkv(batch=2, time=11):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, n, time, 8, generator=generator) for n in (H, KV, KV)]


@pytest.mark.parametrize("padded", [False, True])
def test_sinks_as_gpt_oss_and_caps_as_gemma2(padded):
    q, k, v = qkv()
    mask = torch.zeros(2, 1, 11, 11).masked_fill_(torch.ones(11, 11).triu(1).bool(), -1e30)
    if padded:
        mask[1, :, :, :3] = -1e30
    module = torch.nn.Module().eval()
    module.num_key_value_groups, module.sinks = H // KV, torch.randn(H)
    theirs = modeling_gpt_oss.eager_attention_forward(module, q, k, v, mask, scaling=0.3)
    ours = capped_attention(q, k, v, mask, scaling=0.3, sinks=module.sinks)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    theirs = modeling_gemma2.eager_attention_forward(
        module, q, k, v, mask, scaling=0.3, softcap=0.5
    )
    ours = capped_attention(q, k, v, mask, scaling=0.3, soft_cap=0.5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_mask_is_causal_from_the_first_key_and_one_query_sees_all_keys():
    """As transformers': a static cache hands over more keys than queries, and the rest are empty."""
    q, k, v = qkv()
    whole, _ = capped_attention(q, k, v, None, scaling=0.3, soft_cap=1.0)
    head, _ = capped_attention(q[:, :, :4], k, v, None, scaling=0.3, soft_cap=1.0)
    torch.testing.assert_close(head, whole[:, :4], rtol=0, atol=1e-6)
    last, _ = capped_attention(q[:, :, -1:], k, v, None, scaling=0.3, soft_cap=1.0)
    torch.testing.assert_close(last, whole[:, -1:], rtol=0, atol=1e-6)


def test_dropout_acts_in_training_only():
    mixer = build(soft_cap=1.0, dropout=0.5)
    x = torch.randn(1, TIME, D, dtype=torch.float64)
    assert torch.equal(mixer(x)[0], mixer(x)[0])
    mixer.train()
    assert not torch.equal(mixer(x)[0], mixer(x)[0])


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [2**-8]),
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (8, [2**-i for i in range(1, 9)]),
        (3, [2**-4, 2**-8, 2**-2]),
    ],
)
def test_alibi_slopes_as_published(heads, slopes):
    assert alibi_slopes(heads) == slopes


def test_alibi_in_bfloat16_still_tells_neighbours_apart_far_out():
    """Positions 40000 and 40001 differ by one slope, though bfloat16 has 8 bits."""
    from hybrid.mixers.attention import add_positions

    q, k = torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 4).bfloat16()
    places = torch.tensor([[40000, 40001]])
    q, k = add_positions(q, k, places, torch.tensor([0.5]), 1.0)
    logits = (q.float() @ k.float().mT)[0, 0]
    assert (logits[:, 1] - logits[:, 0]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [("QQQQQQ", [1, 1, 0, 1, 1, 0]), ("LQLQLQ", [None, 1, None, 1, None, 0])],
)
def test_nope_every_counts_softmax_layers(layout, expected):
    rope = {"rope_type": "default", "rope_theta": 1e4}
    for layer_idx, has in enumerate(expected):
        if has is not None:
            mixer = build(layout=layout, layer_idx=layer_idx, nope_every=3, rope_parameters=rope)
            assert mixer.has_positions == bool(has)


def test_layers_without_positions_do_not_see_them():
    rope = {"rope_type": "default", "rope_theta": 1e4}
    x = torch.randn(1, TIME, D, dtype=torch.float64)
    angle = torch.randn(1, TIME, K, dtype=torch.float64)
    for layer_idx, sees in ((0, True), (1, False)):
        mixer = build(layers=2, layer_idx=layer_idx, nope_every=2, rope_parameters=rope)
        with_positions = mixer(x, position_embeddings=(angle.cos(), angle.sin()))[0]
        assert torch.equal(with_positions, mixer(x)[0]) != sees


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"alibi": True, "rope_parameters": {"rope_theta": 1e4}},
            "alibi: expected rope_parameters null, as ALiBi replaces rotary positions",
        ),
        ({"alibi": True, "sinks": True}, "alibi: expected neither sinks nor soft_cap"),
        ({"soft_cap": 0.0}, "soft_cap: expected above 0, got 0.0"),
        ({"nope_every": 0}, "nope_every: expected at least 1, got 0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_an_attention_function_without_sinks_is_refused():
    mixer = build(sinks=True)
    mixer.config._attn_implementation = "flash_attention_2"
    message = (
        r"expected a function that supports sinks.* got 'flash_attention_2'; try eager, sdpa, flex"
    )
    with pytest.raises(ValueError, match=message):
        mixer(torch.randn(1, 3, D, dtype=torch.float64))
