"""Gemma 2."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 10, "sliding_window": 5,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 4, "query_pre_attn_scalar": 6,
                  "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
                  "attn_implementation": "eager"},  # older ones take one that leaves the cap out
    "switches": {**SIZES, "num_hidden_layers": 2, "query_pre_attn_scalar": 10,
                 "layer_types": ["full_attention", "sliding_attention"], "attention_bias": True,
                 "tie_word_embeddings": False, "final_logit_softcapping": None,
                 "attn_logit_softcapping": None},
}  # fmt: skip
RESPELT = {"use_bidirectional_attention"}
