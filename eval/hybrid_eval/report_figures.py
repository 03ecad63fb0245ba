"""Figures of a report with captions, from the results of a run."""

import base64
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from . import length_pictures, pictures
from .contrast import aggregate, attention_share
from .pictures import Point, human_tokens

Record = dict[str, Any]
# the source of a task's material is in the footer, not on an axis
_SOURCES = ("path", "examples", "essays", "squad", "hotpot", "words")
_PANELS = 9  # panels per figure
_PIXELS = 130  # pixels of the page per inch of a figure


@dataclass
class Picture:
    """A picture with its file name and caption; with its figure, it can be saved as a vector image."""

    file: str
    caption: str
    png: bytes
    figure: Figure | None = None

    @property
    def width(self) -> int | None:
        """Width in pixels at which all pictures have one font size; None for no width."""
        return None if self.figure is None else round(self.figure.get_figwidth() * _PIXELS)

    @property
    def data_uri(self) -> str:
        """The picture as a data URI for HTML."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def tasks_on(results: dict[str, Any], axis: str) -> list[str]:
    """Return the tasks of an axis that every model has, in the order they were run."""
    models = results["models"]
    return [
        name
        for name, result in models[0]["results"].items()
        if result["axis"] == axis and all(name in model["results"] for model in models)
    ]


def interval_of(record: Record, task: str) -> tuple[float, float, float]:
    """Return the headline figure of a task with its interval."""
    result = record["results"][task]
    value = result[result["metric"]]
    low, high = result.get("interval") or (value, value)
    # one sample has no interval: draw a point
    return value, value if low is None else low, value if high is None else high


def _cache(record: Record) -> float | None:
    cost = record["results"].get("cost")
    return None if cost is None else cost["cache_bytes"]


def _context(results: dict[str, Any]) -> int | None:
    cost = results["models"][0]["results"].get("cost")
    return None if cost is None else cost["context"]


def _task_words(results: dict[str, Any], task: str) -> str:
    """Return the name of a task with its main settings."""
    result = results["models"][0]["results"][task]
    options = result.get("options", {})
    chosen = [f"{k} {v}" for k, v in options.items() if k not in (*_SOURCES, "mode")]
    chosen = [*how(result), *chosen]
    return f"{task} ({', '.join(chosen)})" if chosen else task


def named(results: dict[str, Any], task: str) -> str:
    """Return the name of a task, with its scoring mode."""
    having = (model["results"][task] for model in results["models"] if task in model["results"])
    words = how(next(having))
    return f"{task} ({', '.join(words)})" if words else task


def how(result: Record) -> list[str]:
    """Describe the scoring of a text task, if it differs from the definition of the task.

    RULER's tasks score generated text; the likelihood of the exact answer is another
    figure.
    """
    words = ["forced"] if result.get("mode") == "forced" else []
    template = result.get("chat")
    return [*words, "chat" if template is True else template] if template else words


def _label(words: str) -> str:
    """Wrap the label of an axis to its length."""
    return textwrap.fill(words, 52)


def _contrast(results: dict[str, Any], across: str, up: str, file: str) -> Picture:
    """Draw one task against another, one point per model."""
    models = results["models"]
    points = [
        Point(model["name"], interval_of(model, across), interval_of(model, up), _cache(model))
        for model in models
    ]
    metric = models[0]["results"][across]["metric"].replace("_", " ")
    better = "" if metric == "accuracy" else " (lower is better)"
    chance = models[0]["results"][up].get("chance")
    figure = pictures.scatter(
        points,
        x_label=_label(f"{_task_words(results, across)}: {metric}{better}"),
        y_label=_label(f"{_task_words(results, up)}: accuracy"),
        title=f"{named(results, up)} against {named(results, across)}",
        chance=chance,
        context=_context(results),
    )
    caption = (
        f"Accuracy on {named(results, up)} against {metric} on {named(results, across)}, one point "
        "per model; bars are 95% intervals, marker area and colour the cache of one sequence."
    )
    return Picture(file, caption, pictures.to_png(figure), figure)


def _against_cache(results: dict[str, Any], task: str) -> Picture:
    points = []
    for model in results["models"]:
        size = float(_cache(model) or 0)
        points.append(Point(model["name"], (size, size, size), interval_of(model, task), size))
    context = human_tokens(_context(results) or 0)
    figure = pictures.scatter(
        points,
        x_label=f"cache of one sequence at {context} tokens (log scale)",
        y_label=_label(f"{_task_words(results, task)}: accuracy"),
        title=f"{named(results, task)} against memory",
        chance=results["models"][0]["results"][task].get("chance"),
        log_x=True,
        frontier=len(points) > 1,
    )
    caption = (
        f"Accuracy on {named(results, task)} (95% intervals) against the measured cache at {context} "
        "tokens. The line is the frontier: it joins the models that no other beats in both."
    )
    return Picture("retrieval_vs_cache.png", caption, pictures.to_png(figure), figure)


def _lines(results: dict[str, Any], task: str) -> dict[str, length_pictures.Line]:
    """Return score and interval by length of every model, averaged over depths if any."""
    found = {}
    for model in results["models"]:
        cells: dict[int, list[tuple[float, float, float]]] = {}
        for cell in model["results"].get(task, {}).get("cells", ()):
            if "length" in cell and "accuracy" in cell:
                value = cell["accuracy"]
                low, high = cell.get("interval") or (value, value)
                cells.setdefault(cell["length"], []).append((value, low, high))
        line: list[tuple[float, float, float, float]] = []
        for length, ends in sorted(cells.items()):
            value = sum(v for v, _, _ in ends) / len(ends)
            # cells are independent, so squares of their half-widths are added
            below = math.sqrt(sum((v - low) ** 2 for v, low, _ in ends)) / len(ends)
            above = math.sqrt(sum((high - v) ** 2 for v, _, high in ends)) / len(ends)
            line.append((length, value, max(0.0, value - below), min(1.0, value + above)))
        if len(line) > 1:
            found[model["name"]] = line
    return found


def _length_curves(results: dict[str, Any]) -> Iterator[Picture]:
    """Yield score against length of all tasks with several lengths, nine per figure."""
    tasks = dict.fromkeys(task for model in results["models"] for task in model["results"])
    plots = {task: lines for task in tasks if (lines := _lines(results, task))}
    names = list(plots)
    for start in range(0, len(names), _PANELS):
        part = names[start : start + _PANELS]
        figure = length_pictures.panels(
            {named(results, task): plots[task] for task in part}, title="Accuracy by length"
        )
        caption = (
            "Accuracy by length, mean over depths where a task has them; bands are 95% intervals."
        )
        number = "" if start == 0 else f"_{start // _PANELS + 1}"
        yield Picture(f"accuracy_by_length{number}.png", caption, pictures.to_png(figure), figure)


def _by_position(results: dict[str, Any], task: str) -> Iterator[Picture]:
    """Yield the loss against the position in the window, if there are several buckets."""
    lines = {
        model["name"]: [
            (b["last"], b["loss"]) for b in model["results"][task].get("positions") or ()
        ]
        for model in results["models"]
    }
    if min(map(len, lines.values())) < 2:
        return
    figure = length_pictures.curves(
        lines,
        x_label="position in the window (tokens)",
        y_label="loss (nats per token)",
        title=f"{named(results, task)}: loss by position",
        from_zero=False,
    )
    caption = (
        f"Loss on {named(results, task)} by position: what a model gains from a longer context. Each "
        "point is the mean of the positions since the one before it."
    )
    yield Picture(f"{task}_by_position.png", caption, pictures.to_png(figure), figure)


def _heat_map(results: dict[str, Any], task: str) -> Picture:
    grids = {model["name"]: model["results"][task]["cells"] for model in results["models"]}
    n = results["models"][0]["results"][task]["cells"][0]["n"]
    figure = length_pictures.heat_maps(
        grids, title=f"{named(results, task)}: accuracy by depth and length"
    )
    caption = (
        f"{named(results, task)}: accuracy for every depth and length, {n} samples per cell; "
        "depth 0 is the start."
    )
    return Picture(f"{task}_heatmap.png", caption, pictures.to_png(figure), figure)


def figures(results: dict[str, Any]) -> Iterator[Picture]:
    """Yield the figures that are possible for these results."""
    retrieval, language = tasks_on(results, "retrieval"), tasks_on(results, "language")
    # some tasks of lm-eval have no accuracy; these are only in the table
    reasoning = [task for task in tasks_on(results, "reasoning") if _has_chance(results, task)]
    # naming a letter is symbol binding: it stands for reasoning only where nothing else was run
    reasoning.sort(key=lambda task: task == "mmlu_letters")
    if retrieval and language:
        yield _contrast(results, language[0], retrieval[0], "retrieval_vs_loss.png")
    retrieving = [task for task in retrieval if _has_chance(results, task)]
    if retrieving and reasoning:
        # naming a letter is symbol binding: it counts only where nothing else was run
        meaning = [task for task in reasoning if task != "mmlu_letters"] or reasoning
        yield _two_axes(results, meaning, retrieving)
    sizes = [_cache(model) for model in results["models"]]
    if retrieval and all(sizes):
        yield _against_cache(results, retrieval[0])
    shares = [attention_share(model) for model in results["models"]]
    if None not in shares and len(set(shares)) > 1:
        for task in [*retrieval[:1], *reasoning[:1]]:
            yield _against_share(results, task)
    yield from _length_curves(results)
    for task in language:
        yield from _by_position(results, task)
    for task in retrieval:
        cells = results["models"][0]["results"][task].get("cells")
        if cells and "depth" in cells[0]:
            yield _heat_map(results, task)
    if all("speed" in model["results"] for model in results["models"]):
        yield from _speeds(results)


def _has_chance(results: dict[str, Any], task: str) -> bool:
    return all("chance" in model["results"][task] for model in results["models"])


def _around(values: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Return limits from below the lowest interval (which may be below 0) to above 1."""
    return min(-0.1, *(low - 0.04 for _, low, _ in values)), 1.08


def _axis_words(results: dict[str, Any], tasks: list[str]) -> tuple[str, str]:
    """Return title and label for a group of tasks."""
    if len(tasks) == 1:
        return named(results, tasks[0]), _task_words(results, tasks[0])
    axis = results["models"][0]["results"][tasks[0]]["axis"]
    return axis, f"{axis}, mean of {', '.join(named(results, task) for task in tasks)}"


def _two_axes(results: dict[str, Any], reasoning: list[str], retrieval: list[str]) -> Picture:
    """Draw retrieval against reasoning, each the mean of its tasks, corrected for chance."""
    points = [
        Point(
            model["name"],
            aggregate(model, reasoning),
            aggregate(model, retrieval),
            _cache(model),
        )
        for model in results["models"]
    ]
    across, x_words = _axis_words(results, reasoning)
    up, y_words = _axis_words(results, retrieval)
    figure = pictures.scatter(
        points,
        x_label=_label(f"{x_words}: (accuracy - chance) / (1 - chance)"),
        y_label=_label(f"{y_words}: above chance"),
        title=f"{up} against {across}",
        context=_context(results),
        y_limits=_around([point.y for point in points]),
        x_limits=_around([point.x for point in points]),
    )
    caption = (
        f"{y_words} against {x_words}, both as (accuracy - chance) / (1 - chance) with 95% intervals: "
        "0 is a guesser, 1 makes no error."
    )
    return Picture("retrieval_vs_reasoning.png", caption, pictures.to_png(figure), figure)


def _against_share(results: dict[str, Any], task: str) -> Picture:
    points = []
    for model in results["models"]:
        share = attention_share(model) or 0.0
        points.append(Point(model["name"], (share, share, share), interval_of(model, task)))
    figure = pictures.scatter(
        points,
        x_label="share of layers with full softmax attention",
        x_limits=(-0.06, 1.18),
        y_label=_label(f"{_task_words(results, task)}: accuracy"),
        title=f"{named(results, task)} against attention share",
        chance=results["models"][0]["results"][task].get("chance"),
    )
    caption = (
        f"Accuracy on {named(results, task)} (95% intervals) against the share of softmax attention "
        "layers."
    )
    return Picture(f"{task}_vs_attention_share.png", caption, pictures.to_png(figure), figure)


def _speeds(results: dict[str, Any]) -> Iterator[Picture]:
    first = results["models"][0]["results"]["speed"]
    machine = f"{first['device']}, {first['threads']} thread(s)"
    for phase in ("prefill", "decode"):
        key = f"{phase}_tokens_per_second"
        lines = {
            model["name"]: [(c["length"], c[key]) for c in model["results"]["speed"]["cells"]]
            for model in results["models"]
        }
        figure = length_pictures.curves(
            lines,
            x_label="length (tokens)",
            y_label="tokens per second",
            title=f"{phase} speed, one sequence, {machine}",
        )
        caption = f"{phase.capitalize()} speed against length: median of {first['repeats']} runs."
        yield Picture(f"{phase}_speed.png", caption, pictures.to_png(figure), figure)
