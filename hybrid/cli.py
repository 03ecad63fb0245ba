"""The command line: `hybrid quickstart | train | eval | plan | layout | mixers`.

The only module that knows all three packages; each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for what the user can mend)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["eval"]:  # its options are those of `python -m hybrid_eval`
        return _eval(arguments[1:])
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes no positional arguments after an option; overrides may stand anywhere
    if any(word.startswith("-") or "=" not in word for word in rest) or (
        rest and not hasattr(parsed, "overrides")
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    try:
        return parsed.run(parsed)
    except ValueError as error:
        print(f"hybrid {parsed.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hybrid", description="Hybrid language models from one layout string."
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

    # for the list of commands; `main` hands its arguments on before they are parsed here
    command("eval", lambda parsed: _eval([]), "measure models; see `hybrid eval --help`")

    cost = command("plan", _plan, "print parameters, FLOPs per token and cache bytes of a config")
    cost.add_argument("config", help="a YAML file, a checkpoint folder or a config.json")
    cost.add_argument("--context", default="8k", help="tokens, e.g. 8192, 32k, 1m")
    cost.add_argument("--dtype", default="bfloat16", help="of weights and keys")
    cost.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. model.layout=SSSL")

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
    import subprocess

    from hybrid.quickstart import training_command

    engine = ["--config_file", arguments.config_file] if arguments.config_file else []
    return subprocess.call(training_command(arguments.config, arguments.overrides, engine))


def _eval(argv: Sequence[str]) -> int:
    import hybrid  # noqa: F401  (registers the model with transformers)
    from hybrid_eval.cli import main as evaluate

    return evaluate(argv, prog="hybrid eval")


def _plan(arguments: argparse.Namespace) -> int:
    from hybrid.plan import load_model_config, parse_dtype, parse_tokens, plan, print_plan

    config = load_model_config(arguments.config, arguments.overrides)
    context = parse_tokens(arguments.context)
    print_plan(plan(config, context, parse_dtype(arguments.dtype)), config)
    return 0


def _layout(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from hybrid.layout import FFN, describe, parse, resolve
    from hybrid.registry import mixers

    layers = resolve(arguments.layout, ffn=arguments.ffn, num_hidden_layers=arguments.layers)
    names = mixers.symbols()
    title = escape(str(parse(arguments.layout)))  # else [MS] would be markup
    table = Table("layers", "mixer", "feed-forward", title=title)
    for row in describe(layers):
        mixer = " + ".join(f"{s} {names.get(s, '(bound by the config)')}" for s in row.mixers)
        table.add_row(row.layers, mixer or "none", FFN[row.ffn] if row.ffn else "none")
    Console().print(table)
    print(f"{len(layers)} layers")
    return 0


def _mixers(arguments: argparse.Namespace) -> int:
    import dataclasses
    import inspect

    from rich.console import Console
    from rich.table import Table

    from hybrid.registry import mixers

    console = Console()
    if arguments.name is None:
        table = Table("symbol", "mixer", "gate", "paper")
        for cls in mixers.classes():
            table.add_row(cls.symbol or "", cls.name, cls.formula, cls.paper)
        console.print(table)
        return 0
    name: str = arguments.name
    cls = mixers.get(mixers.symbols().get(name, name))
    console.print(f"{cls.name} ({cls.symbol})\n", inspect.getdoc(cls), "\n", highlight=False)
    console.print(inspect.getdoc(cls.Options), highlight=False, markup=False)
    table = Table("option", "default")
    for field in dataclasses.fields(cls.Options):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        table.add_row(field.name, str(default))
    console.print(table)
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
