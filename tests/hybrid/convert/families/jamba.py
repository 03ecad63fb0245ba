"""Jamba."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 3, "num_key_value_heads": 1,
    "mamba_d_state": 5, "num_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 1,
                  "expert_layer_period": 2, "expert_layer_offset": 1},
    "switches": {**SIZES, "num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 0,
                 "expert_layer_period": 1, "expert_layer_offset": 0, "mamba_proj_bias": True,
                 "mamba_conv_bias": False, "mamba_dt_rank": 3, "tie_word_embeddings": True},
}  # fmt: skip
RESPELT = {"attn_layer_period", "expert_layer_period", "intermediate_size"}
