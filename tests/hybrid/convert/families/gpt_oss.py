"""gpt-oss."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 12, "head_dim": 10, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 4},
    "switches": {**SIZES, "num_hidden_layers": 2, "attention_bias": False, "swiglu_limit": 0.5,
                 "tie_word_embeddings": True,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}  # fmt: skip
NEEDS = {"switches": "gpt_oss.configuration_gpt_oss.GptOssConfig.swiglu_limit"}
