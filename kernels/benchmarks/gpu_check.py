"""What to run when a GPU is at hand, in this order; ``kernels/benchmarks/gpu.sh`` runs all of it.

``python kernels/benchmarks/gpu_check.py sanitize``
    compute-sanitizer over one launch of each kernel: memory, then races
``python kernels/benchmarks/gpu_check.py correctness --out DIR --jobs 12``
    every form, forward, all gradients and final state, packed too, against the reference in float64
``python kernels/benchmarks/gpu_check.py bench --out DIR --jobs 8``
    milliseconds against flash-linear-attention and mamba-ssm, where installed, taking turns in this
    process, with the goals beside them (``gpu_bench.py``)
``python kernels/benchmarks/gpu_check.py tune --out DIR --jobs 12``
    a bounded search of block sizes, printed in the form in which ``triton/launch.py`` keeps them

All but the first write DIR/<name>.json, row by row, with the device, the versions, what failed and
what ``--budget`` seconds left no time for. Compiling takes longer than running, so ``--jobs``
processes at a time share it: of the correctness runs each takes one form, so that a kernel that
breaks the device's context ends no other form; before the two that time something, they only fill
the compiler's cache. With ``--dry-run`` and TRITON_INTERPRET=1 each runs
on a CPU at tiny sizes: that shows that it works, nothing else. As of now none has been run on a
GPU: nothing about the speed of the Triton kernels is known.

Shapes: B batch, T time, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpu_bench
from hybrid_kernels.api import causal_conv1d, linear_attention, selective_scan
from hybrid_kernels.testing import (
    FORMS,
    TOLERANCE,
    evaluate,
    relative_rms,
    sample,
    sample_scan,
)
from hybrid_kernels.triton import launch
from hybrid_kernels.triton.launch import Config

Op = Callable[..., tuple[Tensor, Tensor | None]]

PACKAGES = ("triton", "flash-linear-attention", "fla-core", "mamba-ssm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCAN = "selective_scan"
NAMED = {form.name: form for form in FORMS}
CHECKED = (*NAMED, SCAN)
# More sequences and heads than any call has: its forward pass is not one walk (``launch.walks``).
NEVER = 1 << 30
SANITIZERS = ("memcheck", "racecheck")
# Form, dtype and dim of each set of kernels; between them all kernels of ``linear_attention``, and
# what only bfloat16 has (``launch.fine``).
ONCE = (
    ("additive_scalar", torch.float32, 20),
    ("additive_outer", torch.float32, 20),
    ("delta_vector", torch.float32, 20),
    ("delta", torch.bfloat16, 68),
)


def environment(device: torch.device) -> dict[str, str]:
    """Return the device and the versions that a result belongs to."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else "CPU, interpreted: a dry run"
    found = {"device": name, "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


@dataclass
class Ledger:
    """The rows of a section, on disk as soon as they are there, and what became of the rest.

    Attributes:
        path: the JSON, or None.
        device: what it is about.
        deadline: ``time.monotonic()`` after which nothing new is begun.
    """

    path: Path | None
    device: torch.device
    deadline: float = float("inf")
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def attempt(self, label: str, rows: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Add the rows of one piece of work; an exception in it is recorded as text."""
        if time.monotonic() > self.deadline:
            self.left_out.append(label)
            return
        try:
            for row in rows():
                self.rows.append(row)
                self.write()
        except gpu_bench.FAILURES as error:
            self.failures.append(f"{label}: {type(error).__name__}: {error}"[:1000])
            print(f"FAILED {self.failures[-1]}", flush=True)
            traceback.print_exc(limit=-3)
            self.write()

    def write(self) -> None:
        """Write all there is."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = {"environment": environment(self.device), "rows": self.rows}
        found |= {"failures": self.failures, "left_out": self.left_out}
        self.path.write_text(json.dumps(found, indent=1))

    def take(self, path: Path) -> None:
        """Add what another process wrote; a file that is missing is a failure."""
        if not path.is_file():
            self.failures.append(f"{path.parent.name}: wrote nothing, see above")
            return
        found = json.loads(path.read_text())
        self.rows += found["rows"]
        self.failures += found["failures"]
        self.left_out += found["left_out"]

    def summary(self) -> int:
        """Print what is wrong, last, and return the exit status."""
        bad = [row for row in self.rows if _is_bad(row)]
        bad_words = [f"BAD {_where(row)}: {row.get('wrong')}" for row in bad]
        left = [f"no time for {label}" for label in self.left_out]
        print("\n".join([*bad_words, *(f"FAILED {words}" for words in self.failures), *left]))
        print(f"{len(self.rows)} rows, {len(bad)} bad, {len(self.failures)} failures", flush=True)
        return 1 if bad or self.failures else 0


# ---------------------------------------------------------------------------------- correctness


def correctness(
    ledger: Ledger, names: list[str], steps: int, dim: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Add a row for each form, dtype and kind of gates, with the errors that are too large."""
    cases = (("mild", None), ("closed", None), ("mild", _lengths(steps)))
    for name, dtype, (gates, lengths) in itertools.product(names, dtypes, cases):
        walking = _can_walk(name, dtype, dim, ledger.device)
        case = {"form": name, "dtype": str(dtype), "gates": gates, "packed": bool(lengths)}
        both = walking and gates == "mild" and lengths is None
        # The reference takes longer than all else, and is the same for both ways.
        expected: dict[str, Tensor] = {}
        for walk in (True, False) if both else (walking,):
            about = {**case, "walk": walk}

            def rows(
                about: dict[str, Any] = about,
                dtype: torch.dtype = dtype,
                lengths: list[int] | None = lengths,
                expected: dict[str, Tensor] = expected,
            ) -> Iterator[dict[str, Any]]:
                op, inputs = _drawn(about["form"], about["gates"], lengths, dtype, steps, dim)
                inputs = {n: x.to(ledger.device) for n, x in inputs.items()}
                if not expected:
                    expected |= _expected(op, inputs)
                with launch.walk_from(0 if about["walk"] else NEVER):
                    row = {**about, **agreement(op, inputs, TOLERANCE[dtype], expected)}
                print(_line(row), flush=True)
                yield row

            ledger.attempt(_where(about), rows)


def _can_walk(name: str, dtype: torch.dtype, dim: int, device: torch.device) -> bool:
    """Whether the forward pass of a form, as checked here, can be one walk over time there."""
    op, inputs = _drawn(name, "mild", None, dtype, 2, dim)
    with launch.walk_from(0):
        taken = kernels_of(lambda: evaluate(op, inputs, backend="triton"), device)
    return "fused_chunk_forward" in taken


def _lengths(time: int) -> list[int]:
    return [time // 3, 0, 1, time - time // 3 - 1]


def _drawn(
    name: str, gates: str, lengths: list[int] | None, dtype: torch.dtype, time: int, dim: int
) -> tuple[Op, dict[str, Tensor]]:
    shape: dict[str, Any] = {"batch": 2, "time": time, "lengths": lengths, "dtype": dtype}
    if name == SCAN:
        return selective_scan, sample_scan(
            channels=dim, size=min(16, dim // 2), rate=gates, **shape
        )
    inputs = sample(NAMED[name], key_dim=dim, value_dim=dim, gates=gates, **shape)
    return linear_attention, inputs


def _expected(op: Op, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    # The gradient of the outputs is drawn on the CPU; the ops move it with the loss.
    return evaluate(_on_cpu(op, "reference"), inputs, dtype=torch.float64)


def agreement(
    op: Op,
    inputs: dict[str, Tensor],
    tolerance: float,
    expected: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Hold the Triton backend of an op against the reference, itself, and the arrow of time.

    Args:
        op: which.
        inputs: its tensors.
        tolerance: relative RMS error that is still right.
        expected: what the reference makes of them, where it is known.
    """
    expected = expected or _expected(op, inputs)
    found, again = (evaluate(_on_cpu(op, "triton"), inputs) for _ in range(2))
    errors = {name: relative_rms(found[name].cpu(), expected[name].cpu()) for name in expected}
    return {
        "errors": errors,
        "wrong": {n: e for n, e in errors.items() if not e <= tolerance},
        "same_bits_twice": all(torch.equal(found[name], again[name]) for name in found),
        "causal": _causal(op, inputs),
    }


def _on_cpu(op: Op, backend: str) -> Op:
    def run(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        o, state = op(**arguments, backend=backend)
        assert state is not None
        return o.cpu(), state.cpu()

    return run


def _causal(op: Op, inputs: dict[str, Any]) -> bool:
    """Whether a change of the second half leaves the first half's outputs bit for bit."""
    changed: dict[str, Any] = {name: x.clone() for name, x in inputs.items()}
    names = ("u", "delta", "B", "C") if "u" in inputs else ("q", "k", "v")
    half = inputs[names[0]].shape[1] // 2
    for name in names:
        changed[name][:, half:] *= 0.5
    with torch.no_grad():
        first, second = (op(**tensors, backend="triton")[0] for tensors in (inputs, changed))
    return torch.equal(first[:, :half], second[:, :half])


def _is_bad(row: dict[str, Any]) -> bool:
    agrees = not row.get("wrong") and row.get("causal", True) and row.get("same_bits_twice", True)
    return not agrees or "error" in row


def _where(row: dict[str, Any]) -> str:
    names = ("form", "dtype", "gates", "subject", "size", "pass", "backend")
    flags = [name for name in ("packed", "walk") if row.get(name)]
    return " ".join([*(str(row[name]) for name in names if name in row), *flags])


def _line(row: dict[str, Any]) -> str:
    word = "BAD" if _is_bad(row) else "ok "
    unsteady = "" if row["same_bits_twice"] else " differs from run to run"
    early = "" if row["causal"] else " sees the future"
    worst = max(row["errors"].values())
    return f"{word} {_where(row)}: worst {worst:.1e} {row['wrong'] or ''}{unsteady}{early}"


# ------------------------------------------------------------------------------------- sanitizer


def launch_each(device: torch.device) -> None:
    """Launch every kernel: forward, backward and a decode step, at sizes that fill no block."""
    scan = (SCAN, torch.float32, 20)
    for (name, dtype, dim), walkers in (*itertools.product(ONCE, (0, NEVER)), (scan, 0)):
        for steps in (70, 1):
            op, inputs = _drawn(name, "mild", None, dtype, steps, dim)
            inputs = {n: x.to(device) for n, x in inputs.items()}
            with launch.walk_from(walkers), torch.set_grad_enabled(steps > 1):
                if steps > 1:
                    evaluate(op, inputs, backend="triton")
                else:
                    op(**inputs, backend="triton")
    x, weight = torch.randn(2, 37, 20, device=device), torch.randn(20, 4, device=device)
    evaluate(causal_conv1d, {"x": x, "weight": weight}, backend="triton")


def sanitize(dry: bool) -> int:
    """Run ``launch_each`` under each of ``SANITIZERS``; return the first exit status but 0."""
    tool = shutil.which("compute-sanitizer") or "compute-sanitizer"
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", "1", "--target-processes", "all"]
        command += [sys.executable, __file__, "once"]
        print(" ".join(command), flush=True)
        if dry:
            continue
        # Each tensor its own allocation, so that a read beyond one is a read beyond memory.
        status = subprocess.run(
            command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, check=False
        ).returncode
        if status:
            return status
    return 0


# --------------------------------------------------------------------------------------- tuning


def candidates(kernel: str, shipped: Config) -> list[Config]:
    """Return the configurations that the sweep tries for a kernel: the neighbours of the shipped one.

    Blocks of half and twice the size, then other warps and stages: about a dozen, as each has to be
    compiled. A block that must hold all of K stays.
    """
    scan = kernel.startswith("scan")

    def near(size: int) -> list[int]:
        others = (half for half in (size // 2, 2 * size) if (8 if scan else 16) <= half <= 128)
        return [size, *others]

    keys = [shipped.keys] if shipped.keys > 64 else near(shipped.keys)
    blocks = itertools.product(keys, near(shipped.values))
    found = [dataclasses.replace(shipped, keys=k, values=v) for k, v in blocks]
    for warps, stages in itertools.product((4, 8), (1,) if scan else (1, 2, 3)):
        found.append(dataclasses.replace(shipped, warps=warps, stages=stages))
    return [config for config in dict.fromkeys(found) if config != shipped]


def kernels_of(call: Callable[[], object], device: torch.device) -> dict[str, Config]:
    """Return the kernels that a call launches, by name, with their blocks; runs none of them."""
    found = {}

    def note(kernel: Any, config: Config, *_: Any) -> None:
        found[kernel.__name__.removesuffix("_kernel")] = config

    with launch.record(launch.device_class(device), note):
        call()
    return dict(sorted(found.items()))


def tuned(ledger: Ledger) -> list[tuple[str, str, Config]]:
    """Return (form, kernel, shipped blocks) of all that ``tune`` knows: the forms of ``bench``."""
    size = gpu_bench.SIZES[0] if ledger.device.type == "cuda" else gpu_bench.TINY[0]
    found, seen = [], set()
    for name in gpu_bench.BENCHED:
        subject = gpu_bench.SUBJECTS[name]
        inputs = subject.draw(size, ledger.device)
        call = gpu_bench.call_of(subject.contestants["triton"], inputs, "forward+backward")
        for kernel, config in kernels_of(call, ledger.device).items():
            key = (kernel, *_family(name))
            if key not in seen:
                found.append((name, kernel, config))
            seen.add(key)
    return found


def _family(name: str) -> tuple[bool, bool, bool, bool]:
    """Return what of a form the table of ``launch.py`` tells apart."""
    delta = name.startswith("delta")
    return delta, name == "delta", name.endswith("vector"), name.endswith("outer")


def tune(ledger: Ledger, name: str, kernel: str, tried: list[Config], rounds: int) -> None:
    """Add the best configuration of one kernel of a form, the others as they are shipped."""
    device = ledger.device
    size = gpu_bench.SIZES[0] if device.type == "cuda" else gpu_bench.TINY[0]
    subject = gpu_bench.SUBJECTS[name]
    ours = subject.contestants["triton"]

    def rows() -> Iterator[dict[str, Any]]:
        sets = [subject.draw(size, device) for _ in range(gpu_bench.ROTATED_INPUTS)]
        calls = [gpu_bench.call_of(ours, inputs, "forward+backward") for inputs in sets]

        def timed() -> float:
            return gpu_bench.milliseconds({"it": calls}, rounds, device)["it"]

        shipped, found = timed(), []
        for config in tried:
            try:
                with launch.override(kernel, config):
                    found.append((timed(), config))
            except gpu_bench.FAILURES:
                # Too much shared memory or too many registers: no candidate here.
                continue
        best, config = min(found, key=lambda pair: pair[0])
        row = {"form": name, "kernel": kernel, "shipped_ms": shipped, "best_ms": best}
        line = f'"{kernel}": {config},  # {name}: {best:.3f} ms, shipped {shipped:.3f}'
        print(line, flush=True)
        yield {**row, "config": dataclasses.asdict(config)}

    ledger.attempt(f"{name} {kernel}", rows)


# ----------------------------------------------------------------------------------- command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options; what cannot be run here or names nothing is refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["sanitize", "once", "correctness", "bench", "tune"])
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    parser.add_argument("--form", nargs="+", help="some forms or subjects instead of the usual")
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each contestant")
    parser.add_argument("--time", type=int, default=777, help="T of the correctness runs")
    parser.add_argument("--dim", type=int, default=128, help="K and V of the correctness runs")
    parser.add_argument("--budget", type=float, help="seconds, after which nothing is begun")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the compiling")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny, interpreted")
    options = parser.parse_args(arguments)
    usual = {"correctness": CHECKED, "bench": gpu_bench.BENCHED, "tune": gpu_bench.BENCHED}
    known = CHECKED if options.what == "correctness" else tuple(gpu_bench.SUBJECTS)
    options.form = options.form or list(usual.get(options.what, ()))
    for name in options.form:
        if name not in known:
            parser.error(f"unknown form {name!r}; {options.what} knows {', '.join(known)}")
    if options.what in usual and options.out is None:
        parser.error(f"{options.what} needs --out, a folder for its JSON")
    if options.dry_run:
        options.rounds, options.time, options.dim = 1, 7, 4
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--dry-run needs TRITON_INTERPRET=1")
    elif not torch.cuda.is_available():
        parser.error("no GPU here; add --dry-run and TRITON_INTERPRET=1 to try the script itself")
    return options


def in_parts(
    words: list[str], parts: int, jobs: int, folder: Path, deadline: float
) -> Iterator[Path]:
    """Run a section in ``parts`` processes, ``jobs`` at a time; yield their folders as they end."""
    # What they find for baselines' kernels while they disturb each other must not be kept.
    inherited = {**os.environ, "FLA_CACHE_RESULTS": "0"}

    def run(index: int) -> Path:
        out = folder / f"part-{index}"
        left = deadline - time.monotonic()
        part = ["--part", str(index), str(parts), "--jobs", "1", "--out", str(out)]
        limit = [] if left == float("inf") else ["--budget", str(left)]
        command = [sys.executable, __file__, *words, *part, *limit]
        subprocess.run(command, env=inherited, check=False)
        return out

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(run, range(parts))


def run_section(options: argparse.Namespace, ledger: Ledger) -> None:
    """Do one of the three sections that write rows, or this process's part of it."""
    index, parts = options.part
    rounds = options.rounds if parts == 1 else 1
    if options.what == "correctness":
        dtypes = DTYPES[:1] if options.dry_run else DTYPES
        names = options.form[index::parts]
        correctness(ledger, names, options.time, options.dim, dtypes)
    elif options.what == "bench":
        reached = gpu_bench.limits(ledger.device)
        print(reached, flush=True)
        ledger.rows.append(reached)
        # Sizes outside: the one with goals is done for every subject before time runs out.
        names: list[str] = options.form[index::parts]
        for size, name in itertools.product(gpu_bench.sizes(ledger.device), names):

            def rows(name: str = name, size: gpu_bench.Size = size) -> Iterator[dict[str, Any]]:
                for row in gpu_bench.bench(name, size, ledger.device, rounds, reached):
                    print(gpu_bench.line(row), flush=True)
                    yield row

            ledger.attempt(f"{name} {'x'.join(map(str, size))}", rows)
    else:
        found = [each for each in tuned(ledger) if each[0] in options.form]
        for name, kernel, config in found[index::parts]:
            tried = candidates(kernel, config)
            tune(ledger, name, kernel, tried[:2] if options.dry_run else tried, rounds)


def main(arguments: list[str] | None = None) -> int:
    """Run one of them; return 1 if something disagrees."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parse(words)
    device = torch.device("cpu" if options.dry_run else "cuda")
    torch.manual_seed(0)
    if options.what == "sanitize":
        return sanitize(options.dry_run)
    if options.what == "once":
        launch_each(device)
        return 0
    deadline = time.monotonic() + (float("inf") if options.budget is None else options.budget)
    ledger = Ledger(options.out / f"{options.what}.json", device, deadline)
    if options.jobs > 1:
        # Where the parts are only to compile, half of the time is left for what they prepare.
        checking = options.what == "correctness"
        until = deadline if checking else 0.5 * (time.monotonic() + deadline)
        parts = len(options.form) if checking else options.jobs
        with tempfile.TemporaryDirectory() as folder:
            for part in in_parts(words, parts, options.jobs, Path(folder), until):
                if checking:
                    ledger.take(part / "correctness.json")
                    ledger.write()
        if checking:
            return ledger.summary()
    run_section(options, ledger)
    ledger.write()
    return ledger.summary()


if __name__ == "__main__":
    sys.exit(main())
