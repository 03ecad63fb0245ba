"""Qwen3."""

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 28, "head_dim": 10}

CASES = {
    "grouped": {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2},
    "tied_biases": {**SIZES, "num_attention_heads": 3, "num_key_value_heads": 1,
                    "tie_word_embeddings": True, "attention_bias": True},
}  # fmt: skip
