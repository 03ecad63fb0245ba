"""Falcon-H1: with a norm on Mamba-2's output and without, multipliers as published are spelt."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 4, "num_key_value_heads": 2,
    "mamba_d_ssm": 40, "mamba_n_heads": 5, "mamba_d_head": 8, "mamba_d_state": 6,
    "num_hidden_layers": 2,
}  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 5.656854249492381, "lm_head_multiplier": 0.0390625,
    "key_multiplier": 0.39062499999999994, "mlp_multipliers": [0.8838834764831844, 0.5859375],
    "attention_in_multiplier": 1.25, "attention_out_multiplier": 0.9375,
    "ssm_in_multiplier": 1.5, "ssm_out_multiplier": 0.23570226039551584,
    "ssm_multipliers": [0.3535533905932738, 0.25, 0.7071067811865476, 0.5, 0.3535533905932738],
}  # fmt: skip

CASES = {
    "published": {**SIZES, **MULTIPLIERS, "head_dim": 10, "rope_theta": 1e11},
    "normed": {**SIZES, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "attention_bias": True,
               "mlp_bias": True, "mamba_n_groups": 5, "mamba_conv_bias": False,
               "key_multiplier": 0.7, "tie_word_embeddings": True},
    "normed_first": {**SIZES, "mamba_rms_norm": True, "mamba_proj_bias": True,
                     "projectors_bias": True, "time_step_limit": (0.05, 0.9)},
}  # fmt: skip
