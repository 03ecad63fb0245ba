"""Sizes that nobody can mean are refused before anything is built."""

import pytest
import torch

import hybrid

BASE = {
    "layout": "LS",
    "hidden_size": 32,
    "vocab_size": 61,
    "mixers": {"L": {"num_heads": 2}, "S": {"num_heads": 2}},
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 10**12}, "vocab_size: expected at most 67108864, got 1000000000000"),
        ({"hidden_size": 2**40}, "hidden_size: .* at most"),
        ({"num_hidden_layers": 2 * 10**9}, "num_hidden_layers: expected at most 16384"),
        ({"num_mtp_layers": 10**9}, "num_mtp_layers: expected at most 1024"),
        ({"canon": "A", "canon_width": 10**9}, "canon_width: expected at most 1024"),
        ({"mixers": {"S": {"num_heads": 2**25}}}, "mixers.S.num_heads: expected at most 16777216"),
        (
            {"feed_forwards": {"-": {"intermediate_size": 2**30}}},
            "intermediate_size: expected at most",
        ),
        ({"initializer_range": float("nan")}, "initializer_range: .*finite.*nan"),
        ({"embedding_multiplier": float("inf")}, "embedding_multiplier: .*finite.*inf"),
        ({"dtype": "int8"}, "dtype: expected a floating-point dtype, got 'int8'"),
        ({"dtype": torch.int64}, "dtype: expected a floating-point dtype, got torch.int64"),
    ],
)
def test_a_size_that_nobody_can_mean_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        hybrid.HybridConfig(**{**BASE, **change})


@pytest.mark.parametrize("key", ["num_layer", "num_layers", "n_layer"])
def test_the_usual_name_of_the_depth_leads_to_ours(key):
    with pytest.raises(ValueError, match=f"{key}: unknown key, did you mean 'num_hidden_layers'"):
        hybrid.HybridConfig(**BASE, **{key: 4})
