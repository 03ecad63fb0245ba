"""Ablations with discipline: a baseline, changes to it, equal cost, several seeds, one report.

    hybrid ablate configs/ablations/....yaml [--dry-run]

load_ablation   a YAML file -> Ablation, every mistake named
plan_runs       Ablation -> Design: the variants, the widths that make them cost the same
run_design      trains what is not there yet, evaluates it; the same call again continues
summarise       what was measured -> a report: means, intervals, which changes are established
"""

import lazy_loader

# Light on purpose: `import hybrid.ablate` does not load transformers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
