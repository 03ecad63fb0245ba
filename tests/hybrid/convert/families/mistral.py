"""Mistral."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}  # fmt: skip

CASES = {
    "window": {**SIZES, "sliding_window": 5, "head_dim": 10},
    "full": {**SIZES, "sliding_window": None, "tie_word_embeddings": True},
}  # fmt: skip
