"""Kimi Linear."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "moe_intermediate_size": 12, "num_attention_heads": 3,
    "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5,
    "num_local_experts": 6, "num_experts_per_tok": 2, "linear_head_dim": 6, "linear_num_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 3,
                  "layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "switches": {**SIZES, "num_hidden_layers": 2, "q_lora_rank": 14, "n_group": 3, "topk_group": 2,
                 "layer_types": ["full_attention", "linear_attention"],
                 "mlp_layer_types": ["sparse", "sparse"], "n_shared_experts": 2},
}  # fmt: skip
RESPELT = {"num_key_value_heads", "head_dim", "intermediate_size"}
