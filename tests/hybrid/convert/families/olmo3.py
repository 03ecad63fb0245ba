"""OLMo 3."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 4, "num_key_value_heads": 2,
    "sliding_window": 5, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16,
    "attention_factor": 1.2, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 4, "rope_scaling": YARN},
    "switches": {**SIZES, "num_hidden_layers": 2, "attention_bias": True,
                 "layer_types": ["full_attention", "sliding_attention"],
                 "tie_word_embeddings": True},
}  # fmt: skip
