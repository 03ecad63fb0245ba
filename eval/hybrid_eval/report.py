"""The report: one HTML file that opens from disk, its pictures as PNG, its figures as JSON."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from .contrast import cheaper_from, comparisons
from .pictures import human_bytes, human_tokens, to_vectors
from .report_figures import Picture, Record, figures, how, interval_of, named
from .tables import Table, tables


@dataclass
class Column:
    """A column of the table: heading, and how a model's record becomes a cell."""

    heading: str
    cell: Callable[[Record], str]
    note: str = ""


PAIRED = (
    *(("models", ""), ("task", ""), ("difference", "95% interval")),
    *(("p", "paired"), ("p (Holm)", "over this table"), ("items", "")),
)


@dataclass
class Page:
    """Everything that the template shows; `compared` is the heading and columns of `differences`."""

    title: str
    columns: list[Column]
    models: list[Record]
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    differences: list[list[str]] = field(default_factory=list)
    compared: tuple[str, Sequence[tuple[str, str]]] = (
        "Paired differences on identical items",
        PAIRED,
    )
    notes: list[str] = field(default_factory=list)
    footer: list[tuple[str, str]] = field(default_factory=list)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _interval_cell(task: str) -> Callable[[Record], str]:
    def cell(record: Record) -> str:
        if task not in record["results"]:
            return "-"
        value, low, high = interval_of(record, task)
        return f"{_number(value)} [{_number(low)}, {_number(high)}]"

    return cell


def ran(results: dict[str, Any]) -> dict[str, Record]:
    """Return every task of the run with the result of the first model that has it."""
    found: dict[str, Record] = {}
    for model in results["models"]:
        for task, result in model["results"].items():
            found.setdefault(task, result)
    return found


def _plain_cell(task: str, key: str) -> Callable[[Record], str]:
    return lambda record: _number(record["results"].get(task, {}).get(key))


def table_columns(results: dict[str, Any]) -> list[Column]:
    """Return the columns of the table: one line of it is a model."""
    columns = [Column("model", lambda record: record["name"])]
    if any(record.get("layout") for record in results["models"]):
        columns.append(Column("layout", lambda record: record.get("layout") or "-"))
    columns.append(Column("parameters", lambda record: f"{record['parameters']:,}"))
    for axis in ("retrieval", "reasoning", "language"):
        for task, result in ran(results).items():
            if result["axis"] != axis:
                continue
            metric = result["metric"].replace("_", " ")
            heading = f"{named(results, task)}: {metric}"
            columns.append(Column(heading, _interval_cell(task), note="95% interval"))
            for key in result.get("also", ()):
                words = key.removeprefix("accuracy_").replace("_", " ")
                columns.append(Column(f"{named(results, task)}: {words}", _plain_cell(task, key)))
    if all("cost" in model["results"] for model in results["models"]):
        context = results["models"][0]["results"]["cost"]["context"]

        def cost(key: str) -> Callable[[Record], str]:
            return lambda record: human_bytes(record["results"]["cost"][key])

        columns.append(Column(f"cache at {human_tokens(context)}", cost("cache_bytes"), "measured"))
        columns.append(Column("fixed state", cost("fixed_bytes")))
        columns.append(Column("cache per token", cost("bytes_per_token")))
        costs = [model["results"]["cost"] for model in results["models"]]
        largest = max(costs, key=lambda found: found["bytes_per_token"])
        if any(found is not largest for found in costs):
            name = results["models"][costs.index(largest)]["name"]

            def cheaper(record: Record) -> str:
                tokens = cheaper_from(record["results"]["cost"], largest)
                return "-" if tokens is None else f"{tokens:,} token{'' if tokens == 1 else 's'}"

            columns.append(Column(f"smaller cache than {name} from", cheaper))
    return columns


def summary_table(results: dict[str, Any]) -> Table:
    """Return the headline figures: one row is a model."""
    columns = table_columns(results)
    rows = [[column.cell(record) for column in columns] for record in results["models"]]
    return Table("Summary", [(column.heading, column.note) for column in columns], rows)


def _differences(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of paired differences."""
    rows = []
    for task, metric, model, reference, found, p_holm in comparisons(results):
        ps = ["< 0.001" if p < 0.001 else f"{p:.3f}" for p in (found.p_value, p_holm)]
        interval = (
            f"{found.difference:+.3f} [{found.interval.low:+.3f}, {found.interval.high:+.3f}]"
        )
        rows.append(
            [
                f"{model} - {reference}",
                f"{named(results, task)}: {metric}",
                interval,
                *ps,
                str(found.items),
            ]
        )
    return rows


def _shots(shots: Record) -> str:
    """Say how many worked examples the prompts had."""
    used = {int(count): times for count, times in shots["used"].items()}
    if set(used) == {shots["asked"]}:
        return f"{shots['asked']}-shot"
    fewer = ", ".join(f"{times} with {count}" for count, times in used.items())
    return f"{shots['asked']}-shot asked for, fewer where they did not fit or exist: {fewer}"


def _models(models: Sequence[Record]) -> list[tuple[str, str]]:
    """Return a line for each model: dtype, hashes, where it came from."""
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


def _footer(results: dict[str, Any]) -> list[tuple[str, str]]:
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
    "kv_recall": "kv_recall: a phone book that fills the length; one entry is looked up.",
    "heldout": (
        "heldout: real text that was kept out of training; bits per byte of the very text scored."
    ),
    "cost": (
        "cache: every tensor of the cache counted after prefills of two lengths, extended along "
        "that line."
    ),
}


def _notes(ran: dict[str, Any]) -> list[str]:
    notes = [words for task, words in _NOTES.items() if task in ran]
    if any(task.startswith("long_") for task in ran):
        notes.append(
            "long_...: generated as RULER (arXiv 2404.06654) generates, but from other words, texts "
            "and documents than RULER's. These are not RULER scores."
        )
    if any(result.get("mode") == "generate" and "cells" in result for result in ran.values()):
        notes.append(
            "RULER's tasks, ruler_... and long_...: the model writes as many tokens as RULER lets it, "
            "and scores the share of the right answers that its words contain (qa: whether one is "
            "there)."
        )
    if any(result.get("mode") == "forced" for result in ran.values()):
        notes.append(
            "(forced): whether greedy decoding would give exactly the reference answer, scored in one "
            "forward; not comparable with figures of generated answers."
        )
    for task, result in ran.items():
        if "lm_eval" in result:
            found = result["lm_eval"]
            notes.append(
                f"{task}: run by lm-eval {found['version']}, {found['num_fewshot']}-shot, its figure "
                f"{found['metric']}."
            )
    return notes


def _knocked_out(models: Sequence[Record]) -> list[str]:
    """Say which layers of which model were zeroed."""
    notes = []
    for record in models:
        if not record.get("ablate"):
            continue
        gone = ", ".join(f"{b['layer']} ({b['name']})" for b in record["without"])
        notes.append(f"{record['name']}: the output of these layers' mixers is zero: {gone}.")
    return notes


def build(results: dict[str, Any], title: str) -> Page:
    """Turn the results of :func:`hybrid_eval.evaluate` into a page."""
    return Page(
        title=title,
        columns=[],
        models=results["models"],
        tables=[summary_table(results), *tables(results)],
        pictures=list(figures(results)),
        differences=_differences(results),
        notes=[*_notes(ran(results)), *_knocked_out(results["models"])],
        footer=_footer(results),
    )


def render(page: Page) -> str:
    """Return the page as one self-contained HTML text."""
    source = resources.files("hybrid_eval").joinpath("templates/report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source).render(page=page)


def _write_tables(page: Page, folder: Path) -> None:
    """Write every table as CSV and as LaTeX."""
    folder.mkdir(exist_ok=True)
    title, headings = page.compared
    compared = [Table(title, list(headings), page.differences)] if page.differences else []
    for table in [*page.tables, *compared]:
        (folder / f"{table.file}.csv").write_text(table.csv(), encoding="utf-8")
        (folder / f"{table.file}.tex").write_text(table.latex(), encoding="utf-8")


def write_report(
    results: dict[str, Any],
    out: str | Path,
    *,
    title: str = "Retrieval, language and memory of each layout",
) -> Path:
    """Write report.html, results.json, pictures as PNG, SVG and PDF, tables as CSV and LaTeX.

    Args:
        results: what :func:`hybrid_eval.evaluate` returned.
        out: folder to write to; made if it is not there.
        title: heading of the page.

    Returns:
        The path of report.html.

    Raises:
        ValueError: the results hold no model.
    """
    if not results.get("models"):
        raise ValueError("no model in these results, nothing to report")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    page = build(results, title)
    for picture in page.pictures:
        (folder / picture.file).write_bytes(picture.png)
        if picture.figure is not None:
            for kind in ("svg", "pdf"):
                vectors = to_vectors(picture.figure, kind)
                (folder / picture.file).with_suffix(f".{kind}").write_bytes(vectors)
    _write_tables(page, folder / "tables")
    (folder / "results.json").write_text(
        json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    path = folder / "report.html"
    path.write_text(render(page), encoding="utf-8")
    return path
