"""``python -m hybrid_eval MODEL [MODEL ...] --out DIR``; ``hybrid eval`` forwards here.

The table is written to standard output, progress bars to standard error. Names and paths are
printed literally: brackets are not markup, and colons are not emoji.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from transformers.utils.logging import disable_progress_bar

from .corpus import load_corpus
from .errors import NotFiniteError, closest
from .merge import merge
from .models import split_name
from .pool import pooled
from .registry import TASKS, Settings
from .report import table_columns, write_report
from .runner import evaluate
from .text.chat import check_template

# function from checkpoints to options by task
Defaults = Callable[[Sequence[str]], Mapping[str, Mapping[str, Any]]]
# upper bound of tokens, samples or rows
_MOST = 10**9


def parse_tokens(word: str) -> int:
    """Read a number of tokens: ``512``, ``4k`` (4096), ``1m``."""
    scale = {"k": 1024, "m": 1024**2}.get(word[-1:].lower(), 1)
    digits = word[:-1] if scale > 1 else word
    if not _is_count(digits):
        raise argparse.ArgumentTypeError(
            f"{word!r} is not a number of tokens from 1 to {_MOST:,}; write 512, 4k or 1m"
        )
    return int(digits) * scale


def _is_count(digits: str) -> bool:
    """Return whether the text is ASCII digits of a plausible number."""
    return digits.isascii() and digits.isdigit() and len(digits) < 13 and 0 < int(digits) <= _MOST


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(parse_tokens(word.strip()) for word in text.split(","))


def _depths(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are not depths; write 0,0.5,1") from error
    if any(not 0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"depths lie in [0, 1], got {text}")
    return values


def _positive(text: str) -> int:
    if not _is_count(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {_MOST:,}")
    return int(text)


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "expected a folder, got an empty name; write . for this one"
        )
    return Path(text)


def _names(text: str) -> list[str]:
    names = [name for name in (part.strip() for part in text.split(",")) if name]
    if not names:
        raise argparse.ArgumentTypeError(f"no name in {text!r}; --list prints the tasks")
    return names


class _Parser(argparse.ArgumentParser):
    """Argument parser that suggests the nearest option for an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Print the message with a suggestion, and exit with status 2."""
        _, unknown, words = message.partition("unrecognized arguments: ")
        if unknown and words.startswith("--"):
            near = closest(words.split()[0].partition("=")[0], self._option_string_actions)
            message += f"; did you mean {near}?" if near else ""
        super().error(message)


def build_parser(prog: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line; ``epilog`` is the end of its help."""
    parser = _Parser(
        prog=prog,
        epilog=epilog,
        description="Measure retrieval, reasoning, held-out loss and memory of causal language "
        "models, and write a report.",
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="checkpoint folder, .gguf, hub name, NAME=PATH")
    add(
        "--out", type=_folder, default=Path("runs/eval"), help="folder of report and cached results"
    )
    add("--tasks", type=_names, help="tasks, separated by commas: ours (see --list) or lm-eval's")
    add("--retrieval", type=_names, help="additional tasks, on the retrieval axis")
    add("--reasoning", type=_names, help="additional tasks, on the reasoning axis")
    add("--lengths", type=_lengths, help="tokens per sample, e.g. 1k,2k,4k")
    add("--depths", type=_depths, help="depths of the needle, e.g. 0,0.5,1")
    add("--limit", type=_positive, help="samples per cell, or in total for tasks without cells")
    add("--seed", type=int, default=0, help="seed of all samples")
    add("--context", type=parse_tokens, default=32768, help="tokens for the size of the cache")
    add("--text", type=Path, help="text for haystacks and held-out loss")
    add("--batch-size", type=_positive, help="rows per forward (default: automatic)")
    add("--tokenizer", help="folder or name of a tokenizer, or 'bytes'")
    add("--dtype", default="auto", help="dtype of the weights: auto, float32, bfloat16, float16")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    add("--trust-remote-code", action="store_true", help="run code of checkpoints")
    add("--allow-longer", action="store_true", help="permit lengths beyond the model's positions")
    add("--chat", action="store_true", help="prompts in the tokenizer's chat template")
    add(
        "--template",
        metavar="NAME",
        help="prompts in RULER's template of that name: meta-llama3, Phi3, jamba ...",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="TASK.OPTION=VALUE",
        help="an option of one task, e.g. --set mqar.pairs=16",
    )
    add(
        "--ablate",
        action="append",
        default=[],
        metavar="attention|linear|LAYERS",
        help="also measure without these token mixers (layers as 0,3); may be repeated",
    )
    add("--mmlu-dir", type=Path, help="your own questions in MMLU's schema (default: the hub's)")
    add("--include-path", type=Path, help="folder of lm-eval YAML files with tasks of your own")
    add(
        "--merge",
        action="store_true",
        help="join the results of earlier runs, whose folders are the arguments, into one report",
    )
    add("--title", help="heading of the report")
    add("--list", action="store_true", help="print the tasks and stop")
    return parser


def parse_options(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parse ``TASK.OPTION=VALUE`` arguments; values are YAML.

    Raises:
        ValueError: an argument of another form, or a value that is not YAML.
    """
    options: dict[str, dict[str, Any]] = {}
    for word in words:
        left, equals, value = word.partition("=")
        task, dot, option = left.partition(".")
        if not (equals and dot and task and option):
            raise ValueError(f"--set takes TASK.OPTION=VALUE, got {word!r}")
        try:
            options.setdefault(task, {})[option] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {word}: the value is not YAML ({error})") from error
        except RecursionError as error:
            raise ValueError(f"--set {left}: the value is nested too deeply") from error
    return options


def _options(
    arguments: argparse.Namespace, defaults: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    given = parse_options(arguments.set)
    options = {
        task: {**defaults.get(task, {}), **given.get(task, {})} for task in {**defaults, **given}
    }
    if arguments.mmlu_dir is not None:
        for form in ("mmlu_letters", "mmlu_cloze"):
            options.setdefault(form, {}).setdefault("path", str(arguments.mmlu_dir))
    return options


class _Bars:
    """Progress bars, one per model and task."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.current: Any = None

    def start(self, model: str, task: str) -> None:
        """Open a bar."""
        self.current = self.progress.add_task(f"{model}  {task}", total=None)

    def advance(self, done: int, total: int) -> None:
        """Advance the bar."""
        self.progress.update(self.current, completed=done, total=total)

    def finish(self, model: str, task: str, *, cached: bool) -> None:
        """Close the bar."""
        row = self.progress.tasks[-1]
        total = row.total or 1
        words = f"{model}  {task}" + ("  (from cache)" if cached else "")
        self.progress.update(self.current, completed=total, total=total, description=words)


def _print_tasks(console: Console) -> None:
    headings = ("task", "axis", "what it measures", "options (--set TASK.OPTION=VALUE)")
    table = Table(*(Column(words, overflow="fold") for words in headings))
    for task in TASKS.values():
        table.add_row(task.name, task.axis, task.words, ", ".join(task.options))
    console.print(table)


def print_table(results: dict[str, Any], console: Console) -> None:
    """Print the table of the report, one column per model; names are wrapped, never truncated."""
    results = pooled(results)
    headings, *rest = table_columns(results)
    models = results["models"]
    names = ["", *(headings.cell(record) for record in models)]
    table = Table(*(Column(words, overflow="fold") for words in names))
    for column in rest:
        heading = f"{column.heading}\n({column.note})" if column.note else column.heading
        table.add_row(heading, *(column.cell(record) for record in models))
    console.print(table)


def _run(arguments: argparse.Namespace, console: Console, defaults: Defaults | None) -> None:
    if arguments.template is not None:
        if arguments.chat:
            raise ValueError("--chat and --template name two templates; give one of them")
        check_template(arguments.template)
    names = [*(arguments.tasks or []), *(arguments.retrieval or []), *(arguments.reasoning or [])]
    settings = Settings(
        lengths=arguments.lengths,
        depths=arguments.depths,
        limit=arguments.limit,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        corpus=None if arguments.text is None else load_corpus(arguments.text),
        context=arguments.context,
        allow_longer=arguments.allow_longer,
        chat=arguments.template or arguments.chat,
    )
    known = {} if defaults is None else defaults([split_name(m)[1] for m in arguments.models])
    # disable transformers' progress bars; one per task is enough
    disable_progress_bar()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bars = Console(stderr=True, markup=False, emoji=False, highlight=False)
    with Progress(*columns, console=bars, disable=not bars.is_terminal) as progress:
        results = evaluate(
            arguments.models,
            list(dict.fromkeys(names)) or None,
            out=arguments.out,
            settings=settings,
            options=_options(arguments, known),
            ablate=arguments.ablate,
            include_path=arguments.include_path,
            axes={
                **dict.fromkeys(arguments.retrieval or (), "retrieval"),
                **dict.fromkeys(arguments.reasoning or (), "reasoning"),
            },
            watcher=_Bars(progress),
            tokenizer=arguments.tokenizer,
            trust_remote_code=arguments.trust_remote_code,
            dtype=arguments.dtype,
            device=arguments.device,
        )
    _report(results, arguments, console)


def _report(results: dict[str, Any], arguments: argparse.Namespace, console: Console) -> None:
    words = {} if arguments.title is None else {"title": arguments.title}
    path = write_report(results, arguments.out, **words)
    print_table(results, console)
    console.print(f"report: {path}", soft_wrap=True)


def _closed_pipe() -> None:
    raise BrokenPipeError


def main(
    argv: Sequence[str] | None = None,
    *,
    prog: str = "hybrid-eval",
    epilog: str | None = None,
    defaults: Defaults | None = None,
) -> int:
    """Run the command line; return the exit status.

    Args:
        argv: arguments; None for those of the process.
        prog: name of the command.
        epilog: end of its help.
        defaults: function from checkpoints to options by task, which ``--set`` overrides.
    """
    parser = build_parser(prog, epilog)
    arguments = parser.parse_args(argv)
    if not arguments.models and not arguments.list:
        parser.error("no model given")
    try:
        console = Console(markup=False, emoji=False, highlight=False)
        console.on_broken_pipe = _closed_pipe  # rich would exit with status 1
        if arguments.list:
            _print_tasks(console)
        elif arguments.merge:
            _report(merge(arguments.models), arguments, console)
        else:
            _run(arguments, console, defaults)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader of the pipe has ended; the report is written already
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except NotFiniteError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = arguments.out / "cache"
        print(f"{prog}: interrupted; finished tasks are kept in {kept}", file=sys.stderr)
        return 130
    return 0
