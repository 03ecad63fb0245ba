"""RecurrentGemma."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 56, "num_attention_heads": 3, "num_key_value_heads": 1,
    "attention_window_size": 5,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 4},
    "switches": {**SIZES, "num_hidden_layers": 3, "block_types": ["attention", "recurrent"],
                 "lru_width": 30, "conv1d_width": 3, "attention_bias": True,
                 "logits_soft_cap": 2.0, "tie_word_embeddings": False,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 500.0,
                                     "partial_rotary_factor": 0.25}},
}  # fmt: skip
