"""The command line, ``hybrid COMMAND``: one function per command, which imports its code when it runs.

A new command is a function under ``@command(...)``. Its parameters are its arguments and options
(``Annotated[type, typer.Option(help=...)]``), its docstring is its help, what it returns is the exit
status (None: 0). A ``ValueError`` or ``OSError`` that it raises is one line and status 2.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from hybrid.imports import HELP, import_user_code
from hybrid.terminal import console, guarded

app = typer.Typer(
    name="hybrid",
    help="Hybrid language models from one layout string.",
    rich_markup_mode=None,  # help has layouts in it, whose brackets are no markup
)
data = typer.Typer(help="Prepare training data ahead.", rich_markup_mode=None)
app.add_typer(data, name="data")

REFUSED = 2  # exit status of what the user can mend


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status (2 for what the user can mend)."""
    return guarded("hybrid", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    usage_error: Any = typer.BadParameter.__base__
    words = None if argv is None else list(argv)
    try:
        status = typer.main.get_command(app).main(words, "hybrid", standalone_mode=False)
    except usage_error as error:
        name = error.ctx.command_path if error.ctx else "hybrid"
        text = error.format_message()
        if _takes_keys(error):
            text += "; keys of the config are arguments of the form key=value"
        stop = "" if text.endswith((".", "?", ")")) else "."
        print(f"{name}: {text}{stop} See `{name} --help`.", file=sys.stderr)
        return REFUSED
    return status or 0


def _takes_keys(error: Any) -> bool:
    """Return whether an option is unknown to a command whose config has keys."""
    parameters = error.ctx.command.params if error.ctx else ()
    return hasattr(error, "option_name") and any(p.name == "overrides" for p in parameters)


def command(
    name: str, within: typer.Typer = app, **options: Any
) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Decorator: a function as the command `name`; Ctrl-C, a closed pipe and refusals are one line."""

    def add(function: Callable[..., int | None]) -> Callable[..., int | None]:
        # `hybrid data prepare` is the step of a command: its lines begin with the command
        title = f"hybrid {name if within is app else 'data'}"

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> int | None:
            return guarded(title, lambda: _refusals(title, lambda: function(*args, **kwargs)))

        within.command(name, **options)(run)
        return function

    return add


def _refusals(title: str, call: Callable[[], int | None]) -> int:
    """Run a command; what the user or the system refuses is one line."""
    try:
        return call() or 0
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"{title}: {error}", file=sys.stderr)
        return REFUSED


def _import_user_code(context: typer.Context, names: list[str] | None) -> list[str]:
    """The callback of `--import`, which every command has: before its other options are read."""
    if not context.resilient_parsing:  # a shell completes the command
        call = functools.partial(import_user_code, names or ())
        if status := guarded("hybrid", lambda: _refusals("hybrid", call)):
            raise typer.Exit(status)
    return names or []


def _check_file(config: str, overrides: Sequence[str] = ()) -> None:
    """Read a YAML file and apply overrides, before imports and launchers that take seconds."""
    from hybrid.config import yaml

    yaml.apply_overrides(yaml.read(config), overrides)


def _check_new(out: str) -> None:
    """Check that a folder to write is new or empty, before imports that take seconds."""
    from hybrid.files import check_new_folder

    check_new_folder(out)


def _argument(metavar: str, help: str) -> Any:
    """A positional argument with its name in the help."""
    return typer.Argument(metavar=metavar, help=help)


Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="FILE", help=HELP, is_eager=True, callback=_import_user_code),
]

_KEYS = "keys of the config, e.g. "
Overrides = Annotated[list[str] | None, _argument("key=value", _KEYS + "model.layout=SSSL")]
AblationOverrides = Annotated[list[str] | None, _argument("key=value", _KEYS + "seeds=[0,1,2]")]
DistillOverrides = Annotated[list[str] | None, _argument("key=value", _KEYS + "layout=SSSL")]
SearchOverrides = Annotated[list[str] | None, _argument("key=value", _KEYS + "linear=D")]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config_file", metavar="FILE", help="an accelerate config, e.g. of configs/accelerate/"
    ),
]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="of one file, e.g. 500MB")]


@app.callback(invoke_without_command=True)
def _hybrid(context: typer.Context, imports: Imports = None) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(REFUSED)


@command("quickstart")
def _quickstart(
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(help="folder for all that comes out")] = "runs/quickstart",
    config: Annotated[
        str | None, typer.Option(help="training config (default: configs/quickstart.yaml)")
    ] = None,
    layouts: Annotated[str, typer.Option(help="the first is the hybrid")] = "LLLS,SSSS,LLLL",
    seeds: Annotated[str, typer.Option(help="e.g. 0,1,2: every layout once per seed")] = "0",
    imports: Imports = None,
) -> int:
    """Train three layouts, compare them, write a report."""
    from hybrid.quickstart import quickstart

    return quickstart(
        out=out,
        config=config,
        layouts=_words(layouts, "--layouts"),
        seeds=_numbers(seeds, "--seeds"),
        overrides=overrides or (),
    )


@command("train")
def _train(
    config: Annotated[str, _argument("CONFIG", "e.g. configs/quickstart.yaml")],
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    imports: Imports = None,
) -> int:
    """Train a model by a YAML file, through accelerate launch."""
    _check_file(config, overrides or ())
    from hybrid.train.launch import launch, shown, training_command

    engine = ["--config_file", config_file] if config_file else []
    words = training_command(config, overrides or (), engine)
    print(shown(words), file=sys.stderr, flush=True)
    return launch(words[3:])


@command("ablate")
def _ablate(
    config: Annotated[str, _argument("CONFIG", "e.g. configs/ablations/quick.yaml")],
    overrides: AblationOverrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the runs and stop")] = False,
    config_file: ConfigFile = None,
    imports: Imports = None,
) -> int:
    """Train a baseline and changes to it, and say what is noise; status 1 if a prediction fails."""
    _check_file(config)
    from hybrid.ablate.command import run_ablation

    return run_ablation(config, overrides or (), dry_run=dry_run, config_file=config_file)


@command("reproduce")
def _reproduce(
    name: Annotated[str | None, _argument("NAME", "a finding; without one: print them all")] = None,
    overrides: AblationOverrides = None,
    scale: Annotated[str, typer.Option(help="laptop (minutes on two cores) or gpu")] = "laptop",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the runs and stop")] = False,
    config_file: ConfigFile = None,
    imports: Imports = None,
) -> int:
    """Check a published finding by our own runs; status 0 if it holds with its interval."""
    from hybrid.ablate.reproduce import print_findings, reproduce

    if name is None:
        print_findings(console())
        return 0
    return reproduce(name, overrides or (), scale=scale, dry_run=dry_run, config_file=config_file)


@command("prepare", within=data)
def _prepare(
    source: Annotated[
        str,
        _argument("SOURCE", "stdlib, a file, folder or 'pattern', or a hub data set"),
    ],
    out: Annotated[
        str,
        _argument("OUT", "folder to write; name it under `data:` of a training config"),
    ],
    tokenizer: Annotated[str, typer.Option(help="bytes, or any Hugging Face tokenizer")] = "bytes",
    shard_tokens: Annotated[str, typer.Option(help="tokens of a shard, e.g. 4096k")] = "100m",
    text_key: Annotated[str, typer.Option(help="column that holds the text")] = "text",
    split: Annotated[str, typer.Option(help="of a hub data set; stdlib: also heldout")] = "train",
    name: Annotated[str | None, typer.Option(help="configuration of a hub data set")] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="read without storing the source")
    ] = False,
    imports: Imports = None,
) -> None:
    """Tokenise text into shards that training memory-maps."""
    from hybrid.data.command import run_preparation
    from hybrid.plan import parse_tokens

    run_preparation(
        source,
        out,
        tokenizer=tokenizer,
        shard_tokens=parse_tokens(shard_tokens, "--shard-tokens"),
        text_key=text_key,
        split=split,
        name=name,
        streaming=streaming,
    )


@command(
    "eval",
    add_help_option=False,  # all words are those of `python -m hybrid_eval`
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def _eval(context: typer.Context, imports: Imports = None) -> int:
    """Measure retrieval, reasoning, held-out loss and memory; write a report."""
    import hybrid  # noqa: F401  (registers the model with transformers)
    from hybrid.train.trained_sizes import trained_sizes
    from hybrid_eval.cli import main as evaluate

    epilog = f"--import FILE: {HELP}"
    return evaluate(context.args, prog="hybrid eval", epilog=epilog, defaults=trained_sizes)


@command("plan")
def _plan(
    config: Annotated[
        str,
        _argument("CONFIG", "a YAML file, a checkpoint folder or a config.json"),
    ],
    overrides: Overrides = None,
    context: Annotated[str, typer.Option(help="tokens, e.g. 8192, 32k, 1m")] = "8k",
    dtype: Annotated[str, typer.Option(help="of weights and keys")] = "bfloat16",
    imports: Imports = None,
) -> None:
    """Print parameters, FLOPs per token and cache bytes of a config."""
    from hybrid.plan import load_model_config, parse_dtype, parse_tokens, plan, print_plan
    from hybrid.train.config import TrainConfig

    model = load_model_config(config, overrides or (), check=TrainConfig.refuse_unknown_keys)
    print_plan(plan(model, parse_tokens(context), parse_dtype(dtype)), model)


@command("import")
def _import(
    source: Annotated[
        str,
        _argument("PATH", "a folder of safetensors, a hub name, or a .gguf file"),
    ],
    out: Annotated[str, _argument("OUT", "folder to write; must be new or empty")],
    dtype: Annotated[
        str | None,
        typer.Option(help="of the weights; default: as they are (quantized: bfloat16)"),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="another one, e.g. SSSL: new mixers start from the old")
    ] = None,
    no_mtp: Annotated[bool, typer.Option("--no-mtp", help="leave out its MTP modules")] = False,
    max_shard_size: ShardSize = "5GB",
    imports: Imports = None,
) -> None:
    """Convert a published checkpoint into a layout."""
    _check_new(out)
    from hybrid.convert import import_published

    with _writing(out):
        config = import_published(
            source,
            out,
            dtype=dtype,
            layout=layout,
            mtp=not no_mtp,
            max_shard_size=max_shard_size,
        )
    print(f"{out}: layout {config.layout}, ffn {config.ffn or 'none'}")


@command("export")
def _export(
    source: Annotated[str, _argument("PATH", "folder of a model of ours")],
    out: Annotated[
        str | None,
        _argument("OUT", "folder to write; must be new or empty; may be left out with --gguf"),
    ] = None,
    gguf: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="GGUF file to write, by llama.cpp's converter"),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="FAMILY",
            help="e.g. qwen3_next; default: the one it was imported from, else the one that fits",
        ),
    ] = None,
    max_shard_size: ShardSize = "5GB",
    imports: Imports = None,
) -> None:
    """Write a model as a published architecture's checkpoint."""
    if out is None and gguf is None:
        raise ValueError("export: name the folder to write, OUT, or a GGUF file with --gguf")
    if out is not None:
        _check_new(out)
    from hybrid.convert import export, export_gguf

    with _writing(out or gguf):
        if gguf is None:
            assert out is not None
            found = export(source, out, family, max_shard_size=max_shard_size)
        else:
            found = export_gguf(source, gguf, family, folder=out, max_shard_size=max_shard_size)
    print(f"{', '.join(name for name in (out, gguf) if name)}: {found}")


@contextmanager
def _writing(out: str | None) -> Iterator[None]:
    """What the system refuses while a folder is written (a full disk, a file that may not be read)."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{out}: not written: {error}") from error


@command("parity")
def _parity(
    model: Annotated[str, _argument("MODEL", "folder of a hybrid, or of an export")],
    server: Annotated[str, typer.Option(help="vllm, mlx, llama.cpp, or a URL")],
    python: Annotated[
        str | None, typer.Option(help="interpreter that has the server; default: this one")
    ] = None,
    tokens: Annotated[int, typer.Option(help="to decode after each prompt")] = 32,
    imports: Imports = None,
) -> int:
    """Compare greedy tokens and log-probabilities with a server's."""
    from hybrid.serve.parity import parity

    found = parity(model, server, python=python, tokens=tokens)
    print(found)
    return 0 if found.identical else 1


@command("generate")
def _generate(
    model: Annotated[str, _argument("MODEL", "folder or hub name of a causal language model")],
    prompts: Annotated[
        list[str] | None, _argument("PROMPT", "texts to continue; default: lines of standard input")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="a conversation, in the tokenizer's chat template")
    ] = False,
    system: Annotated[str | None, typer.Option(help="system message of the conversation")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="at most so many after each prompt")] = 200,
    temperature: Annotated[float, typer.Option(help="divides the logits; 0: greedy")] = 0.7,
    top_p: Annotated[float, typer.Option(help="sample from the top of this probability")] = 0.95,
    top_k: Annotated[int, typer.Option(help="sample from so many tokens; 0: from all")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="above 1: repeat less")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the random numbers")] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes, a folder or a hub name; default: the model's own")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="of the weights; default: that of the checkpoint")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="default: an accelerator where there is one, else cpu")
    ] = None,
    imports: Imports = None,
) -> None:
    """Continue a text, or chat, token by token as it is generated."""
    from hybrid.serve.generate import Sampling, generate_text

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    generate_text(
        model,
        prompts or (),
        sampling,
        chat=chat,
        system=system,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
    )


@command("distill")
def _distill(
    config: Annotated[str, _argument("CONFIG", "e.g. configs/distill/smollm2.yaml")],
    overrides: DistillOverrides = None,
    imports: Imports = None,
) -> None:
    """Teach a model with another layout what the original does."""
    _check_file(config)
    from hybrid.distill.command import run_distillation

    run_distillation(config, overrides or ())


@command("search")
def _search(
    config: Annotated[str, _argument("CONFIG", "e.g. configs/search/smollm2.yaml")],
    overrides: SearchOverrides = None,
    imports: Imports = None,
) -> None:
    """Find the softmax layers that should stay: layouts on the frontier, with their commands."""
    _check_file(config)
    from hybrid.search.command import run_search

    run_search(config, overrides or ())


@command("tokenizer")
def _tokenizer(
    names: Annotated[list[str], _argument("NAME", "bytes, folders, or names on the hub")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LANGUAGE=FILE",
            help="may be repeated; default: article 1 of the Declaration of Human Rights, 13 languages",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="config or checkpoint: what the vocabularies cost in it")
    ] = None,
    out: Annotated[str | None, typer.Option(help="report to write: .md, .csv or .json")] = None,
    imports: Imports = None,
) -> None:
    """Compare tokenizers: tokens per word by language, and what a vocabulary costs."""
    from hybrid.data.tokenizer_report import run_report

    run_report(names, text or (), model, out)


@command("layout")
def _layout(
    layout: Annotated[str, _argument("LAYOUT", 'e.g. "LLLS", "(L7S)10", "[MS]4", "M-M-M*-"')],
    ffn: Annotated[str, typer.Option(help="feed-forward pattern after each mixer")] = "-",
    layers: Annotated[int | None, typer.Option(help="depth to fill")] = None,
    bind: Annotated[
        list[str] | None,
        typer.Option(metavar="LETTER=MIXER", help="as `mixers` of a config; may be repeated"),
    ] = None,
    imports: Imports = None,
) -> None:
    """Print a layout as a table."""
    from rich.table import Table

    from hybrid.config.registry import mixers
    from hybrid.layout import FFN, check_bound, describe, parse, resolve

    names = mixers.symbols() | _bindings(bind or (), mixers.names())
    parsed = parse(layout)
    check_bound(parsed, names)
    stack = resolve(layout, ffn=ffn, num_hidden_layers=layers)
    table = Table("layers", "mixer", "feed-forward", title=str(parsed))
    for row in describe(stack):
        mixer = " + ".join(f"{symbol} {names[symbol]}" for symbol in row.mixers)
        table.add_row(row.layers, mixer or "none", FFN[row.ffn] if row.ffn else "none")
    console().print(table)
    print(f"{len(stack)} layers")


def _bindings(words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """`--bind Q=softmax_attention` as symbol -> name."""
    from hybrid.config.options import did_you_mean
    from hybrid.layout import check_symbol

    bound = {}
    for word in words:
        symbol, equals, name = word.partition("=")
        if not equals:
            raise ValueError(f"--bind: expected LETTER=MIXER, got {word!r}")
        check_symbol(symbol)
        if name not in known:
            raise ValueError(f"--bind: no mixer {name!r}, {did_you_mean(name, known)}")
        bound[symbol] = name
    return bound


@command("mixers", add_help_option=False, short_help="Print the mixers, or the options of one.")
def _mixers(
    context: typer.Context,
    name: Annotated[str | None, _argument("NAME", "a letter or a name: print its options")] = None,
    help: Annotated[
        bool, typer.Option("--help", help="show this message, with NAME its options, and exit")
    ] = False,
    imports: Imports = None,
) -> None:
    """Print what each letter of a layout stands for; with NAME, the options of one mixer."""
    if help:
        typer.echo(context.get_help())
    if help and name is None:
        return
    from hybrid.mixers.describe import print_mixer, print_mixers

    if name is None:
        print_mixers(console())
    else:
        print_mixer(name, console())


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
