"""Qwen2 and 2.5."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 2, "rope_theta": 1e6},
    "windows": {**SIZES, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5,
                "max_window_layers": 1, "tie_word_embeddings": True},
}  # fmt: skip
RESPELT = {"max_window_layers"}
