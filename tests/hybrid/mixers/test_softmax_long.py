"""Dual chunk attention and temperature tuning: what softmax attention has for long texts."""

import math

import pytest
import torch
from torch.testing import assert_close

import hybrid
from hybrid.mixers.dual_chunk import CHUNK_MARKS, mark_chunks, read_chunks
from hybrid.modeling.backends import use_backends_of

D, H, KV, K = 24, 4, 2, 6
THETA = 50.0


@pytest.fixture
def build_mixer():
    """A mixer in float64 with random weights, and its rotary embedding."""

    def make(**options):
        options = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}, **options}
        config = hybrid.HybridConfig(
            layout="Q",
            hidden_size=D,
            mixers={
                "Q": {
                    "type": "softmax_attention", "num_heads": H, "num_kv_heads": KV,
                    "head_dim": K, **options,
                }
            },
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        spec = config.stack[0].mixers[0]
        mixer = spec.build(0)
        use_backends_of(config, mixer)
        mixer = mixer.double().eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator).double())
        rotary = spec.cls.rotary(spec.options, spec.sizes)
        return mixer, None if rotary is None else rotary.eval()

    return make


def text(time):
    return torch.randn(time, D, generator=torch.Generator().manual_seed(2)).double()


def run(mixer, rotary, x):
    positions = torch.arange(len(x))[None]
    angles = None if rotary is None else rotary(x[None], positions)
    with torch.no_grad():
        return mixer(x[None], position_embeddings=angles, position_ids=positions)[0][0]


def by_distances(mixer, x, distance, temperature=lambda t: 1.0):
    """Attention of one row in which token t meets token s at a rotary distance of distance(t, s)."""
    w = {name: p.detach() for name, p in mixer.named_parameters()}
    frequencies = THETA ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
    rows = []
    for t in range(len(x)):
        heads = []
        for h in range(H):
            q = (w["q_proj.weight"] @ x[t]).view(H, K)[h]
            q = torch.complex(*q.split(K // 2))
            weights, values = [], []
            for s in range(t + 1):
                k = (w["k_proj.weight"] @ x[s]).view(KV, K)[h // (H // KV)]
                k = torch.complex(*k.split(K // 2))
                turned = q * k.conj() * torch.exp(1j * distance(t, s) * frequencies)
                weights.append(math.exp(temperature(t) * float(turned.real.sum()) / math.sqrt(K)))
                values.append((w["v_proj.weight"] @ x[s]).view(KV, K)[h // (H // KV)])
            total = sum(weights)
            heads.append(sum(e / total * v for e, v in zip(weights, values, strict=True)))
        rows.append(w["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(rows)


def dual_chunk_distance(t, s, chunk, window):
    """Section 3 of the paper: equations 3, 5 and 4, with c = chunk + window."""
    c = chunk + window
    key = s % chunk
    apart = t // chunk - s // chunk
    if apart == 0:
        return t % chunk - key
    if apart == 1:
        before = [chunk + i for i in range(window)] + [c - 1] * (chunk - window)
        return before[t % chunk] - key
    return (c - 1) - key


# angles are made in float32, whatever the model's dtype
ANGLES = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize(("chunk", "window"), [(7, 3), (5, 5), (4, 1), (8, None)])
def test_dual_chunks_equal_the_papers_distances(build_mixer, chunk, window):
    mixer, rotary = build_mixer(dual_chunk_size=chunk, dual_chunk_window=window)
    x = text(26)
    window = chunk // 3 if window is None else window
    expected = by_distances(mixer, x, lambda t, s: dual_chunk_distance(t, s, chunk, window))
    assert_close(run(mixer, rotary, x), expected, **ANGLES)


def test_dual_chunks_within_one_chunk_are_plain_attention(build_mixer):
    x = text(13)
    plain = run(*build_mixer(), x)
    assert_close(run(*build_mixer(dual_chunk_size=13), x), plain, rtol=1e-12, atol=1e-12)
    assert (run(*build_mixer(dual_chunk_size=5), x) - plain).abs().max() > 1e-4


def test_dual_chunks_are_off_in_training(build_mixer):
    x = text(20)
    mixer, rotary = build_mixer(dual_chunk_size=4)
    plain = run(*build_mixer(), x)
    assert not torch.allclose(run(mixer, rotary, x), plain)
    assert_close(run(mixer.train(), rotary.train(), x), plain, rtol=1e-12, atol=1e-12)


def test_many_queries_at_once_are_those_of_few(build_mixer):
    """More than one block of queries."""
    mixer, rotary = build_mixer(dual_chunk_size=50, dual_chunk_window=20)
    x = text(300)
    expected = run(mixer, rotary, x)[:140]
    assert_close(run(mixer, rotary, x[:140]), expected, rtol=1e-12, atol=1e-12)


def test_chunks_beside_keys_survive_bfloat16():
    chunk = torch.tensor([[0, 255, 256, 40_001]])
    k = torch.randn(1, 2, 4, 3).bfloat16()
    keys, found = read_chunks(mark_chunks(k, chunk))
    assert mark_chunks(k, chunk).shape[-1] == 3 + CHUNK_MARKS
    assert torch.equal(keys, k)
    assert torch.equal(found, chunk)


def test_dual_chunks_need_an_attention_function_that_ours_may_replace(build_mixer):
    mixer, rotary = build_mixer(dual_chunk_size=4)
    mixer.config._attn_implementation = "flex_attention"
    message = r"expected a function that supports dual chunks, got 'flex_attention'; try eager"
    with pytest.raises(ValueError, match=message):
        run(mixer, rotary, text(5))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("positions", [True, False])
def test_temperature_by_its_definition(build_mixer, offset, positions):
    """Logits are 1 + a ln(1 + floor((t + offset) / n)) times what they were."""
    rope = {} if positions else {"rope_parameters": None}
    mixer, rotary = build_mixer(
        temperature=0.8, temperature_length=4, temperature_offset=offset, **rope
    )
    x = text(14)

    def temperature(t):
        return 1 + 0.8 * math.log(1 + math.floor((t + offset) / 4))

    expected = by_distances(mixer, x, lambda t, s: (t - s) if positions else 0, temperature)
    assert_close(run(mixer, rotary, x), expected, **ANGLES)


def test_temperature_with_nope_every_is_for_layers_without_positions():
    config = hybrid.HybridConfig(
        layout="SSS", hidden_size=D,
        mixers={"S": {"num_heads": H, "nope_every": 2, "temperature": 0.1}},
    )  # fmt: skip
    model = hybrid.HybridForCausalLM(config)
    assert [layer.mixer.tuned for layer in model.model.layers] == [False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected above 0, got -1.0"),
        ({"temperature_length": 0}, "temperature_length: expected at least 1"),
        ({"temperature_offset": 2}, "temperature_offset: expected one of 0 or 1, got 2"),
        (
            {"dual_chunk_window": 4},
            "dual_chunk_window: expected null without dual_chunk_size, got 4",
        ),
        ({"dual_chunk_size": 0}, "dual_chunk_size: expected at least 1, got 0"),
        (
            {"dual_chunk_size": 8, "dual_chunk_window": 9},
            "dual_chunk_window: expected at most dual_chunk_size 8, got 9",
        ),
        (
            {"dual_chunk_size": 8, "rope_parameters": None},
            "dual_chunk_size: expected rope_parameters",
        ),
        (
            {
                "dual_chunk_size": 8,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            },
            "dual_chunk_size: expected a rope_type that does not depend .*, got 'dynamic'",
        ),
        ({"qk_norm_type": "rms"}, "qk_norm_type: .* got 'rms'; try 'rmsnorm'"),
    ],
)
def test_mistakes_are_named(build_mixer, options, message):
    with pytest.raises(ValueError, match=rf"mixers\.Q\.{message}"):
        build_mixer(**options)
