"""Notes on the tasks of a report, and the footer for reproducing it."""

from collections.abc import Sequence
from typing import Any

from .pictures import human_tokens
from .report_figures import Record, how


def ran(results: dict[str, Any]) -> dict[str, Record]:
    """Return every task of the run with the result of the first model that has it."""
    found: dict[str, Record] = {}
    for model in results["models"]:
        for task, result in model["results"].items():
            found.setdefault(task, result)
    return found


def _shots(shots: Record) -> str:
    """Describe the number of worked examples in the prompts."""
    used = {int(count): times for count, times in shots["used"].items()}
    if set(used) == {shots["asked"]}:
        return f"{shots['asked']}-shot"
    fewer = ", ".join(f"{times} with {count}" for count, times in used.items())
    return f"{shots['asked']}-shot asked for, fewer where they did not fit or exist: {fewer}"


def _models(models: Sequence[Record]) -> list[tuple[str, str]]:
    """Return a line for each model: dtype, hashes, and source."""
    lines = []
    for record in models:
        if record.get("ablate"):
            continue
        parts = [
            record.get("dtype"),
            record.get("fingerprint") and f"hash {record['fingerprint'][:16]}",
            record.get("tokenizer_hash") and f"tokenizer {record['tokenizer_hash'][:16]}",
            record.get("source"),
        ]
        lines.append((record["name"], ", ".join(part for part in parts if part)))
    return lines


def _grid(result: Record) -> str:
    """Return the lengths and depths of a task's cells."""
    cells = [cell for cell in result.get("cells", ()) if "length" in cell]
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells if "depth" in cell})
    words = f", lengths {', '.join(map(human_tokens, lengths))}" if lengths else ""
    return words + (f", depths {', '.join(f'{depth:g}' for depth in depths)}" if depths else "")


def footer(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the information for reproducing a report: seeds, counts, modes, hashes, versions."""
    settings = results["settings"]
    lines = [("seed", str(settings["seed"]))]
    for name, result in ran(results).items():
        if "n" not in result:
            continue
        per_model = [
            model["results"][name] for model in results["models"] if name in model["results"]
        ]
        tokens = [r["tokens"] for r in per_model if "tokens" in r]
        words = ", ".join([f"n = {result['n']}", *how(result)])
        if tokens:
            low, high = min(t["min"] for t in tokens), max(t["max"] for t in tokens)
            words += f", {low:,} tokens" if low == high else f", {low:,} to {high:,} tokens"
            words += " per sample (true counts)"
        words += f", {sum(r.get('truncated', 0) for r in per_model)} truncated"
        words += _grid(result)
        if "shots" in result:
            words += f", {_shots(result['shots'])}"
        if result.get("haystack"):
            words += f", text: {result['haystack']}"
        lines.append((name, words))
    lines += _models(results["models"])
    for entry in results.get("merged", ()):
        lines.append(("merged", f"{entry['path']}, made {entry['created']}"))
    lines.append(("versions", ", ".join(f"{k} {v}" for k, v in results["versions"].items())))
    lines.append(("made", results["created"]))
    return lines


_NOTES = {
    "mmlu_letters": (
        "mmlu_letters: multiple choice by letter, which also tests symbol binding; read it beside "
        "mmlu_cloze, where the model never sees the list of choices."
    ),
    "speed": "speed: one sequence, median of the timed runs after one that is not counted.",
    "mqar": (
        "mqar: multi-query associative recall after Zoology (arXiv 2312.04927); interval over "
        "queries, widened for the correlation of queries within a row."
    ),
    "needle": (
        "needle: a key-value pair hidden in real text, scored teacher-forced in one forward. It is "
        "a test of its own, for models trained on its format, and not a RULER task."
    ),
    "niah_grid": (
        "niah_grid: one sentence with a number hidden in text; every cell has its exact length and "
        "depth. Forced mode counts an answer as right if greedy decoding would give exactly it."
    ),
    "latent_niah": (
        "latent_niah: after NoLiMa (arXiv 2502.05167), with places and names of our own: the needle has "
        "a landmark, the question its city (hops = 2: its country)."
    ),
    "kv_recall": "kv_recall: a phone book that fills the length; one entry is looked up.",
    "heldout": (
        "heldout: real text that was kept out of training; bits per byte of the very text scored."
    ),
    "cost": (
        "cache: every tensor of the cache counted after prefills of two lengths, extended along "
        "that line."
    ),
}


def notes(ran: dict[str, Any]) -> list[str]:
    """Return notes on the figures of the tasks of this run."""
    found = [words for task, words in _NOTES.items() if task in ran]
    if any(task.startswith("long_") for task in ran):
        found.append(
            "long_...: generated as RULER (arXiv 2404.06654) generates, but from other words, texts "
            "and documents than RULER's. These are not RULER scores."
        )
    if any(result.get("mode") == "generate" and "cells" in result for result in ran.values()):
        found.append(
            "RULER's tasks, ruler_... and long_...: the model writes as many tokens as RULER lets it, "
            "and scores the share of the right answers that its words contain (qa: whether one is "
            "there)."
        )
    if any(result.get("mode") == "forced" for result in ran.values()):
        found.append(
            "(forced): whether greedy decoding would give exactly the reference answer, scored in one "
            "forward; not comparable with figures of generated answers."
        )
    for task, result in ran.items():
        if "lm_eval" in result:
            own = result["lm_eval"]
            found.append(
                f"{task}: run by lm-eval {own['version']}, {own['num_fewshot']}-shot, its figure "
                f"{own['metric']}."
            )
    return found


def knocked_out(models: Sequence[Record]) -> list[str]:
    """Describe the knocked-out layers of each model."""
    notes = []
    for record in models:
        if not record.get("ablate"):
            continue
        gone = ", ".join(f"{b['layer']} ({b['name']})" for b in record["without"])
        notes.append(f"{record['name']}: the output of these layers' mixers is zero: {gone}.")
    return notes
