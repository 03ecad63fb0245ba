"""Gemma 3."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 10, "sliding_window": 5,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 6, "query_pre_attn_scalar": 7,
                  "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                  "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "switches": {**SIZES, "num_hidden_layers": 3, "query_pre_attn_scalar": 10,
                 "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
                 "attention_bias": True, "tie_word_embeddings": False,
                 "final_logit_softcapping": 3.0},
}  # fmt: skip
