"""``hybrid quickstart``: train, reload, measure and compare three layouts on a laptop.

The quickstart runs the commands that a user would run, several in parallel if there are enough
cores, and shows one progress bar for each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hybrid.config.yaml import find_config
from hybrid.imports import import_arguments
from hybrid.terminal import console, text_column
from hybrid.train.launch import shown, training_command


@dataclass(frozen=True)
class Run:
    """One training run: layout, seed, and output folder."""

    name: str
    layout: str
    seed: int
    folder: Path


def quickstart(
    out: str = "runs/quickstart",
    config: str | None = None,
    layouts: Sequence[str] = ("LLLS", "SSSS", "LLLL"),
    seeds: Sequence[int] = (0,),
    overrides: Sequence[str] = (),
) -> int:
    """Train every layout with every seed, evaluate them in a new process, and write the report.

    Args:
        out: folder for checkpoints, logs and the report.
        config: training YAML; default ``configs/quickstart.yaml``.
        layouts: the first is the hybrid, the others are controls.
        seeds: seeds of initialisation and data.
        overrides: ``key=value`` overrides of the training config.

    Returns:
        0, or the exit status of the command that failed.

    Raises:
        ValueError: mistakes in the config or a layout, before anything runs.
    """
    started = time.perf_counter()
    path = find_config("quickstart.yaml") if config is None else Path(config)
    runs = _runs(Path(out), layouts, seeds)
    sizes = _parameters(path, runs, overrides)
    _print_sizes(sizes)
    failed = _train_all(path, runs, overrides)
    if failed is not None:
        run, log, status = failed
        print(f"training of {run.name} failed; the end of {log}:\n{_tail(log)}", file=sys.stderr)
        return status
    status = subprocess.call(evaluation_command(runs, out))
    if status:
        return status
    _print_end(Path(out), path, runs, time.perf_counter() - started)
    return 0


def evaluation_command(runs: Sequence[Run], out: str | Path) -> list[str]:
    """Return the command ``hybrid eval NAME=FOLDER ... --out OUT`` with this Python."""
    models = [f"{run.name}={run.folder}" for run in runs]
    title = f"Quickstart: {', '.join(dict.fromkeys(run.layout for run in runs))}"
    command = [sys.executable, "-m", "hybrid.cli", "eval", *models, "--out", str(out)]
    return [*command, "--title", title, *import_arguments()]


def _runs(out: Path, layouts: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    runs = []
    for seed in seeds:
        for layout in layouts:
            name = layout if len(seeds) == 1 else f"{layout} seed {seed}"
            runs.append(Run(name, layout, seed, out / name.replace(" ", "-")))
    return runs


def _parameters(path: Path, runs: Sequence[Run], overrides: Sequence[str]) -> dict[str, int]:
    """Return parameters by layout, counted on the meta device; also check the config of each
    layout.
    """
    from hybrid.plan import load_model_config, plan

    sizes = {}
    for layout in dict.fromkeys(run.layout for run in runs):
        config = load_model_config(str(path), [*overrides, f"model.layout={layout}"])
        sizes[layout] = plan(config, context=1).parameters
    return sizes


def _print_sizes(sizes: dict[str, int]) -> None:
    spread = max(sizes.values()) / min(sizes.values()) - 1
    words = ", ".join(f"{layout} {count:,}" for layout, count in sizes.items())
    print(f"parameters: {words} (within {spread:.1%})", flush=True)


def _train_all(
    path: Path, runs: Sequence[Run], overrides: Sequence[str]
) -> tuple[Run, Path, int] | None:
    """Train all runs, as many in parallel as there are cores; return the first that failed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_once = max(1, min(len(runs), cores or 1))
    threads = max(1, (cores or 1) // at_once)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with _bars() as bars, ThreadPoolExecutor(at_once) as pool:
        # not started: the time of a bar excludes that in the queue
        lanes = {
            run.name: bars.add_task(run.name, start=False, total=None, note="waiting")
            for run in runs
        }

        def one(run: Run) -> tuple[Run, Path, int]:
            own = [
                f"model.layout={run.layout}",
                f"training.seed={run.seed}",
                f"training.output_dir={run.folder}",
            ]
            command = training_command(path, [*overrides, *own])
            bars.console.print(shown(command), highlight=False, soft_wrap=True)
            log = run.folder.with_name(run.folder.name + ".log")
            log.parent.mkdir(parents=True, exist_ok=True)
            bars.reset(lanes[run.name], start=True, total=None, note="starting")
            piped = not bars.console.is_terminal  # the bars are printed at the end only
            if piped:
                print(f"train {run.name}: started", flush=True)
            started = time.perf_counter()
            status = _follow(command, env, log, lambda **kw: bars.update(lanes[run.name], **kw))
            bars.stop_task(lanes[run.name])
            if piped:
                seconds = f"{time.perf_counter() - started:.0f} s"
                end = f"done in {seconds}" if status == 0 else f"failed after {seconds}, see {log}"
                print(f"train {run.name}: {end}", flush=True)
            return run, log, status

        results = list(pool.map(one, runs))
    return next((result for result in results if result[2]), None)


@contextmanager
def _bars() -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (
        text_column("train {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        text_column("{task.fields[note]}"),
    )
    with Progress(*columns, console=console()) as bars:
        yield bars


STEP = re.compile(r"(\d+)/(\d+) \[.*?(?:loss=([\d.naif]+))?[^\[]*$")


def _follow(command: list[str], env: dict[str, str], log: Path, update: Any) -> int:
    """Run a training command; write its output to ``log``, and pass its progress to ``update``."""
    with (
        log.open("w", encoding="utf-8") as kept,
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        reader = threading.Thread(target=_read, args=(process.stdout, kept, update))
        reader.start()
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            raise
        reader.join()
    update(note="done" if status == 0 else f"failed, see {log}")
    return status


def _read(stream: IO[str], kept: IO[str], update: Any) -> None:
    """Copy lines; text mode converts the carriage returns of a progress bar to lines."""
    for line in stream:
        kept.write(line)
        kept.flush()
        match = STEP.search(line.rstrip())
        if match:
            done, total, loss = match.groups()
            note = f"loss {float(loss):.3f}" if loss else ""
            update(completed=int(done), total=int(total), note=note)


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8").splitlines()[-lines:])


def _print_end(out: Path, config: Path, runs: Sequence[Run], seconds: float) -> None:
    import json

    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    scores = {m["name"]: m["results"]["mqar"]["accuracy"] for m in results["models"]}
    hybrid_layout = runs[0].layout
    seeds = list(dict.fromkeys(run.seed for run in runs))
    for layout in dict.fromkeys(run.layout for run in runs):
        if layout == hybrid_layout:
            continue
        by_seed = {(run.layout, run.seed): scores[run.name] for run in runs}
        wins = sum(by_seed[hybrid_layout, s] > by_seed[layout, s] for s in seeds)
        print(f"recall: {hybrid_layout} above {layout} at {wins} of {len(seeds)} seeds")
    first = runs[0].folder
    print(f"\n{seconds:.0f} s in all. Report: {out / 'report.html'}\n\nNext:")
    for command in (
        f"hybrid train {config} model.layout=LSLS training.output_dir={out / 'LSLS'}",
        f"hybrid eval {first} {out / 'LSLS'} --out {out / 'compare'}",
        f"hybrid plan {first} --context 128k",
    ):
        print(f"  {command}")
