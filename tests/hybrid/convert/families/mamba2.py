"""Mamba-2."""

SIZES = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 6, "head_dim": 8, "state_size": 5,
    "n_groups": 1,
}  # fmt: skip

CASES = {
    "published": SIZES,
    "switches": {**SIZES, "n_groups": 3, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3,
                 "time_step_limit": (0.05, 0.9), "tie_word_embeddings": True},
}  # fmt: skip
NEEDS = {"switches": "mamba2.modeling_mamba2.MambaRMSNormGated.group_size"}
