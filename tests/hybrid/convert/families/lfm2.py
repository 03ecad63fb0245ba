"""LFM2."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 37, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 3, "full_attn_idxs": [1], "block_multiple_of": 8},
    "switches": {**SIZES, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"],
                 "conv_bias": True, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False,
                 "tie_word_embeddings": False},
}  # fmt: skip
RESPELT = {
    "full_attn_idxs", "intermediate_size", "block_multiple_of", "block_auto_adjust_ff_dim",
}  # fmt: skip
