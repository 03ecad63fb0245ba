"""Modules that mixers and the model share: norms, rotary embedding, packing, cache slots."""
