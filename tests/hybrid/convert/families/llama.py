"""Llama 3.x (rope scaling, grouped heads), SmolLM2 (tied), and biases."""

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 28, "head_dim": 10}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip

CASES = {
    "llama3": {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2,
               "rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},
    "smollm2": {**SIZES, "num_attention_heads": 3, "num_key_value_heads": 1,
                "tie_word_embeddings": True, "rope_theta": 100000.0},
    "biases": {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 2,
               "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
}  # fmt: skip
