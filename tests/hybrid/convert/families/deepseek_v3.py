"""DeepSeek-V3 and its kin."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "moe_intermediate_size": 12, "num_attention_heads": 3,
    "kv_lora_rank": 10, "q_lora_rank": 14, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 5, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2,
    "num_mtp_layers": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 8, "beta_fast": 32, "beta_slow": 1}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 2, "first_k_dense_replace": 1,
                  "rope_parameters": YARN},
    "moonlight": {**SIZES, "num_hidden_layers": 2, "first_k_dense_replace": 1, "q_lora_rank": None,
                  "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
}  # fmt: skip
RESPELT = {"num_key_value_heads", "head_dim"}
