"""Zamba2: two shared blocks in turn, adapters on the feed-forward, and on q, k, v as well."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 3, "mamba_d_state": 6,
    "n_mamba_heads": 6, "mamba_ngroups": 2, "adapter_rank": 3,
}  # fmt: skip
M, Z = "linear_attention", "hybrid"

CASES = {
    "published": {**SIZES, "num_hidden_layers": 6, "layers_block_type": [M, Z, M, Z, Z, M],
                  "num_mem_blocks": 2, "time_step_min": 0.3, "time_step_max": 0.6},
    "switches": {**SIZES, "num_hidden_layers": 4, "layers_block_type": [Z, M, Z, M],
                 "use_shared_attention_adapter": True, "use_mem_rope": True,
                 "add_bias_linear": True},
}  # fmt: skip
