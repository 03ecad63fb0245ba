"""SmolLM3: no positions in every fourth layer, and in layers of choice."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 4},
    "other": {**SIZES, "num_hidden_layers": 3, "no_rope_layers": [0, 1, 1],
              "tie_word_embeddings": False, "attention_bias": True},
}  # fmt: skip
