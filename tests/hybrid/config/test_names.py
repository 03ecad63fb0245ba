"""Names by which code around transformers reads a config, with the true values behind them."""

import pytest

import hybrid

MOE = {"num_experts": 6, "top_k": 2, "intermediate_size": 24}
pytestmark = pytest.mark.compat


def config(layout="LS", **kwargs):
    mixers = {"L": {"num_heads": 2}, "S": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}}
    mixers |= {"C": {"type": "rg_lru"}, "Z": {"type": "mamba"}}
    bound = {symbol: mixers[symbol] for symbol in set(layout) & set(mixers)}
    return hybrid.HybridConfig(layout=layout, hidden_size=32, mixers=bound, **kwargs)


def test_heads_of_the_first_softmax_mixer():
    sizes = config()
    assert sizes.num_attention_heads == 4
    assert sizes.num_key_value_heads == 2
    assert sizes.head_dim == 16


def test_a_stack_without_heads_has_one_as_wide_as_the_model():
    sizes = config("ZZ")
    assert sizes.num_attention_heads == 1
    assert sizes.num_key_value_heads == 1
    assert sizes.head_dim == 32


def test_a_window_for_all_layers_can_be_set_where_it_changes_nothing():
    states = config("LL")
    types = states.layer_types
    states.sliding_window = 3
    assert states.layer_types == types
    softmax = config("LS")
    assert getattr(softmax, "sliding_window", None) is None
    softmax.sliding_window = None
    with pytest.raises(
        ValueError, match="sliding_window: expected None, since windows are set per symbol"
    ):
        softmax.sliding_window = 3


def test_feed_forwards_and_experts():
    assert config(feed_forwards={"-": {"intermediate_size": 48}}).intermediate_size == 48
    assert config(ffn="").intermediate_size == 0
    experts = config(ffn="E", feed_forwards={"E": MOE})
    assert experts.num_experts == experts.num_local_experts == 6
    assert experts.num_experts_per_tok == 2
    assert experts.moe_intermediate_size == 24
    assert not hasattr(config(), "num_experts")
    assert not hasattr(config(), "num_experts_per_tok")


@pytest.mark.parametrize(
    ("keys", "scale", "cap"),
    [
        ({}, 1.0, None),
        ({"logits_multiplier": 0.25}, 0.25, None),
        ({"mup_base_width": 16, "init": "fixed"}, 0.5, None),
        ({"mup_base_width": 16, "init": "fixed", "logits_multiplier": 3.0}, 1.5, None),
        ({"logit_softcap": 30.0}, 1.0, 30.0),
    ],
)
def test_what_is_done_to_the_products_of_the_head(keys, scale, cap):
    found = config("LL", **keys)
    assert found.logit_scale == found.lm_head_multiplier == scale
    assert found.logits_scaling == 1 / scale
    assert found.final_logit_softcapping == cap


def test_context_length():
    assert config(max_position_embeddings=128).n_positions == 128
    assert config().n_positions > 10**9
