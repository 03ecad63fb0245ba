"""Modules shared by mixers and the model: norms, rotary embedding, packing, cache slots."""
