"""One search from a configuration to layouts on the frontier."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml

from hybrid.config.options import ConfigError
from hybrid.files import write_text
from hybrid.locks import sole_writer
from hybrid.search import gates, importance, report, supernet
from hybrid.search.bench import (
    IDENTITY,
    SCORES,
    Bench,
    Proposals,
    keep_identity,
    refuse_other_search,
)
from hybrid.search.config import SearchFile
from hybrid.search.placement import Placement, Space
from hybrid.search.scores import Score
from hybrid.terminal import Interrupted

DISTILLATION = "distill.yaml"
METHODS = {
    "importance": importance.propose,
    "supernet": supernet.propose,
    "gates": gates.propose,
}
TRAINED = {
    "mixers": "as they are after `outputs`, without any training for a layout",
    "supernet": "those of the supernet",
}


def search(config: SearchFile) -> dict[str, Any]:
    """Search for the softmax layers that should stay; the same call continues an interrupted one.

    ``config.out`` receives every score (``scores/``), the distilled linear mixers (``mixers/``),
    ``report.json``, ``report.md``, ``layouts.csv``, ``frontier.png`` and ``distill.yaml``, the
    configuration of the printed commands.

    Returns:
        The report, as ``report.json`` holds it.

    Raises:
        ConfigError: the configuration cannot be run here, or the folder holds another search.
        ValueError: the teacher cannot be read, or its layers cannot be replaced.
        Interrupted: Ctrl-C; all scores are kept.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(["a search runs in one process; start it without a launcher"])
    out = Path(config.out)
    with sole_writer(out), torch.random.fork_rng():
        refuse_other_search(out / IDENTITY, config.identity())
        try:
            return _search(config)
        except Interrupted:
            raise
        except KeyboardInterrupt as error:
            done = sum(1 for _ in (out / SCORES).rglob("*.json"))
            raise Interrupted(
                f"interrupted; {done} scores in {out} are kept: run the same command again to resume"
            ) from error


def _search(config: SearchFile) -> dict[str, Any]:
    """Run the methods, score what they propose, and write the report."""
    bench = Bench(config)
    keep_identity(bench.out / IDENTITY, config.identity())  # now that it can be run
    _write_distillation(bench)
    proposals = Proposals(bench.space)
    for count in filter(None, bench.counts):
        proposals.add(f"uniform {count}", bench.space.uniform(count))
        proposals.add(f"last {count}", bench.space.last(count))
    tables: list[report.Table] = []
    for method in config.methods:
        tables += METHODS[method](bench, proposals)
    weights = "supernet" if "supernet" in config.methods else "mixers"
    recall = bench.scorer.retrieval is not None
    points = [
        _point(bench, bench.scorer.score(kept, weights, recall), names)
        for kept, names in proposals.names.items()
    ]
    whole = bench.scorer.score(bench.space.complete, recall=recall)
    points.append({**_point(bench, whole, ["teacher"]), "command": None})
    return report.finish(_report(bench, points, weights, tables), bench.out)


def _point(bench: Bench, score: Score, names: list[str]) -> dict[str, Any]:
    kept = frozenset(score.kept)
    return {
        "layout": bench.space.layout(kept),
        "kept": list(score.kept),
        "softmax_layers": len(kept),
        "cache_bytes": bench.space.cache_bytes(kept),
        "fits": bench.space.fits(kept),
        "loss": score.loss,
        "kl": score.kl,
        "kl_error": score.kl_error,
        **score.recall,
        "methods": names,
        "command": _command(bench, kept),
    }


def _report(
    bench: Bench, points: list[dict[str, Any]], weights: str, tables: list[report.Table]
) -> dict[str, Any]:
    config, rows = bench.config, bench.scorer.rows
    where = config.distill["teacher"]
    teacher = next(where[k] for k in ("gguf_file", "path", "package") if where.get(k))
    return {
        "name": config.name,
        "about": f"Which softmax layers of {teacher} (layout {bench.space.config.layout}) should"
        f" stay, and which become {config.linear}?",
        "budget": _budget_words(bench.space),
        "metrics": list(config.metrics),
        "context": config.context,
        "points": points,
        "tables": tables,
        "weights": weights,
        "footer": f"All layouts are scored with the same linear mixers: {TRAINED[weights]}. Loss and"
        f" KL divergence from the teacher: nats per token on {len(rows)} held-out rows of"
        f" {len(rows[0]['input_ids'])} tokens, +- standard error over rows. Seed {config.seed}.",
    }


def _write_distillation(bench: Bench) -> None:
    """Write the configuration of the printed commands."""
    values = {k: v for k, v in bench.config.distill.items() if k != "output_dir"}
    values["layout"] = bench.space.layout(bench.space.first(bench.layers))
    text = "# Written by `hybrid search`; its commands set layout and output_dir.\n"
    write_text(bench.out / DISTILLATION, text + yaml.safe_dump(values, sort_keys=False, width=100))


def _command(bench: Bench, kept: Placement) -> list[str]:
    """Return the words of the command that distils a placement."""
    layout = bench.space.layout(kept)
    try:
        plain = yaml.safe_load(layout) == layout
    except yaml.YAMLError:
        plain = False
    name = "-".join(map(str, sorted(kept))) or "none"
    place = bench.out / "distilled" / (name if len(name) <= 120 else f"{len(kept)}-layers")
    return [
        *("hybrid", "distill", str(bench.out / DISTILLATION)),
        *(f"layout={layout if plain else json.dumps(layout)}", f"output_dir={place}"),
    ]


def _budget_words(space: Space) -> str:
    """Return the budget as text."""
    if space.most_bytes is None:
        return f"at most {space.most_layers} of {len(space.layers)} layers stay softmax attention"
    return f"a cache of at most {space.most_bytes:,} bytes at {space.context:,} tokens"
