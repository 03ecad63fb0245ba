"""Evaluate any causal language model: retrieval, reasoning, held-out loss and memory, with
intervals.

The package accepts any ``AutoModelForCausalLM``, checkpoint folder, hub name or model object, and
does not depend on the package of the model.
"""

from .cost import evaluate_cost, measure_cache
from .heldout import evaluate_heldout
from .merge import merge
from .models import Subject, load
from .mqar import evaluate_mqar, mqar
from .needle import evaluate_needle, needle
from .registry import TASKS, Settings
from .report import write_report
from .runner import evaluate

__all__ = [
    "TASKS",
    "Settings",
    "Subject",
    "evaluate",
    "evaluate_cost",
    "evaluate_heldout",
    "evaluate_mqar",
    "evaluate_needle",
    "load",
    "measure_cache",
    "merge",
    "mqar",
    "needle",
    "write_report",
]
