"""The report: a self-contained HTML file, figures as PNG, and results as JSON."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from .contrast import cheaper_from, comparisons
from .headline import headline, seed_note, terms
from .pictures import human_bytes, human_tokens, to_vectors
from .pool import pooled
from .report_figures import Picture, Record, figures, interval_of, named
from .report_notes import footer, knocked_out, notes, ran
from .sizes import sizes
from .tables import Table, tables


@dataclass
class Column:
    """A column of the table: heading, and function from a model's record to a cell."""

    heading: str
    cell: Callable[[Record], str]
    note: str = ""


PAIRED = (
    *(("models", ""), ("task", ""), ("difference", "95% interval")),
    *(("p", "paired"), ("p (Holm)", "over this table"), ("items", "")),
)


@dataclass
class Page:
    """Content of the HTML template.

    Attributes:
        title: heading of the page.
        lead: summary of the results, at the top of the page.
        terms: terms and definitions.
        pictures: figures; the first follows the lead.
        tables: tables with headings.
        differences: rows of the table of comparisons.
        compared: heading and columns of that table.
        notes: how to read the figures.
        footer: information for reproducing the report.
    """

    title: str
    lead: list[str] = field(default_factory=list)
    terms: list[tuple[str, str]] = field(default_factory=list)
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


def _plain_cell(task: str, key: str) -> Callable[[Record], str]:
    return lambda record: _number(record["results"].get(task, {}).get(key))


def table_columns(results: dict[str, Any]) -> list[Column]:
    """Return the columns of the table, in which a row is a model."""
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
            note = f"{sizes(result)}; 95% interval"
            columns.append(Column(heading, _interval_cell(task), note=note))
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


def build(results: dict[str, Any], title: str) -> Page:
    """Convert the results of :func:``hybrid_eval.evaluate`` to a page; pool seeds of one layout."""
    shown = pooled(results)
    tasks = ran(shown)
    sentences = [headline(shown), seed_note(shown)]
    return Page(
        title=title,
        lead=[sentence for sentence in sentences if sentence],
        terms=list(terms(shown, tasks)),
        tables=[summary_table(shown), *tables(shown)],
        pictures=list(figures(shown)),
        differences=_differences(shown),
        notes=[*notes(tasks), *knocked_out(results["models"])],
        footer=footer(results),
    )


def render(page: Page) -> str:
    """Return the page as self-contained HTML."""
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
    """Write report.html, results.json, figures as PNG, SVG and PDF, and tables as CSV and LaTeX.

    Args:
        results: results of :func:``hybrid_eval.evaluate``.
        out: output folder; created if missing.
        title: heading of the page.

    Returns:
        The path of report.html.

    Raises:
        ValueError: the results contain no model.
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
