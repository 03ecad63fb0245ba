"""Keyword arguments of every forward: used, rightly ignored, or refused by name."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, DynamicCache

import hybrid
from hybrid.config.registry import mixers
from hybrid.nn.arguments import CACHE, IGNORED_ARGUMENTS

MIXERS = {"S": {"num_heads": 2}, "L": {"num_heads": 2}}
pytestmark = pytest.mark.compat


@pytest.fixture(params=["SS", "LL", "LS"])
def model(request, build):
    layout = request.param
    return build(layout=layout, mixers={s: MIXERS[s] for s in set(layout)})


def test_a_typo_is_refused_with_the_right_name(model, ids):
    message = r"{}\.forward got an unexpected keyword argument 'cach'; did you mean 'cache'\?"
    of_layer = (
        r"HybridLayer\.forward got an unexpected keyword argument 'pas'; did you mean 'past'\?"
    )
    with pytest.raises(TypeError, match=message.format("HybridForCausalLM")):
        model(ids(1, 4), cach=None)
    with pytest.raises(TypeError, match=message.format("HybridModel")):
        model.model(ids(1, 4), cach=None)
    classifier = AutoModelForSequenceClassification.from_config(model.config)
    with pytest.raises(TypeError, match=message.format("HybridForSequenceClassification")):
        classifier(ids(1, 4), cach=None)
    layer = model.model.layers[0]
    with pytest.raises(TypeError, match=of_layer):
        layer(torch.zeros(1, 4, 32), attention_mask={}, position_embeddings={}, pas=None)
    mixer = layer.mixer
    with pytest.raises(TypeError, match=message.format(type(mixer).__name__)):
        mixer(torch.zeros(1, 4, 32), cach=None)


def test_what_only_other_models_have_is_refused(model, ids):
    for name in ("pixel_values", "encoder_hidden_states", "labels"):
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'"):
            model.model(ids(1, 4), **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"is_causal: expected True or no value, .* got False"):
        model(ids(1, 4), is_causal=False)


def test_a_cache_comes_under_either_name(model, ids):
    x = ids(2, 9)
    expected = model(x).logits
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config)
        parts = [model(piece, **{name: cache}).logits for piece in x.split([5, 1, 3], dim=1)]
        assert_close(torch.cat(parts, dim=1), expected)
        out = model(x, use_cache=True)
        assert out[CACHE] is not None
        assert out.past_key_values is out[CACHE]
    with pytest.raises(ValueError, match="expected one of cache and past_key_values, got both"):
        model(x, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("name", sorted(IGNORED_ARGUMENTS))
def test_what_is_ignored_changes_nothing(model, ids, name):
    x = ids(2, 5)
    value = {"return_dict": True, "num_items_in_batch": 3}.get(name, torch.zeros_like(x))
    positions = torch.arange(5)[None]
    out = model(x, position_ids=positions, **{name: value})
    assert_close(out.logits, model(x, position_ids=positions).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_cache_and_checkpointing_in_training_are_refused_together(model, ids, reentrant):
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    model.train()
    with pytest.raises(ValueError, match="a cache cannot be used in training with gradient check"):
        model(ids(1, 4), cache=DynamicCache(config=model.config))
    if not reentrant:  # torch warns of a reentrant checkpoint without gradients
        with torch.no_grad():
            model(ids(1, 4), cache=DynamicCache(config=model.config))


def test_a_mixer_of_a_users_own_gets_no_surprise(ids, monkeypatch):
    """What a layer hands to a mixer is what the contract names."""
    seen = []

    class Spy(hybrid.Mixer):
        def __init__(self, options, config, layer_idx):
            super().__init__(options, config, layer_idx)

        def forward(self, x, **kwargs):
            seen.append(set(kwargs))
            return x, None

    # other tests go through all registered mixers
    monkeypatch.setattr(mixers, "_by_name", dict(mixers._by_name))
    hybrid.register_mixer("spy_of_arguments")(Spy)
    config = hybrid.HybridConfig(
        layout="Y", hidden_size=32, mixers={"Y": {"type": "spy_of_arguments"}}
    )
    model = hybrid.HybridForCausalLM(config)
    model(ids(1, 4), output_hidden_states=True, output_attentions=False)
    contract = {"attention_mask", "position_embeddings", "segments", "cache", "position_ids"}
    assert seen == [contract]
