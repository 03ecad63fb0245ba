"""OLMo 2."""

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 28}
IDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}

CASES = {
    "published": {**SIZES, **IDS, "num_attention_heads": 4},
    "switches": {**SIZES, **IDS, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "attention_bias": True, "tie_word_embeddings": True, "rope_theta": 500.0},
}  # fmt: skip
