"""Options of the mixers: mistakes are named with the way out; initial values; the table of docs."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import hybrid
from hybrid.config.registry import mixers
from hybrid.mixers import table
from hybrid.mixers.base import Mixer
from hybrid.train.optim import decaying

MISTAKES = [
    ("mamba2", {"num_groups": 3}, "num_groups: expected a divisor of num_heads 2, got 3"),
    ("mamba2", {"state_size": 512}, "state_size: expected at most 256, got 512"),
    (
        "mamba2",
        {"norm_groups": 5},
        r"norm_groups: .* divisor of num_heads \* head_dim 128, got 5",
    ),
    ("mamba2", {"output_norm": "gate"}, "output_norm: .* got 'gate'; try 'gated'"),
    ("mamba2", {"dt_min": 1.0}, "dt_min: expected at most dt_max 0.1, got 1.0"),
    ("mamba2", {"dt_limit": [0.1]}, r"dt_limit: expected \[low, high\].*got \[0.1\]"),
    ("mamba2", {"conv_size": 1}, "conv_size: expected at least 2"),
    ("mamba", {"state_size": 0}, "state_size: expected at least 1, got 0"),
    (
        "gated_delta_net",
        {"num_heads": 4, "num_key_heads": 3},
        "num_key_heads: expected a divisor of num_heads 4, got 3",
    ),
    (
        "gated_delta_net",
        {"num_heads": 5},
        "num_heads: .* divisor of hidden_size 64, got 5; try 4 or 8",
    ),
    ("gated_delta_product", {"num_householder": 0}, "num_householder: expected at least 1, got 0"),
    (
        "forgetting_attention",
        {"sinks": True},
        "sinks: expected none in forgetting_attention, .* try softmax_attention",
    ),
    ("mamba3", {"num_heads": 3, "num_groups": 2}, "num_groups: expected a divisor of num_heads 3"),
    ("mamba3", {"state_size": 2}, "state_size: expected at least one pair .* got 2; try 4"),
    ("comba", {"output_feedback": "x"}, "output_feedback: expected"),
    ("rwkv7", {"decay_rank": 0}, "decay_rank: expected at least 1, got 0"),
    ("gated_slot_attention", {"num_slots": 300}, "num_slots: expected at most 256, got 300"),
    ("kimi_delta_attention", {"lower_bound": 1.0}, "lower_bound: expected below 0, got 1.0"),
    ("kimi_delta_attention", {"gate_rank": -1}, "gate_rank: expected at least 0, got -1"),
    ("gated_linear_attention", {"tau": 0.0}, "tau: expected above 0, got 0.0"),
    ("gated_linear_attention", {"head_dim": 300}, "head_dim: expected at most 256, got 300"),
    (
        "gated_linear_attention",
        {"value_head_dim": 514},
        "value_head_dim: expected a multiple of 3 above 256, got 514",
    ),
    ("gated_linear_attention", {"min_log_decay": 0.0}, "min_log_decay: expected below 0, got 0.0"),
    ("hgrn2", {"scale": 0.0}, "scale: expected above 0, got 0.0"),
    ("retention", {"head_dim": 5}, "head_dim: expected an even number, to be rotated, got 5"),
    ("gateloop", {"head_dim": 200}, "head_dim, twice: expected at most 256, got 400"),
    (
        "lightning_attention",
        {"head_dim": 6, "rope_theta": 10.0, "rotary_share": 0.5},
        "rotary_share: expected an even number of rotated dims, got 3 of head_dim 6",
    ),
    (
        "lightning_attention",
        {"num_heads": 2, "head_dim": 8, "output_norm_groups": 3},
        "output_norm_groups: expected a divisor of num_heads \\* value_head_dim 16, got 3",
    ),
    ("mlstm", {"normalizer_eps": -1.0}, "normalizer_eps: expected at least 0, got -1.0"),
    ("rwkv6", {"shift_rank": 0}, "shift_rank: expected at least 1, got 0"),
    ("rg_lru", {"num_heads": 5}, "num_heads: expected a divisor of width 64, got 5"),
    ("rg_lru", {"width": 512, "num_heads": 1}, "width / num_heads: expected at most 256, got 512"),
    ("sliding_window_attention", {"window": 1}, "window: expected at least 2, got 1"),
    (
        "sliding_window_attention",
        {"num_heads": 4, "num_kv_heads": 3},
        "num_kv_heads: expected a divisor of num_heads 4, got 3",
    ),
    (
        "sliding_window_attention",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_parameters.rope_type: expected max_position_embeddings to be set for 'dynamic'",
    ),
    (
        "multi_head_latent_attention",
        {"rope_dim": 3},
        "rope_parameters.partial_rotary_factor: expected an even number of rotated dims",
    ),
    ("multi_head_latent_attention", {"latent_dim": 0}, "latent_dim: expected at least 1"),
    ("gated_short_convolution", {"conv_size": 0}, "conv_size: expected at least 2"),
]


def config(name, hidden_size=64, layers=1, **options):
    return hybrid.HybridConfig(
        layout="Q" * layers, hidden_size=hidden_size, mixers={"Q": {"type": name, **options}}
    )


def built(name, layer_idx=0, **kwargs):
    mixer = config(name, **kwargs).stack[layer_idx].mixers[0].build(layer_idx)
    mixer.init_parameters(0.02)
    return mixer


@pytest.mark.parametrize(("name", "options", "message"), MISTAKES)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(ValueError, match=rf"mixers\.Q\.{message}"):
        config(name, **options)


@pytest.mark.parametrize("name", mixers.names())
@pytest.mark.parametrize("hidden_size", [64, 768, 2048])
def test_defaults_fit_every_usual_width(name, hidden_size):
    spec = config(name, hidden_size).stack.mixers["Q"]
    assert spec.options.problems(spec.sizes) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (16, 64, 128)),
        ({"num_heads": 32}, (32, 32, 64)),
        ({"head_dim": 32}, (32, 32, 64)),
        ({"value_head_dim": 32}, (64, 16, 32)),
        ({"num_heads": 3, "head_dim": 10}, (3, 10, 20)),
        ({"num_heads": 3, "head_dim": 10, "value_head_dim": 7}, (3, 10, 7)),
    ],
)
def test_head_sizes_follow_from_those_given(options, expected):
    """mlstm: V = 2 K, and a head of 128 channels of D."""
    options = config("mlstm", 2048, **options).stack.mixers["Q"].options
    assert options.sizes == expected


@pytest.mark.parametrize(
    "name", ["mamba2", "gated_delta_net", "gated_delta_product", "kimi_delta_attention"]
)
def test_time_steps_and_rates_start_as_published(name):
    mixer = built(name, hidden_size=2048)
    dt = F.softplus(mixer.dt_bias)
    assert dt.min() >= 1e-3 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    low, high = mixer.A_log.exp().aminmax()
    assert low >= (0.01 if name.startswith("gated_delta") else 1.0) * (1 - 1e-5)
    assert high <= 16.0 * (1 + 1e-5)


def test_mlstm_gates_start_as_published():
    mixer = built("mlstm", hidden_size=512)
    assert mixer.input_gate_proj.bias.tolist() == [-10.0] * 4
    assert mixer.forget_gate_proj.bias.tolist() == [3.0, 4.0, 5.0, 6.0]
    assert not mixer.input_gate_proj.weight.any()
    assert not mixer.forget_gate_proj.weight.any()


def test_rg_lru_decays_start_as_published():
    """a = exp(-softplus(Lambda)) has its square uniform in [0.9^2, 0.999^2]."""
    a = torch.exp(-F.softplus(built("rg_lru", hidden_size=2048).decay_rate))
    assert a.min() >= 0.9 - 1e-5
    assert a.max() <= 0.999 + 1e-5
    assert abs(a.square().mean() - (0.9**2 + 0.999**2) / 2) < 5 * 0.19 / 12**0.5 / 2048**0.5


def test_hgrn2_lower_bounds_rise_with_depth():
    found = [
        torch.sigmoid(built("hgrn2", layer_idx=i, layers=4).lower_bound_logit).unique().item()
        for i in range(4)
    ]
    assert found == pytest.approx([0.01, 0.25, 0.5, 0.75])


@pytest.mark.parametrize("layer_idx", [0, 2])
def test_rwkv6_starts_as_published(layer_idx):
    """Channel by channel, as the published training code writes it."""
    layers, size = 4, 64
    mixer = built("rwkv6", layer_idx=layer_idx, layers=layers, hidden_size=size)
    depth, rest = layer_idx / (layers - 1), 1 - layer_idx / layers
    for i in (0, 1, 17, 63):
        share = i / size
        slow, mid = 1 - share ** (0.5 * rest), 1 - share**rest
        shifts = [slow, mid, mid - 0.3 * depth, mid, slow]  # r, k, v, w, g
        assert mixer.shift[:, i].tolist() == pytest.approx(shifts, abs=1e-6)
        decay = -6 + 5 * (i / (size - 1)) ** (0.7 + 1.3 * depth)
        assert mixer.decay_base[i].item() == pytest.approx(decay, abs=1e-5)
        bonus = depth * (1 - i / (size - 1)) + 0.1 * ((i + 1) % 3 - 1)
        assert mixer.bonus.flatten()[i].item() == pytest.approx(bonus, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("mamba2", "A_log"), ("mamba2", "dt_bias"), ("mamba2", "D"), ("mamba", "A_log"),
        ("rwkv6", "bonus"), ("rwkv6", "decay_base"), ("rwkv6", "shift"),
        ("hgrn2", "lower_bound_logit"), ("rg_lru", "decay_rate"), ("gated_delta_net", "A_log"),
        ("kimi_delta_attention", "dt_bias"),
    ],
)  # fmt: skip
def test_gate_parameters_do_not_decay(name, parameter):
    mixer = built(name)
    assert parameter in dict(mixer.named_parameters())
    assert parameter not in decaying(mixer)
    assert any(n.endswith("o_proj.weight") for n in decaying(mixer))


def test_a_long_stabiliser_neither_drifts_nor_overflows():
    """4096 steps of gates that push the exponential input gate up and shut the memory in turn."""
    from hybrid.mixers.mlstm import stabiliser

    time = 4096
    log_f = torch.where(torch.arange(time) % 97 == 0, -60.0, -1e-3)[None, :, None]
    log_i = (40 * torch.sin(torch.arange(time) / 50.0))[None, :, None]
    m, before, last = stabiliser(log_f, log_i, None, None)
    expected, at = [], torch.zeros((), dtype=torch.float64)
    for t in range(time):
        at = torch.maximum(log_f[0, t, 0].double() + at, log_i[0, t, 0].double())
        expected.append(at)
    torch.testing.assert_close(m[0, :, 0].double(), torch.stack(expected), rtol=1e-5, atol=1e-3)
    assert torch.equal(before[0, 1:], m[0, :-1])
    assert torch.equal(last, m[:, -1])
    assert (log_f + before - m).max() <= 1e-4
    assert (log_i - m).max() <= 0


def test_every_mixer_says_what_it_is():
    for name in mixers.names():
        cls = mixers.get(name)
        assert cls.paper, name
        assert cls.formula, name
        assert cls.used_by, name
        assert 1 <= len(cls.samples()) <= 4, name
        assert issubclass(cls, Mixer)


def test_the_table_in_the_docs_is_the_registry():
    page = Path(__file__).parents[3] / "docs" / "mixers.md"
    again = "python -m hybrid.mixers.table > docs/mixers.md"
    assert page.read_text() == table.markdown(), f"make it again: {again}"
