"""Ling 3.0: K2A, a bounded gate and not, experts in groups, first layers dense."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 3, "head_dim": 5,
    "num_key_value_heads": 3, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 7, "moe_intermediate_size": 12, "num_local_experts": 6, "num_experts_per_tok": 2,
    "n_group": 3, "topk_group": 2, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 3, "layer_group_size": 3,
                  "first_k_dense_replace": 1},
    "switches": {**SIZES, "num_hidden_layers": 3, "kda_safe_gate": False, "n_shared_experts": 2,
                 "short_conv_kernel_size": 3, "norm_topk_prob": False,
                 "layer_types": ["full_attention", "linear_attention", "full_attention"],
                 "mlp_layer_types": ["dense", "sparse", "dense"],
                 "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}  # fmt: skip
RESPELT = {"layer_group_size", "first_k_dense_replace"}
