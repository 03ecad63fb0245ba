"""Ring-linear: transformers has no class for it, `test_convert_hybrids.py` has the formulas."""

CASES = {}
