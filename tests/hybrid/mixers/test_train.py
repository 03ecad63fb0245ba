"""Every mixer learns, and a mixer of a user's own file is on the same footing as ours."""

import importlib
import math
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from transformers import AutoModelForCausalLM

import hybrid
from hybrid.config import registry
from hybrid.config.registry import mixers

MARKS, NOISE, TIME = 8, 8, 5


def documents(rows, generator):
    """A mark, then noise; every token is to be answered with the mark."""
    mark = NOISE + torch.randint(0, MARKS, (rows, 1), generator=generator)
    noise = torch.randint(0, NOISE, (rows, TIME - 1), generator=generator)
    return torch.cat([mark, noise], dim=1), mark.expand(-1, TIME)


def losses(model, steps):
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        ids, mark = documents(32, generator)
        logits = model(ids, use_cache=False).logits[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), mark[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


# channel mixing sees one token back, and is no memory
@pytest.mark.parametrize("name", [n for n in mixers.names() if n != "rwkv_channel_mix"])
def test_learns_to_copy_the_first_token(build, name):
    model = build(
        dtype=torch.float32,
        layout="QQ",
        vocab_size=MARKS + NOISE,
        initializer_range=0.1,
        tie_word_embeddings=False,
        mixers={"Q": {"type": name, **mixers.get(name).samples()[0]}},
        feed_forwards={"-": {"intermediate_size": 32}},
    ).train()
    *_, last = losses(model, steps=60)
    # noise alone gives log 8
    assert last < 0.5 * math.log(MARKS)


THEIRS = '''
"""A mixer that no package knows: an average with a learned rate of forgetting per head."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from hybrid import LinearMixer, MixerOptions
from hybrid.config.registry import register_mixer


@dataclass(frozen=True)
class AverageOptions(MixerOptions):
    num_heads: int = 2
    start: float = 2.0

    def problems(self, config):
        if config.hidden_size % self.num_heads:
            return [f"num_heads: {self.num_heads} does not divide {config.hidden_size}"]
        return []


@register_mixer("average")
class Average(LinearMixer):
    Options = AverageOptions

    def __init__(self, options, config, layer_idx):
        super().__init__(options, config, layer_idx)
        dim = config.hidden_size // options.num_heads
        self.build(options.num_heads, dim, dim, conv_size=None)
        self.rate = nn.Parameter(torch.empty(options.num_heads))

    def init_parameters(self, std):
        nn.init.constant_(self.rate, self.options.start)

    def gates(self, x):
        return {"log_decay": F.logsigmoid(self.rate)}
'''


@pytest.fixture
def own_registry(monkeypatch, tmp_path):
    """A copy of the registry, and a folder on the import path with a mixer's file in it."""
    monkeypatch.setattr(mixers, "_by_name", dict(mixers._by_name))
    monkeypatch.setattr(mixers, "_by_symbol", dict(mixers._by_symbol))
    (tmp_path / "their_mixer.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("their_mixer", None)


def test_third_party_mixer_in_its_own_file(
    own_registry, build, tmp_path, assert_same_weights, assert_close_to_rounding
):
    importlib.import_module("their_mixer")  # which is all that it takes
    model = build(
        dtype=torch.float32,
        layout="ZS",
        vocab_size=MARKS + NOISE,
        tie_word_embeddings=False,
        initializer_range=0.1,
        mixers={"Z": {"type": "average", "start": 3.0}, "S": {"num_heads": 2}},
        feed_forwards={"-": {"intermediate_size": 32}},
    )
    assert model.model.layers[0].mixer.rate.tolist() == [3.0, 3.0]
    first, *_, last = losses(model.train(), steps=40)
    assert last < 0.5 * first
    model.eval()
    ids, _ = documents(2, torch.Generator().manual_seed(1))
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    cheap = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(tokens, cheap)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same_weights(again, model)
    with torch.no_grad():
        assert_close_to_rounding(again(ids).logits, model(ids).logits)


def test_third_party_mixer_by_entry_point(own_registry, monkeypatch):
    """A package lists its mixer under `hybrid.mixers`, and nobody has to import it."""
    point = EntryPoint("average", "their_mixer", "hybrid.mixers")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    monkeypatch.setattr(mixers, "_plugins_loaded", False)
    config = hybrid.HybridConfig(hidden_size=32, layout="Z", mixers={"Z": {"type": "average"}})
    assert config.stack.mixers["Z"].cls.__module__ == "their_mixer"


def test_mistakes_in_a_third_party_mixer_are_named(own_registry):
    importlib.import_module("their_mixer")
    with pytest.raises(ValueError, match=r"mixers\.Z\.num_heads: 5 does not divide 32"):
        hybrid.HybridConfig(
            hidden_size=32, layout="Z", mixers={"Z": {"type": "average", "num_heads": 5}}
        )
    with pytest.raises(ValueError, match=r"unknown key, did you mean 'start'"):
        hybrid.HybridConfig(
            hidden_size=32, layout="Z", mixers={"Z": {"type": "average", "strat": 1.0}}
        )
