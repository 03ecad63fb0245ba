"""Ablations: a baseline, changes to it, equal cost, several seeds, and one report.

    hybrid ablate configs/ablations/....yaml [--dry-run]

load_ablation   a YAML file -> Ablation; reports all mistakes
plan_runs       Ablation -> Design: the variants, and the widths at which they cost the same
run_design      train and evaluate missing runs; the same call resumes
summarise       results -> a report: means, intervals, and which changes are established
"""

import lazy_loader

# ``import hybrid.ablate`` must not import transformers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
