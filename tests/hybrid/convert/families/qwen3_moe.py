"""Qwen3-MoE: experts everywhere, and in every second layer."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "head_dim": 10, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 2, "norm_topk_prob": True},
    "some_dense": {**SIZES, "num_hidden_layers": 4, "decoder_sparse_step": 2,
                   "mlp_only_layers": [3], "norm_topk_prob": False},
}  # fmt: skip
RESPELT = {"decoder_sparse_step", "mlp_only_layers", "intermediate_size"}
