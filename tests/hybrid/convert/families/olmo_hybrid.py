"""OLMo Hybrid. Keys and values as wide as each other: its save cuts the convolution in equal parts.

Files whose three convolutions are of different widths are in `test_convert.py`.
"""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 4, "num_key_value_heads": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 15,
    "linear_value_head_dim": 5, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 4},
    "switches": {**SIZES, "num_hidden_layers": 3, "attention_bias": True,
                 "linear_allow_neg_eigval": False, "tie_word_embeddings": True,
                 "layer_types": ["full_attention", "linear_attention", "full_attention"],
                 "rope_parameters": {"rope_type": "default", "rope_theta": None}},
}  # fmt: skip
