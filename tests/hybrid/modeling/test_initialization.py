"""What a checkpoint lacks has the initial value that a new model has, whatever module it is in."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import hybrid
from hybrid.config.registry import feed_forwards, mixers, register_mixer
from hybrid.mixers.base import MixerOptions, StateMixer

SMALL = {"hidden_size": 32, "vocab_size": 61, "initializer_range": 0.2}


@pytest.fixture(autouse=True)
def raw_memory_is_nan(monkeypatch):
    """Fill the memory that transformers makes for missing tensors with NaN."""
    empty_like = torch.empty_like

    def filled(*args, **kwargs):
        y = empty_like(*args, **kwargs)
        return y.fill_(float("nan")) if y.is_floating_point() and not y.is_meta else y

    monkeypatch.setattr(torch, "empty_like", filled)


def load(config, state):
    return hybrid.HybridForCausalLM.from_pretrained(None, config=config, state_dict=dict(state))


def check_each_missing(config):
    """Leave out every tensor of the first layer in turn."""
    torch.manual_seed(0)
    models = [hybrid.HybridForCausalLM(config) for _ in range(2)]
    fresh = [model.state_dict() for model in models]
    state = {k: v + 0.1 if v.is_floating_point() else v for k, v in fresh[0].items()}
    names = [k for k in state if k.startswith("model.layers.0.")]
    assert names
    for name in names:
        # with what is tied to it, which would be loaded in its place
        missing = {k for k, v in fresh[0].items() if v.data_ptr() == fresh[0][name].data_ptr()}
        got = load(config, {k: v for k, v in state.items() if k not in missing}).state_dict()
        for other in state:
            if other not in missing:
                assert torch.equal(got[other], state[other]), (name, other)
        assert got[name].isfinite().all(), name
        if torch.equal(fresh[0][name], fresh[1][name]):
            assert torch.equal(got[name], fresh[0][name]), name
        else:
            bound = max(f[name].abs().max() for f in fresh)
            assert got[name].abs().max() <= 4 * bound, name
            if got[name].numel() > 1:
                assert got[name].std() > 0, name


def test_each_tensor_of_a_mixer(mixer_name, mixer_options):
    mixer = {"Q": {"type": mixer_name, **mixer_options}}
    dense = {"-": {"intermediate_size": 24}}
    check_each_missing(hybrid.HybridConfig(layout="QQ", mixers=mixer, feed_forwards=dense, **SMALL))


@pytest.mark.parametrize("name", feed_forwards.names())
def test_each_tensor_of_a_feed_forward(name):
    symbol = feed_forwards.get(name).symbol
    check_each_missing(hybrid.HybridConfig(layout="S", ffn=symbol, **SMALL))


@dataclass(frozen=True)
class BareOptions(MixerOptions):
    buffer: bool = False


@pytest.fixture
def bare(monkeypatch):
    """A mixer of a user's own that leaves its initialisation to its constructor."""

    class Bare(StateMixer):
        Options: ClassVar = BareOptions

        def __init__(self, options, config, layer_idx):
            super().__init__(options, config, layer_idx)
            self.matrix = nn.Parameter(torch.randn(config.hidden_size, config.hidden_size))
            self.bias = nn.Parameter(torch.ones(config.hidden_size))
            if options.buffer:
                self.ramp = nn.Buffer(torch.ones(config.hidden_size), persistent=False)

        def mix(self, x, cu_seqlens, cache):
            return x @ self.matrix + self.bias

    monkeypatch.setattr(mixers, "_by_name", dict(mixers._by_name))
    register_mixer("bare_of_a_user")(Bare)


@pytest.mark.usefixtures("bare")
def test_a_mixer_without_init_parameters():
    config = hybrid.HybridConfig(layout="Q", mixers={"Q": {"type": "bare_of_a_user"}}, **SMALL)
    model = hybrid.HybridForCausalLM(config)
    state = model.state_dict()
    matrix, bias = (f"model.layers.0.mixer.{name}" for name in ("matrix", "bias"))
    # a new model keeps what the constructor has set
    assert state[bias].eq(1).all()
    got = load(config, {k: v for k, v in state.items() if k not in (matrix, bias)}).state_dict()
    assert got[bias].eq(0).all()
    assert 0.15 < got[matrix].std() < 0.25

    options = {"type": "bare_of_a_user", "buffer": True}
    config = hybrid.HybridConfig(layout="Q", mixers={"Q": options}, **SMALL)
    with pytest.raises(ValueError, match=r"Bare\.ramp: expected .* init_parameters"):
        load(config, hybrid.HybridForCausalLM(config).state_dict())


# Projections into the residual stream, of every kind of module that has one.
OUTPUTS = (".o_proj", ".down_proj", ".latent_out", ".projection", ".depth_projection", "c.v_proj")
STACK = {
    "layout": "[LS]SZcE-",
    "hidden_size": 256,
    "vocab_size": 61,
    "initializer_range": 0.05,
    "parallel_combine": "concat",
    "mixers": {
        "Z": {"type": "softmax_attention", "num_heads": 4},
        "c": {"type": "rwkv_channel_mix"},
    },
    "feed_forwards": {"E": {"latent_size": 128, "num_shared_experts": 1}},
    "shared": {"Z": {"depth_projection": True}},
}


@pytest.mark.parametrize("kind", ["fixed", "depth_scaled", "xavier", "deepnorm"])
def test_the_rule_of_each_projection(kind):
    torch.manual_seed(0)
    position = {"norm_position": "post"} if kind == "deepnorm" else {}
    model = hybrid.HybridForCausalLM(hybrid.HybridConfig(init=kind, **position, **STACK))
    branches, std, seen = 6, 0.05, set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        place = name.replace("layers.3.mixer", "c")
        output = next((end for end in OUTPUTS if place.endswith(end)), None)
        seen.add(output)
        glorot = (2 / sum(module.weight.shape)) ** 0.5
        value = output or place.endswith(".v_proj") or ".ffn." in name
        want = {
            "fixed": std,
            "depth_scaled": std / branches**0.5 if output else std,
            "xavier": glorot,
            "deepnorm": glorot * (4 * branches) ** -0.25 if value else glorot,
        }[kind]
        error = 5 / (2 * module.weight.numel()) ** 0.5  # five standard errors of a deviation
        assert module.weight.std().item() == pytest.approx(want, rel=error), name
    assert seen >= {*OUTPUTS, None}
