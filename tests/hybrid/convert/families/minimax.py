"""MiniMax-01."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 10,
}  # fmt: skip
DEEPNORM = {
    "full_attn_alpha_factor": 1.7, "full_attn_beta_factor": 0.9, "linear_attn_alpha_factor": 1.6,
    "linear_attn_beta_factor": 1.1, "mlp_alpha_factor": 1.5, "mlp_beta_factor": 1.2,
}  # fmt: skip

CASES = {
    "published": {**SIZES, **DEEPNORM, "num_hidden_layers": 4,
                  "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "tied": {**SIZES, "num_hidden_layers": 2, "tie_word_embeddings": True},
}  # fmt: skip
