"""Mixtral."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "num_local_experts": 5, "num_experts_per_tok": 2,
}  # fmt: skip

CASES = {
    "published": SIZES,
    "window": {**SIZES, "sliding_window": 5, "head_dim": 10, "tie_word_embeddings": True},
}  # fmt: skip
RESPELT = {"head_dim"}
