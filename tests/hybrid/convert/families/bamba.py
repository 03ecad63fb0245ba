"""Bamba."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 3, "num_key_value_heads": 1,
    "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 5, "mamba_n_groups": 2,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 3, "attn_layer_indices": [1],
                  "mamba_n_groups": 1},
    "switches": {**SIZES, "num_hidden_layers": 3, "attn_layer_indices": [2], "mamba_proj_bias": True,
                 "attention_bias": True, "mlp_bias": True, "mamba_conv_bias": False,
                 "tie_word_embeddings": True, "time_step_limit": (0.05, 0.9)},
}  # fmt: skip
NEEDS = {"switches": "bamba.modeling_bamba.BambaRMSNormGated.group_size"}
