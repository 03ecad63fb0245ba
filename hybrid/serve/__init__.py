"""Exports in real servers: parity of what they decode with what the model here decodes."""
