"""The report: one HTML file that opens from disk, its pictures as PNG, its figures as JSON."""

import base64
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from . import pictures
from .contrast import attention_share, cheaper_from, comparisons, corrected
from .pictures import Point, human_bytes, human_tokens

Record = dict[str, Any]


@dataclass
class Picture:
    """A picture with its file name and caption."""

    file: str
    caption: str
    png: bytes

    @property
    def data_uri(self) -> str:
        """The picture inlined for HTML."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass
class Column:
    """A column of the table: heading, and how a model's record becomes a cell."""

    heading: str
    cell: Callable[[Record], str]
    note: str = ""


@dataclass
class Page:
    """Everything that the template shows."""

    title: str
    columns: list[Column]
    models: list[Record]
    pictures: list[Picture] = field(default_factory=list)
    differences: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    footer: list[tuple[str, str]] = field(default_factory=list)


def tasks_on(results: dict[str, Any], axis: str) -> list[str]:
    """Return the tasks of an axis that every model has, in the order they were run."""
    models = results["models"]
    return [
        name
        for name, result in models[0]["results"].items()
        if result["axis"] == axis and all(name in model["results"] for model in models)
    ]


def _value(record: Record, task: str) -> tuple[float, float, float]:
    """Return the headline figure of a task with its interval."""
    result = record["results"][task]
    value = result[result["metric"]]
    low, high = result.get("interval") or (value, value)
    # one sample has no interval: draw a point
    return value, value if low is None else low, value if high is None else high


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _interval_cell(task: str) -> Callable[[Record], str]:
    def cell(record: Record) -> str:
        value, low, high = _value(record, task)
        return f"{_number(value)} [{_number(low)}, {_number(high)}]"

    return cell


def table_columns(results: dict[str, Any]) -> list[Column]:
    """Return the columns of the table: one line of it is a model."""
    columns = [Column("model", lambda record: record["name"])]
    if any(record.get("layout") for record in results["models"]):
        columns.append(Column("layout", lambda record: record.get("layout") or "-"))
    columns.append(Column("parameters", lambda record: f"{record['parameters']:,}"))
    for axis in ("retrieval", "reasoning", "language"):
        for task in tasks_on(results, axis):
            metric = results["models"][0]["results"][task]["metric"].replace("_", " ")
            columns.append(Column(f"{task}: {metric}", _interval_cell(task), note="95% interval"))
    if "cost" in results["models"][0]["results"]:
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
                return "-" if tokens is None else f"{tokens:,} tokens"

            columns.append(Column(f"smaller cache than {name} from", cheaper))
    return columns


def _cache(record: Record) -> float | None:
    cost = record["results"].get("cost")
    return None if cost is None else cost["cache_bytes"]


def _context(results: dict[str, Any]) -> int | None:
    cost = results["models"][0]["results"].get("cost")
    return None if cost is None else cost["context"]


def _task_words(results: dict[str, Any], task: str) -> str:
    """Name a task with the settings that a reader must know."""
    result = results["models"][0]["results"][task]
    options = result.get("options", {})
    chosen = ", ".join(f"{key} {value}" for key, value in options.items())
    return f"{task} ({chosen})" if chosen else task


def _contrast(results: dict[str, Any], across: str, up: str, file: str) -> Picture:
    """Draw one task against another, one point per model."""
    models = results["models"]
    points = [
        Point(model["name"], _value(model, across), _value(model, up), _cache(model))
        for model in models
    ]
    metric = models[0]["results"][across]["metric"].replace("_", " ")
    better = "" if metric == "accuracy" else " (lower is better)"
    chance = models[0]["results"][up].get("chance")
    figure = pictures.scatter(
        points,
        x_label=f"{_task_words(results, across)}: {metric}{better}",
        y_label=f"{_task_words(results, up)}: accuracy",
        title=f"{up} against {across}",
        chance=chance,
        context=_context(results),
    )
    caption = (
        f"Accuracy on {up} against {metric} on {across}, one point per model; bars are 95% "
        "intervals, marker area and colour the cache of one sequence."
    )
    return Picture(file, caption, pictures.to_png(figure))


def _against_cache(results: dict[str, Any], task: str) -> Picture:
    points = []
    for model in results["models"]:
        size = float(_cache(model) or 0)
        points.append(Point(model["name"], (size, size, size), _value(model, task), size))
    context = human_tokens(_context(results) or 0)
    figure = pictures.scatter(
        points,
        x_label=f"cache of one sequence at {context} tokens (log scale)",
        y_label=f"{_task_words(results, task)}: accuracy",
        title=f"{task} against memory",
        chance=results["models"][0]["results"][task].get("chance"),
        log_x=True,
    )
    caption = f"Accuracy on {task} (95% intervals) against the measured cache at {context} tokens."
    return Picture("retrieval_vs_cache.png", caption, pictures.to_png(figure))


def _heat_map(results: dict[str, Any], task: str) -> Picture:
    grids = {model["name"]: model["results"][task]["cells"] for model in results["models"]}
    n = results["models"][0]["results"][task]["cells"][0]["n"]
    figure = pictures.heat_maps(grids, title=f"{task}: accuracy by depth and length")
    caption = (
        f"{task}: accuracy for every depth and length, {n} samples per cell; depth 0 is the start."
    )
    return Picture(f"{task}_heatmap.png", caption, pictures.to_png(figure))


def _pictures(results: dict[str, Any]) -> Iterator[Picture]:
    retrieval, language = tasks_on(results, "retrieval"), tasks_on(results, "language")
    # the figures of some of lm-eval's tasks are no accuracies: those are in the table alone
    reasoning = [task for task in tasks_on(results, "reasoning") if _has_chance(results, task)]
    if retrieval and language:
        yield _contrast(results, language[0], retrieval[0], "retrieval_vs_loss.png")
    if retrieval and reasoning:
        yield _two_axes(results, reasoning[0], retrieval[0])
    shares = [attention_share(model) for model in results["models"]]
    if None not in shares and len(set(shares)) > 1:
        for task in [*retrieval[:1], *reasoning[:1]]:
            yield _against_share(results, task)
    for task in retrieval:
        cells = results["models"][0]["results"][task].get("cells")
        if cells and "depth" in cells[0]:
            yield _heat_map(results, task)
    sizes = [_cache(model) for model in results["models"]]
    if retrieval and all(sizes):
        yield _against_cache(results, retrieval[0])
    if "speed" in results["models"][0]["results"]:
        yield from _speeds(results)


def _has_chance(results: dict[str, Any], task: str) -> bool:
    return all("chance" in model["results"][task] for model in results["models"])


def _two_axes(results: dict[str, Any], reasoning: str, retrieval: str) -> Picture:
    """Draw retrieval against reasoning, both corrected for chance."""
    points = [
        Point(
            model["name"],
            corrected(model["results"][reasoning]),
            corrected(model["results"][retrieval]),
            _cache(model),
        )
        for model in results["models"]
    ]
    figure = pictures.scatter(
        points,
        x_label=f"{_task_words(results, reasoning)}: (accuracy - chance) / (1 - chance)",
        y_label=f"{_task_words(results, retrieval)}: above chance",
        title=f"{retrieval} against {reasoning}",
        context=_context(results),
        y_limits=(-0.2, 1.1),
        x_limits=(-0.2, 1.1),
    )
    caption = (
        f"{retrieval} against {reasoning}, both as (accuracy - chance) / (1 - chance) with 95% "
        "Wilson intervals: 0 is a guesser, 1 makes no error."
    )
    return Picture("retrieval_vs_reasoning.png", caption, pictures.to_png(figure))


def _against_share(results: dict[str, Any], task: str) -> Picture:
    points = []
    for model in results["models"]:
        share = attention_share(model) or 0.0
        points.append(Point(model["name"], (share, share, share), _value(model, task)))
    figure = pictures.scatter(
        points,
        x_label="share of layers with full softmax attention",
        y_label=f"{_task_words(results, task)}: accuracy",
        title=f"{task} against attention share",
        chance=results["models"][0]["results"][task].get("chance"),
    )
    caption = f"Accuracy on {task} (95% intervals) against the share of softmax attention layers."
    return Picture(f"{task}_vs_attention_share.png", caption, pictures.to_png(figure))


def _speeds(results: dict[str, Any]) -> Iterator[Picture]:
    first = results["models"][0]["results"]["speed"]
    machine = f"{first['device']}, {first['threads']} thread(s)"
    for phase in ("prefill", "decode"):
        key = f"{phase}_tokens_per_second"
        lines = {
            model["name"]: [(c["length"], c[key]) for c in model["results"]["speed"]["cells"]]
            for model in results["models"]
        }
        figure = pictures.curves(
            lines,
            x_label="length (tokens)",
            y_label="tokens per second",
            title=f"{phase} speed, one sequence, {machine}",
        )
        caption = f"{phase.capitalize()} speed against length: median of {first['repeats']} runs."
        yield Picture(f"{phase}_speed.png", caption, pictures.to_png(figure))


def _differences(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of paired differences."""
    rows = []
    for task, metric, model, reference, found in comparisons(results):
        p = f"{found.p_value:.3f}" if found.p_value >= 0.001 else "< 0.001"
        interval = (
            f"{found.difference:+.3f} [{found.interval.low:+.3f}, {found.interval.high:+.3f}]"
        )
        rows.append([f"{model} - {reference}", f"{task}: {metric}", interval, p, str(found.items)])
    return rows


def _footer(results: dict[str, Any]) -> list[tuple[str, str]]:
    settings, first = results["settings"], results["models"][0]["results"]
    lines = [("seed", str(settings["seed"]))]
    for name, result in first.items():
        if "n" not in result:
            continue
        per_model = [model["results"][name] for model in results["models"]]
        tokens = [r["tokens"] for r in per_model if "tokens" in r]
        words = f"n = {result['n']}"
        if tokens:
            low, high = min(t["min"] for t in tokens), max(t["max"] for t in tokens)
            words += f", {low:,} tokens" if low == high else f", {low:,} to {high:,} tokens"
            words += " per sample (true counts)"
        words += f", {sum(r.get('truncated', 0) for r in per_model)} truncated"
        if result.get("haystack"):
            words += f", text: {result['haystack']}"
        lines.append((name, words))
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
    for task, result in ran.items():
        if "lm_eval" in result:
            found = result["lm_eval"]
            notes.append(
                f"{task}: run by lm-eval {found['version']}, {found['num_fewshot']}-shot, its figure "
                f"{found['metric']}."
            )
    return notes


def build(results: dict[str, Any], title: str) -> Page:
    """Turn the results of :func:`hybrid_eval.evaluate` into a page."""
    ran = results["models"][0]["results"]
    return Page(
        title=title,
        columns=table_columns(results),
        models=results["models"],
        pictures=list(_pictures(results)),
        differences=_differences(results),
        notes=_notes(ran),
        footer=_footer(results),
    )


def render(page: Page) -> str:
    """Return the page as one self-contained HTML text."""
    source = resources.files("hybrid_eval").joinpath("templates/report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source).render(page=page)


def write_report(
    results: dict[str, Any],
    out: str | Path,
    *,
    title: str = "Retrieval, language and memory of each layout",
) -> Path:
    """Write report.html, its pictures as PNG, and results.json.

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
    (folder / "results.json").write_text(
        json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    path = folder / "report.html"
    path.write_text(render(page), encoding="utf-8")
    return path
