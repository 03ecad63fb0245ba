"""Time training steps of 400M hybrids and of the nearest transformers models on one GPU.

    python -m hybrid.train.gpu_benchmark --out DIR [--layouts LLLS DDDS MMMS] [--lengths 4096 32768]

Reports tokens per second, peak memory and MFU of whole steps (forward, backward, fused AdamW) in
bfloat16, on random rows that differ between steps, as medians. The MFU of both models uses the
FLOPs of ``hybrid.plan`` for ours. If flash-linear-attention is installed, transformers calls its
kernels. Both models have equal sizes and parameters within 2%, as in ``hybrid.train.benchmark``.
``--dry-run`` runs tiny sizes on a CPU, to test the script only.

Writes DIR/model.json after each model; a model that fails has a row with the error.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hybrid.config.hybrid_config import HybridConfig
from hybrid.modeling.model import HybridForCausalLM
from hybrid.plan import count
from hybrid.train.benchmark import AGREE, PAIRS, Size
from hybrid.train.throughput import PEAK_BF16, training_flops_per_token

PERIOD = 4  # every PERIOD-th layer is softmax
SIDES = ("ours", "transformers")


@dataclass(frozen=True)
class Setup:
    """Sizes of a benchmark.

    Attributes:
        size: sizes of both models.
        layers: number of layers of both models.
        tokens: tokens per step, in rows of one length.
        warm, steps: number of untimed and of timed steps.
        checkpoint_from: minimum row length for gradient checkpointing.
    """

    size: Size
    layers: int
    tokens: int
    warm: int
    steps: int
    checkpoint_from: int


FULL = Setup(Size(1024, 2816, 32000), 24, 32768, 3, 10, 16384)
TINY = Setup(Size(128, 128, 64), 4, 64, 1, 1, 32)


def build(layout: str, side: str, setup: Setup) -> PreTrainedModel:
    """Return one model of a pair, with random weights."""
    mixers, model_type, keys = PAIRS[layout](setup.size.heads)
    if side == "ours":
        shape = {"num_hidden_layers": setup.layers, **setup.size.ours}
        return HybridForCausalLM(HybridConfig(layout=layout, mixers=mixers, **shape))
    softmax = range(PERIOD - 1, setup.layers, PERIOD)
    kinds = ["full_attention" if i in softmax else "linear_attention" for i in range(setup.layers)]
    of_depth = {
        "layer_types": kinds,
        "mlp_only_layers": list(range(setup.layers)),
        "attn_layer_indices": list(softmax),
    }
    keys = {**setup.size.theirs, **keys, "num_hidden_layers": setup.layers}
    keys |= {name: value for name, value in of_depth.items() if name in keys}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys))


def measure(
    layout: str, side: str, length: int, setup: Setup, device: torch.device
) -> dict[str, Any]:
    """Time the steps of one model; return a row of results."""
    torch.manual_seed(0)
    model = build(layout, side, setup)
    model.to(device=device, dtype=torch.bfloat16)  # pyright: ignore[reportArgumentType]
    model.train()
    if length >= setup.checkpoint_from:
        # Renamed in transformers 5.2x; both are non-reentrant by default.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    shape = (max(1, setup.tokens // length), length)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(setup.warm + setup.steps):
        ids = torch.randint(setup.size.vocab_size, shape, device=device)
        _wait(device)
        start = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[setup.warm :])
    row = {"parameters": count(model), "seconds": seconds, "rows": shape[0]}
    row["tokens_per_second"] = shape[0] * length / seconds
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def utilisation(
    row: dict[str, Any], layout: str, length: int, setup: Setup, device: torch.device
) -> float | None:
    """Return the MFU relative to the device's bfloat16 peak; None if the peak is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((peak for known, peak in PEAK_BF16.items() if known in name), None)
    with torch.device("meta"):
        flops = training_flops_per_token(build(layout, "ours", setup).config, length)
    return None if peak is None or flops is None else flops * row["tokens_per_second"] / peak


def rows(
    layouts: Sequence[str], lengths: Sequence[int], setup: Setup, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Measure each layout at each length, our model and transformers' in turn."""
    for layout in layouts:
        for length in lengths:
            for side in SIDES:
                row: dict[str, Any] = {"layout": layout, "length": length, "side": side}
                try:
                    row |= measure(layout, side, length, setup, device)
                    row["mfu"] = utilisation(row, layout, length, setup, device)
                # Continue after a model that runs out of memory or whose kernels fail.
                except (RuntimeError, ValueError, TypeError, ImportError) as error:
                    traceback.print_exc(limit=-3)
                    row["error"] = f"{type(error).__name__}: {error}"[:500]
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                yield row


def line(row: dict[str, Any]) -> str:
    """Format a row as text."""
    text = f"{row['layout']} T={row['length']:6} {row['side']:12}"
    if "error" in row:
        return f"{text} FAILED {row['error']}"
    mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
    memory = f"  {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
    speed = f"{row['tokens_per_second']:12,.0f} tokens/s"
    return f"{text} {row['parameters'] / 1e6:6.0f}M {speed}{memory}{mfu}"


def unequal(found: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each pair whose parameters differ by more than ``AGREE``."""
    sizes: dict[str, dict[str, int]] = {}
    for row in found:
        if "error" not in row:
            sizes.setdefault(row["layout"], {})[row["side"]] = row["parameters"]
    both = {layout: s for layout, s in sizes.items() if len(s) == len(SIDES)}
    return [
        f"{layout}: {s['ours']:,} parameters against {s['transformers']:,}"
        for layout, s in both.items()
        if abs(s["ours"] / s["transformers"] - 1) > AGREE
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a model failed or a pair is not comparable."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON")
    parser.add_argument("--layouts", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 32768])
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny")
    options = parser.parse_args(words)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("device: expected a GPU, got none; try --dry-run to test the script")
    if options.dry_run:
        # If installed, transformers calls its kernels, which do not run on a CPU.
        sys.modules["fla"] = None  # type: ignore[assignment]
    device = torch.device("cpu" if options.dry_run else "cuda")
    setup, lengths = (TINY, [32, 64]) if options.dry_run else (FULL, options.lengths)
    options.out.mkdir(parents=True, exist_ok=True)
    found = []
    run = {"torch": torch.__version__, "transformers": transformers.__version__}
    run["device"] = "CPU: a dry run" if options.dry_run else torch.cuda.get_device_name(device)
    for row in rows(options.layouts, lengths, setup, device):
        found.append(row)
        print(line(row), flush=True)
        text = json.dumps({"run": run, "rows": found, "unequal": unequal(found)}, indent=1)
        (options.out / "model.json").write_text(text, encoding="utf-8")
    for words_ in unequal(found):
        print(f"not comparable: {words_}")
    return 1 if unequal(found) or any("error" in row for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
