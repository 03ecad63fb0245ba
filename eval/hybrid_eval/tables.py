"""Tables of a report: task by length, effective context length, subjects; also as CSV and LaTeX."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .pictures import human_tokens
from .report_figures import Record, named
from .text.tasks import NAMES, RULER, RULER2

# columns of figures after the model's name that fit on a page of 1,200 pixels
PAGE_COLUMNS = 6
# number of characters that fit on it, and the width of a column gap in characters
PAGE_LETTERS, _GAP = 118, 3
# Llama 2 7B at 4k tokens: the score by which RULER calls a length effective (arXiv 2404.06654, table 3)
RULER_THRESHOLD = 0.856
# share of a model's score at its shortest length that a length must keep
OWN_THRESHOLD = 0.85


@dataclass
class Table:
    """Rows of text below headings; a heading is (words, note)."""

    title: str
    headings: list[tuple[str, str]]
    rows: list[list[str]]
    note: str = ""

    @property
    def file(self) -> str:
        """File name without its ending."""
        return re.sub(r"[^a-z0-9]+", "_", self.title.lower()).strip("_")

    def parts(self, columns: int = PAGE_COLUMNS) -> list["Table"]:
        """Split into tables that fit on a page, each with the first column."""
        wide = len(self.headings) - 1
        # as few parts as possible, of about equal numbers of columns
        count = max(1, -(-wide // columns))
        while count < wide and self._widest(-(-wide // count)) > PAGE_LETTERS:
            count += 1
        if count == 1:
            return [self]
        size = -(-wide // count)
        return [
            Table(
                self.title if start == 1 else "",
                [self.headings[0], *self.headings[start : start + size]],
                [[row[0], *row[start : start + size]] for row in self.rows],
                self.note if start + size > wide else "",
            )
            for start in range(1, wide + 1, size)
        ]

    def _widest(self, size: int) -> int:
        """Return the letters of the widest line, if the table is cut after every ``size`` columns."""
        letters = [
            max(
                [len(row[i]) for row in self.rows]
                + [len(word) for word in f"{head} {note}".split()]
            )
            for i, (head, note) in enumerate(self.headings)
        ]
        # a long first column is wrapped
        first = min(letters[0], 24)
        return max(
            first + sum(n + _GAP for n in letters[start : start + size])
            for start in range(1, len(letters), size)
        )

    def csv(self) -> str:
        """Return the table as comma-separated values."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([f"{words} ({note})" if note else words for words, note in self.headings])
        writer.writerows(self.rows)
        return buffer.getvalue()

    def latex(self) -> str:
        """Return the table as LaTeX, for the package booktabs."""
        align = "l" + "r" * (len(self.headings) - 1)
        lines = [[words for words, _ in self.headings], *self.rows]
        head, *body = [" & ".join(map(latex_text, line)) + r" \\" for line in lines]
        inside = [r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        return "\n".join([rf"\begin{{tabular}}{{{align}}}", *inside, r"\end{tabular}", ""])


_LATEX = {
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    # at the beginning of a row it would be an argument of the line end
    "[": "{[}",
    "]": "{]}",
}


def latex_text(text: str) -> str:
    """Return a text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(c, c) for c in text)


def by_length(result: Record) -> dict[int, float]:
    """Return the mean score of a task at each length; empty for a task without lengths."""
    found: dict[int, list[float]] = {}
    for cell in result.get("cells", ()):
        if "length" in cell and "accuracy" in cell:
            found.setdefault(cell["length"], []).append(cell["accuracy"])
    return {length: sum(values) / len(values) for length, values in sorted(found.items())}


def _lengths(results: Record) -> list[int]:
    return sorted(
        {
            length
            for model in results["models"]
            for result in model["results"].values()
            for length in by_length(result)
        }
    )


def length_table(results: Record) -> Iterator[Table]:
    """Yield the table of every task at every length."""
    lengths = _lengths(results)
    if not lengths:
        return
    rows = []
    for model in results["models"]:
        for task, result in model["results"].items():
            scores = by_length(result)
            if scores:
                cells = [f"{scores[at]:.3f}" if at in scores else "-" for at in lengths]
                rows.append([f"{model['name']}: {named(results, task)}", *cells])
    headings = [("task", ""), *((human_tokens(length), "tokens") for length in lengths)]
    yield Table("Score by length", headings, rows, "Means over depths where a task has them.")


def weighted(scores: Sequence[float], *, rising: bool) -> float:
    """Return the mean with weights that increase (or decrease) linearly with the index of the
    length.
    """
    weights = range(1, len(scores) + 1) if rising else range(len(scores), 0, -1)
    return sum(w * s for w, s in zip(weights, scores, strict=True)) / sum(weights)


def effective(scores: dict[int, float], threshold: float) -> int | None:
    """Return the largest length up to which every score reaches a threshold."""
    found = None
    for length, score in sorted(scores.items()):
        if score < threshold:
            break
        found = length
    return found


# beginning of the tasks' names, name of the suite, number of its tasks
_SUITES = (
    ("ruler_", "RULER", len(RULER)),
    ("ruler2_", "RULER v2", len(RULER2)),
    ("long_", "long_...", len(RULER)),
)


class SuiteMeans(NamedTuple):
    """Mean over a suite's tasks at each length that all of them have, of how many tasks of it."""

    name: str
    means: dict[int, float]
    ran: int
    tasks: int


def suites(record: Record) -> Iterator[SuiteMeans]:
    """Yield RULER's tasks of a model, RULER v2's, and RULER's on other material."""
    for prefix, name, tasks in _SUITES:
        scores = {
            task: by_length(result)
            for task, result in record["results"].items()
            if task.startswith(prefix) and task in NAMES and by_length(result)
        }
        if scores:
            common = sorted(set.intersection(*map(set, scores.values())))
            means = {at: sum(s[at] for s in scores.values()) / len(scores) for at in common}
            if means:
                yield SuiteMeans(name, means, len(scores), tasks)


def context_table(results: Record) -> Iterator[Table]:
    """Yield means over RULER's tasks, weighted means, and the effective context length."""
    rows = []
    for model in results["models"]:
        for name, means, count, tasks in suites(model):
            scores = list(means.values())
            own = OWN_THRESHOLD * means[min(means)]
            lengths = [effective(means, RULER_THRESHOLD), effective(means, own)]
            rows.append(
                [
                    f"{model['name']}: {name}",
                    f"{count} of {tasks}",
                    f"{sum(scores) / len(scores):.3f}",
                    f"{weighted(scores, rising=True):.3f}",
                    f"{weighted(scores, rising=False):.3f}",
                    *("none" if found is None else human_tokens(found) for found in lengths),
                ]
            )
    if rows:
        headings = [
            ("tasks", ""),
            ("run", "tasks"),
            ("mean", "over lengths"),
            ("weighted", "long lengths more"),
            ("weighted", "short lengths more"),
            ("effective length", f"score >= {RULER_THRESHOLD}"),
            ("effective length", f"score >= {OWN_THRESHOLD:.0%} of the shortest length's"),
        ]
        note = (
            "Effective: the longest length up to which every mean reaches the threshold; 0.856 is "
            "Llama 2 7B at 4k tokens on all 13 tasks, as RULER publishes it."
        )
        yield Table("Effective context length", headings, rows, note)


def subject_tables(results: Record) -> Iterator[Table]:
    """Yield, for each multiple-choice task, accuracy by subject and model."""
    tasks = dict.fromkeys(
        task
        for model in results["models"]
        for task, result in model["results"].items()
        if len(result.get("subjects", ())) > 1
    )
    for task in tasks:
        models = [m for m in results["models"] if "subjects" in m["results"].get(task, {})]
        subjects = {
            name: entry["n"]
            for m in models
            for name, entry in m["results"][task]["subjects"].items()
        }

        def cell(model: Record, subject: str, task: str = task) -> str:
            entry: dict[str, Any] | None = model["results"][task]["subjects"].get(subject)
            return "-" if entry is None else f"{entry['accuracy']:.3f}"

        rows = [
            [f"{subject} ({n})", *(cell(model, subject) for model in models)]
            for subject, n in sorted(subjects.items())
        ]
        headings = [("subject (questions)", ""), *((model["name"], "") for model in models)]
        yield Table(f"{task}: accuracy by subject", headings, rows)


def tables(results: Record) -> list[Table]:
    """Return the tables that are possible for these results."""
    return [*length_table(results), *context_table(results), *subject_tables(results)]
