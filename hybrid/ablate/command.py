"""``hybrid ablate``: run an ablation from a YAML file, with the tasks of ``hybrid_eval`` as metrics."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid.ablate.config import load_ablation
from hybrid.ablate.design import plan_runs
from hybrid.ablate.evaluation import EvaluationTasks, html
from hybrid.ablate.report import summarise, write_report
from hybrid.ablate.runs import refuse_other_runs, run_design, train_by, train_here
from hybrid.ablate.table import print_design, print_report
from hybrid.files import write_text
from hybrid.terminal import console


def run_ablation(
    config: str,
    overrides: Sequence[str] = (),
    *,
    dry_run: bool = False,
    config_file: str | None = None,
    scale: str | None = None,
) -> int:
    """Plan an ablation, run what is missing, and write and print its report.

    Args:
        config: a YAML file, e.g. one of ``configs/ablations/``.
        overrides: ``key=value`` overrides of the file.
        dry_run: whether to only print the plan.
        config_file: a config of accelerate, to train with ``accelerate launch``; None trains in
            this process.
        scale: one of the config's ``scales``.

    Returns:
        0, or 1 if a prediction (``expect:``) does not hold.

    Raises:
        ConfigError: the config has mistakes, or the folder has other runs.
    """
    tasks, screen = EvaluationTasks(), console()
    design = plan_runs(load_ablation(config, overrides, tasks, scale))
    refuse_other_runs(design)
    print_design(design, screen)
    if dry_run:
        return 0
    measured = run_design(design, tasks, train_by(config_file) if config_file else train_here)
    report = summarise(design, measured, tasks)
    path = write_report(report, design.out)
    page = path.with_suffix(".html")
    write_text(page, html(report, path.parent))
    print_report(report, screen)
    screen.print(f"report: {page}", highlight=False, soft_wrap=True)
    return int(any(found["verdict"] != "holds" for found in report["expectations"]))
