"""Mamba."""

CASES = {
    "published": {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 5},
    "switches": {"hidden_size": 20, "num_hidden_layers": 2, "state_size": 3, "expand": 3,
                 "conv_kernel": 3, "use_bias": True, "use_conv_bias": False, "time_step_rank": 4,
                 "tie_word_embeddings": False},
}  # fmt: skip
