"""xLSTM; and values wider than the op takes, as those of the published size are.

Their cache is right only where q, k and v are multiples of 64 wide.
"""

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "qk_dim_factor": 2.0}

CASES = {
    "published": {**SIZES, "num_heads": 4, "v_dim_factor": 4.0},
    "wide": {**SIZES, "num_heads": 2, "v_dim_factor": 18.0, "ffn_proj_factor": 1.25,
             "ffn_round_up_to_multiple_of": 10, "gate_soft_cap": 2.0, "eps": 1e-3,
             "output_logit_soft_cap": 3.0},
}  # fmt: skip
RESPELT = {"ffn_proj_factor", "ffn_round_up_to_multiple_of"}
