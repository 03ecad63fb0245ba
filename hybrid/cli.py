"""The command line: `hybrid quickstart | train | data | ablate | eval | import | export | plan | ...`.

The only module that knows all three packages; each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.imports import add_option, import_user_code
from hybrid.terminal import console, guarded, text_column

if TYPE_CHECKING:
    from hybrid.ablate.statistics import Score


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status (2 for what the user can mend)."""
    return guarded("hybrid", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    own = argparse.ArgumentParser(prog="hybrid", add_help=False, allow_abbrev=False)
    add_option(own)  # of every command
    given, arguments = own.parse_known_args(argv)
    try:
        import_user_code(given.imports)
    except ValueError as error:
        print(f"hybrid: {error}", file=sys.stderr)
        return 2
    if arguments[:1] == ["eval"]:  # its options are those of `python -m hybrid_eval`
        return _eval(arguments[1:])
    parser = _parser(own)
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes no positional arguments after an option; overrides may stand anywhere
    if any(word.startswith("-") or "=" not in word for word in rest) or (
        rest and not hasattr(parsed, "overrides")
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return guarded(f"hybrid {parsed.command}", lambda: _refusals(parsed))


def _refusals(parsed: argparse.Namespace) -> int:
    """Run a parsed command; what the user or the system refuses is one line."""
    try:
        return parsed.run(parsed)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"hybrid {parsed.command}: {error}", file=sys.stderr)
        return 2


def _parser(every: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """All commands; the options of `every` are taken out before, and are here for `--help`."""
    parser = argparse.ArgumentParser(
        prog="hybrid", description="Hybrid language models from one layout string.", parents=[every]
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    quick = command("quickstart", _quickstart, "train three layouts, compare them, write a report")
    quick.add_argument("--out", default="runs/quickstart", help="folder for all that comes out")
    quick.add_argument("--config", help="training config (default: configs/quickstart.yaml)")
    quick.add_argument("--layouts", default="LLLS,SSSS,LLLL", help="the first is the hybrid")
    quick.add_argument("--seeds", default="0", help="e.g. 0,1,2: every layout once per seed")
    quick.add_argument("overrides", nargs="*", metavar="key=value", help="for the training config")

    train = command("train", _train, "train a model by a YAML file, through accelerate launch")
    train.add_argument("config", help="e.g. configs/quickstart.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. model.layout=SSSL")
    train.add_argument("--config_file", help="an accelerate config, e.g. of configs/accelerate/")

    compare = command(
        "ablate", _ablate, "train a baseline and changes to it, and say what is noise"
    )
    compare.add_argument("config", help="e.g. configs/ablations/quick.yaml")
    compare.add_argument("--dry-run", action="store_true", help="print the runs and stop")
    compare.add_argument("--config_file", help="an accelerate config; default: this process")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. seeds=[0,1,2]")

    data = command("data", _data, "prepare training data ahead")
    steps = data.add_subparsers(dest="step", required=True, metavar="STEP")
    words = "tokenise text into shards that training memory-maps"
    prepare = steps.add_parser("prepare", help=words, description=words)
    prepare.add_argument("source", help="stdlib, a file, folder or 'pattern', or a hub data set")
    prepare.add_argument("out", help="folder to write; name it under `data:` of a training config")
    prepare.add_argument(
        "--tokenizer", default="bytes", help="bytes, or any Hugging Face tokenizer"
    )
    prepare.add_argument("--shard-tokens", default="100m", help="tokens of a shard, e.g. 4096k")
    prepare.add_argument("--text-key", default="text", help="column that holds the text")
    prepare.add_argument("--split", default="train", help="of a hub data set; stdlib: also heldout")
    prepare.add_argument("--name", help="configuration of a hub data set")
    prepare.add_argument("--streaming", action="store_true", help="read without storing the source")

    # for the list of commands; `main` hands its arguments on before they are parsed here
    command("eval", lambda parsed: _eval([]), "measure models; see `hybrid eval --help`")

    cost = command("plan", _plan, "print parameters, FLOPs per token and cache bytes of a config")
    cost.add_argument("config", help="a YAML file, a checkpoint folder or a config.json")
    cost.add_argument("--context", default="8k", help="tokens, e.g. 8192, 32k, 1m")
    cost.add_argument("--dtype", default="bfloat16", help="of weights and keys")
    cost.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. model.layout=SSSL")

    reading = command("import", _import, "convert a published checkpoint into a layout")
    reading.add_argument(
        "source", metavar="PATH", help="a folder of safetensors, a hub name, or a .gguf file"
    )
    reading.add_argument("out", metavar="OUT", help="folder to write; must be new or empty")
    reading.add_argument(
        "--dtype", help="of the weights; default: as they are (quantized: bfloat16)"
    )
    reading.add_argument("--layout", help="another one, e.g. SSSL: new mixers start from the old")
    reading.add_argument("--no-mtp", action="store_true", help="leave out its MTP modules")
    reading.add_argument("--max-shard-size", default="5GB", help="of one file, e.g. 500MB")

    writing = command("export", _export, "write a model as a published architecture's checkpoint")
    writing.add_argument("source", metavar="PATH", help="folder of a model of ours")
    words = "folder to write; must be new or empty; may be left out with --gguf"
    writing.add_argument("out", metavar="OUT", nargs="?", help=words)
    writing.add_argument(
        "--gguf", metavar="FILE", help="GGUF file to write, by llama.cpp's converter"
    )
    words = "e.g. qwen3_next; default: the one it was imported from, else the one that fits"
    writing.add_argument("--as", dest="family", help=words)
    writing.add_argument("--max-shard-size", default="5GB", help="of one file, e.g. 500MB")

    same = command("parity", _parity, "compare greedy tokens and log-probabilities with a server's")
    same.add_argument("model", metavar="MODEL", help="folder of a hybrid, or of an export")
    same.add_argument("--server", required=True, help="mlx, or the URL of an OpenAI-like server")
    same.add_argument("--python", help="interpreter that has the server; default: this one")
    same.add_argument("--tokens", type=int, default=32, help="to decode after each prompt")

    student = command(
        "distill", _distill, "teach a model with another layout what the original does"
    )
    student.add_argument("config", help="e.g. configs/distill/smollm2.yaml")
    student.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. layout=SSSL")

    stack = command("layout", _layout, "print a layout as a table")
    stack.add_argument("layout", help='e.g. "LLLS", "(L7S)10", "[MS]4", "M-M-M*-"')
    stack.add_argument("--ffn", default="-", help="feed-forward pattern after each mixer")
    stack.add_argument("--layers", type=int, help="depth to fill")

    letters = command("mixers", _mixers, "print what each letter of a layout stands for")
    letters.add_argument("name", nargs="?", help="a letter or a name: print its options")
    return parser


def _quickstart(arguments: argparse.Namespace) -> int:
    from hybrid.quickstart import quickstart

    return quickstart(
        out=arguments.out,
        config=arguments.config,
        layouts=_words(arguments.layouts, "--layouts"),
        seeds=_numbers(arguments.seeds, "--seeds"),
        overrides=arguments.overrides,
    )


def _train(arguments: argparse.Namespace) -> int:
    from hybrid.quickstart import shown, training_command
    from hybrid.train.launch import launch

    engine = ["--config_file", arguments.config_file] if arguments.config_file else []
    command = training_command(arguments.config, arguments.overrides, engine)
    print(shown(command), file=sys.stderr, flush=True)
    return launch(command[3:])


def _eval(argv: Sequence[str]) -> int:
    import hybrid  # noqa: F401  (registers the model with transformers)
    from hybrid_eval.cli import main as evaluate

    return evaluate(argv, prog="hybrid eval")


def _ablate(arguments: argparse.Namespace) -> int:
    from hybrid.ablate import load_ablation, plan_runs, run_design, summarise, write_report
    from hybrid.ablate.runs import refuse_other_runs, train_by, train_here
    from hybrid.ablate.table import print_design, print_report
    from hybrid.files import write_text

    tasks, screen = _Tasks(), console()
    design = plan_runs(load_ablation(arguments.config, arguments.overrides, tasks))
    refuse_other_runs(design)
    print_design(design, screen)
    if arguments.dry_run:
        return 0
    engine = arguments.config_file
    measured = run_design(design, tasks, train_by(engine) if engine else train_here)
    report = summarise(design, measured, tasks)
    path = write_report(report, design.out)
    page = path.with_suffix(".html")
    write_text(page, _ablation_page(report, path.parent))
    print_report(report, screen)
    screen.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 0


class _Tasks:
    """The tasks of `hybrid_eval`, and lm-eval's, as metrics of an ablation: each its headline figure."""

    def problems(self, metrics: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        """Unknown tasks, settings or options, a line each."""
        from hybrid.ablate.config import TRAINING_METRICS
        from hybrid.config.options import did_you_mean
        from hybrid_eval.lm_harness import resolve
        from hybrid_eval.registry import TASKS, check_options

        lines = []
        for name in metrics:
            try:
                if len(resolve(name)) != 1:
                    lines.append(f"metrics: {name!r} stands for several tasks; name one of them")
            except ValueError as error:
                near = did_you_mean(name, [*TRAINING_METRICS, *TASKS])
                hint = near if near.startswith("did") else str(error)
                lines.append(f"metrics: unknown metric {name!r}, {hint}")
        known = self._settings()
        lines += [
            f"evaluate.{key}: unknown key, {did_you_mean(str(key), [*known, 'options'])}"
            for key in options
            if key not in (*known, "options")
        ]
        for name, values in (options.get("options") or {}).items():
            try:
                for task in resolve(name):
                    check_options(task, values)
            except ValueError as error:
                lines.append(f"evaluate.options: {error}")
        return lines

    def higher_is_better(self, metric: str) -> bool:
        """As the task says."""
        from hybrid_eval.lm_harness import resolve

        return resolve(metric)[0].higher_is_better

    def __call__(
        self, folder: Path, metrics: Sequence[str], options: Mapping[str, Any]
    ) -> dict[str, Score]:
        """The headline figure of each task on the checkpoint in `folder`."""
        import hybrid  # noqa: F401  (registers the model with transformers)
        from hybrid_eval import Settings, evaluate

        settings: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in options.items()
            if key != "options"
        }
        found = evaluate(
            str(folder), metrics, settings=Settings(**settings), options=options.get("options")
        )
        results = found["models"][0]["results"]
        return {name: self._score(results[name]) for name in metrics}

    @staticmethod
    def _score(result: Mapping[str, Any]) -> Score:
        """The headline figure, with its items where it is their mean."""
        from hybrid.ablate.statistics import Score

        bounded = result["metric"] == "accuracy" or "chance" in result
        return Score(result[result["metric"]], tuple(result.get("items", ())), bounded)

    @staticmethod
    def _settings() -> list[str]:
        import dataclasses

        from hybrid_eval import Settings

        return [f.name for f in dataclasses.fields(Settings) if f.name != "corpus"]


def _ablation_page(report: dict[str, Any], folder: Path) -> str:
    """The report of an ablation in the dress of `hybrid eval`'s: one self-contained HTML text."""
    from hybrid.ablate import report as words
    from hybrid_eval.report import Column, Page, render
    from hybrid_eval.report_figures import Picture

    seeds = f"{report['confidence']:.0%} interval over seeds"
    notes = {"difference": seeds}
    caption = "Differences, paired by seed, with intervals: dark is established, grey is noise."
    picture = Picture("effects.png", caption, (folder / "effects.png").read_bytes())
    page = Page(
        title=f"Ablation: {report['name']}",
        columns=[Column(head, cell, note) for head, note, cell in words.columns(report)],
        models=report["variants"],
        pictures=[picture],
        differences=words.effect_rows(report),
        compared=(
            "What each change does",
            [(head, notes.get(head, "")) for head in words.EFFECT_HEADINGS],
        ),
        notes=words.notes(report),
        footer=[(name, version) for name, version in report["versions"].items()],
    )
    return render(page)


def _data(arguments: argparse.Namespace) -> int:
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

    from hybrid.config.options import ConfigError
    from hybrid.data import prepare
    from hybrid.plan import parse_tokens

    counts = text_column("{task.completed:,} documents, {task.fields[tokens]:,} tokens")
    screen = console(stderr=True)
    try:
        with Progress(SpinnerColumn(), counts, TimeElapsedColumn(), console=screen) as bar:
            lane = bar.add_task("", total=None, tokens=0, visible=False)
            index = prepare(
                arguments.source,
                arguments.out,
                tokenizer=arguments.tokenizer,
                shard_tokens=parse_tokens(arguments.shard_tokens, "--shard-tokens"),
                progress=lambda done, tokens: bar.update(
                    lane, completed=done, tokens=tokens, visible=True
                ),
                text_key=arguments.text_key,
                split=arguments.split,
                name=arguments.name,
                streaming=arguments.streaming,
            )
    except ConfigError as error:
        raise ValueError("; ".join(error.mistakes)) from error
    except OSError as error:
        raise ValueError(
            f"{arguments.out}: not written: {error}; make room and run the same command again"
        ) from error
    size = f"{index['documents']:,} documents, {index['tokens']:,} tokens"
    shards = len(index["shards"])
    print(f"{arguments.out}: {size} in {shards} shard{'s' if shards > 1 else ''}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from hybrid.plan import load_model_config, parse_dtype, parse_tokens, plan, print_plan

    config = load_model_config(arguments.config, arguments.overrides)
    context = parse_tokens(arguments.context)
    print_plan(plan(config, context, parse_dtype(arguments.dtype)), config)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from hybrid.convert import import_published

    with _writing(arguments.out):
        config = import_published(
            arguments.source,
            arguments.out,
            dtype=arguments.dtype,
            layout=arguments.layout,
            mtp=not arguments.no_mtp,
            max_shard_size=arguments.max_shard_size,
        )
    print(f"{arguments.out}: layout {config.layout}, ffn {config.ffn or 'none'}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from hybrid.convert import export, export_gguf

    size, out, gguf = arguments.max_shard_size, arguments.out, arguments.gguf
    if out is None and gguf is None:
        raise ValueError("export: name the folder to write, OUT, or a GGUF file with --gguf")
    with _writing(out or gguf):
        if gguf is None:
            assert out is not None
            family = export(arguments.source, out, arguments.family, max_shard_size=size)
        else:
            family = export_gguf(
                arguments.source, gguf, arguments.family, folder=out, max_shard_size=size
            )
    print(f"{', '.join(name for name in (out, gguf) if name)}: {family}")
    return 0


def _parity(arguments: argparse.Namespace) -> int:
    from hybrid.serve.parity import parity

    found = parity(
        arguments.model, arguments.server, python=arguments.python, tokens=arguments.tokens
    )
    print(found)
    return 0 if found.identical else 1


@contextmanager
def _writing(out: str) -> Iterator[None]:
    """What the system refuses while a folder is written (a full disk, a file that may not be read)."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{out}: not written: {error}") from error


def _distill(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from hybrid.distill import distill, load_config
    from hybrid.train.checkpoints import CheckpointError

    logging.disable_progress_bar()  # one bar is ours, those of file writing tear it apart
    try:
        report = distill(load_config(arguments.config, arguments.overrides))
    except (CheckpointError, FloatingPointError) as error:
        raise ValueError(str(error)) from error
    folder = Path(report["model"]).parent
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(f"student: {report['model']}, report: {folder / 'report.md'}")
    return 0


def _layout(arguments: argparse.Namespace) -> int:
    from rich.table import Table

    from hybrid.config.registry import mixers
    from hybrid.layout import FFN, describe, parse, resolve

    layers = resolve(arguments.layout, ffn=arguments.ffn, num_hidden_layers=arguments.layers)
    names = mixers.symbols()
    table = Table("layers", "mixer", "feed-forward", title=str(parse(arguments.layout)))
    for row in describe(layers):
        mixer = " + ".join(f"{s} {names.get(s, '(bound by the config)')}" for s in row.mixers)
        table.add_row(row.layers, mixer or "none", FFN[row.ffn] if row.ffn else "none")
    console().print(table)
    print(f"{len(layers)} layers")
    return 0


def _mixers(arguments: argparse.Namespace) -> int:
    import dataclasses
    import inspect

    from rich.table import Column, Table

    from hybrid.config.registry import mixers
    from hybrid.prose import fold

    screen = console()
    if arguments.name is None:
        column = Column("mixer", no_wrap=True)  # whole, to be typed again
        table = Table("symbol", column, "gate", "paper")
        for cls in mixers.classes():
            table.add_row(cls.symbol or "", cls.name, cls.formula, cls.paper)
        screen.print(table)
        return 0
    name: str = arguments.name
    cls = mixers.get(mixers.symbols().get(name, name))
    texts = [f"{cls.name} ({cls.symbol})" if cls.symbol else cls.name, inspect.getdoc(cls)]
    for options in reversed(cls.Options.__mro__):  # what is shared stands above what adds to it
        if dataclasses.is_dataclass(options) and dataclasses.fields(options):
            texts.append(inspect.getdoc(options))
    shown = fold("\n\n".join(filter(None, texts)), screen.width)
    screen.print(shown, "", sep="\n", soft_wrap=True, highlight=False)
    table = Table("option", "default")
    for field in dataclasses.fields(cls.Options):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        table.add_row(field.name, str(default))
    screen.print(table)
    return 0


def _words(text: str, name: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError(f"{name}: expected values with commas between them, found {text!r}")
    return words


def _numbers(text: str, name: str) -> list[int]:
    words = _words(text, name)
    wrong = [word for word in words if not word.isdigit()]
    if wrong:
        raise ValueError(f"{name}: expected whole numbers from 0, found {wrong[0]!r}")
    return [int(word) for word in words]


if __name__ == "__main__":
    sys.exit(main())
