"""Falcon-Mamba."""

CASES = {
    "published": {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 5,
                  "tie_word_embeddings": False, "mixer_rms_eps": 1e-3},
}  # fmt: skip
