"""Models for the tests, built from the registry; and processes for those that want several."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import hybrid
from hybrid.config.registry import mixers
from hybrid.modeling.backends import use_backends_of

D, VOCAB = 32, 61


def mixer_cases():
    """(mixer name, options) for every sample of every registered mixer; all but the first are slow."""
    return [
        pytest.param(name, options, id=f"{name}-{i}", marks=[pytest.mark.slow] * bool(i))
        for name in mixers.names()
        for i, options in enumerate(mixers.get(name).samples())
    ]


BLOCK = {"lora_rank": 3, "concat_embeddings": True, "depth_projection": True, "output": "next"}

# Settings around a mixer under which all that holds for the mixer alone must hold as well.
AROUND = {
    "canon": ("softmax_attention", {"num_heads": 2}, {"canon": "ABCD"}),
    "canon-linear": ("mamba2", {"num_heads": 4, "head_dim": 8, "state_size": 6, "conv_size": None},
                     {"canon": "ABCD", "canon_width": 3}),
    "canon-window": ("sliding_window_attention", {"num_heads": 2, "window": 5}, {"canon": "AC"}),
    "shared": ("softmax_attention", {"num_heads": 2},
               {"layout": "QLQL", "canon": {"L": "", "default": "ACD"}, "shared": {"Q": BLOCK}}),
}  # fmt: skip


def stack_cases():
    """Every sample of every mixer by itself, and some with settings around them."""
    alone = [pytest.param(*case.values, {}, id=case.id, marks=case.marks) for case in mixer_cases()]
    return alone + [pytest.param(*case, id=name) for name, case in AROUND.items()]


def pytest_generate_tests(metafunc):
    names = set(metafunc.fixturenames)
    if "around" in names:
        metafunc.parametrize(("mixer_name", "mixer_options", "around"), stack_cases())
    elif {"mixer_name", "mixer_options"} <= names:
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
def stack(build, awake, mixer_name, mixer_options, around):
    """Two layers of one mixer, Q, with small feed-forwards, in float64."""
    config = {
        "layout": "QQ",
        "mixers": {"Q": {"type": mixer_name, **mixer_options}, "L": {"num_heads": 2}},
        "feed_forwards": {"-": {"intermediate_size": 24}},
    }
    return awake(build(**{**config, **around}))


@pytest.fixture
def awake():
    """Put the adapters of a model, which start as nothing, to work."""

    def wake(model):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_b.weight"):
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(0.3 * noise)
        return model

    return wake


@pytest.fixture
def ids():
    """Random token ids (rows, T)."""

    def make(rows, time, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, VOCAB, (rows, time), generator=generator)

    return make


@pytest.fixture
def layer():
    """Build a mixture of experts by its options, as a layer by itself."""

    def build_layer(options, implementation="grouped_mm"):
        config = hybrid.HybridConfig(
            layout="S",
            ffn="E",
            hidden_size=D,
            feed_forwards={"E": options},
            experts_implementation=implementation,
        )
        experts = config.stack.feed_forwards["E"].build(0)
        use_backends_of(config, experts)
        return experts

    return build_layer


@pytest.fixture
def rewrite():
    """Rewrite the tensors of a checkpoint folder into one file, changed."""

    def change_tensors(folder, change):
        tensors = {}
        for path in folder.glob("*.safetensors"):
            tensors |= load_file(path)
            path.unlink()
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change_tensors


@pytest.fixture
def launch(tmp_path):
    """Run a script by a launcher, with a value as a JSON file, on the CPU; returns that file's path."""

    def start(launcher, script, value):
        (tmp_path / "driver.py").write_text(script)
        given = tmp_path / "given.json"
        given.write_text(json.dumps(value))
        ended = subprocess.run(
            [sys.executable, "-m", *launcher, str(tmp_path / "driver.py"), str(given)],
            capture_output=True,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return given

    return start
