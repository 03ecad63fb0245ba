"""``hybrid reproduce NAME``: run a published finding as an ablation and check its predictions.

Each finding is one file of ``configs/reproduce/``: an ablation with ``finding``, ``paper``,
``expect``, ``figure``, and ``scales``, of which ``gpu`` has the sizes for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hybrid.ablate.command import run_ablation
from hybrid.config import yaml
from hybrid.config.options import ConfigError, did_you_mean

SCALES = ("laptop", "gpu")


def findings() -> dict[str, Path]:
    """Return name -> file of every finding."""
    folder = yaml.find_config("reproduce/parity.yaml").parent
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def reproduce(
    name: str,
    overrides: Sequence[str] = (),
    *,
    scale: str = "laptop",
    dry_run: bool = False,
    config_file: str | None = None,
) -> int:
    """Run a finding in ``runs/reproduce/NAME``, or resume it.

    Args:
        name: one of ``findings()``.
        overrides: ``key=value`` overrides of its file.
        scale: "laptop", or one of the file's ``scales``.
        dry_run: only print the plan.
        config_file: a config of accelerate; None trains in this process.

    Returns:
        0 if every prediction holds, else 1.

    Raises:
        ConfigError: an unknown finding or scale.
    """
    known = findings()
    if name not in known:
        raise ConfigError(
            [f"NAME: unknown finding {name!r}, {did_you_mean(name, known)}"], "reproduce"
        )
    if scale not in SCALES:
        raise ConfigError([f"--scale: expected laptop or gpu, got {scale!r}"], "reproduce")
    laptop = scale == "laptop"
    out = f"out=runs/reproduce/{name}" + ("" if laptop else f"-{scale}")
    return run_ablation(
        str(known[name]),
        [out, *overrides],
        dry_run=dry_run,
        config_file=config_file,
        scale=None if laptop else scale,
    )


def print_findings(console: Console) -> None:
    """Print name, finding and paper of each."""
    table = Table("name", "finding", "paper", box=SIMPLE_HEAD)
    for name, path in findings().items():
        values = yaml.read(path)
        table.add_row(name, values.get("finding", ""), values.get("paper", ""))
    console.print(table)
