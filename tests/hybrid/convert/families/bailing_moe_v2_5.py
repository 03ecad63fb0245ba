"""Ling 2.5: transformers has no class for it, `test_hybrids.py` has the formulas."""

CASES = {}
