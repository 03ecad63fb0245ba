"""Models for the tests, built from the registry."""

import pytest
import torch

import hybrid
from hybrid.registry import mixers

D, VOCAB = 32, 61


def mixer_cases():
    """(mixer name, options) for every sample of every registered mixer of this package."""
    return [
        pytest.param(name, options, id=f"{name}-{i}")
        for name in mixers.names()
        for i, options in enumerate(mixers.get(name).samples())
    ]


def pytest_generate_tests(metafunc):
    if {"mixer_name", "mixer_options"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("mixer_name", "mixer_options"), mixer_cases())


@pytest.fixture
def build():
    """Build a small random model; weights larger than usual, so that mistakes are not hidden."""

    def build_model(dtype=torch.float64, seed=0, **config):
        torch.manual_seed(seed)
        config = {"hidden_size": D, "vocab_size": VOCAB, "initializer_range": 0.3, **config}
        model = hybrid.HybridForCausalLM(hybrid.HybridConfig(**config))
        return model.to(dtype).eval()

    return build_model


@pytest.fixture
def stack(build, mixer_name, mixer_options):
    """Two layers of one mixer, Q, with small feed-forwards, in float64."""
    return build(
        layout="QQ",
        mixers={"Q": {"type": mixer_name, **mixer_options}},
        feed_forwards={"-": {"intermediate_size": 24}},
    )


@pytest.fixture
def ids():
    """Random token ids (rows, T)."""

    def make(rows, time, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, VOCAB, (rows, time), generator=generator)

    return make
