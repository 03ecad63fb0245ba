"""Build training arguments and data from a checked configuration."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import patch_environment
from transformers import TrainingArguments
from transformers.integrations import integration_utils
from transformers.training_args import trainer_log_levels
from transformers.utils.import_utils import is_liger_kernel_available

from hybrid.config.options import ConfigError, did_you_mean
from hybrid.data.mixture import BLOCK, Mixture, check_ids
from hybrid.data.rows import Rows
from hybrid.data.sources import RowFormat, SourceConfig, open_source
from hybrid.train.config import TrainConfig
from hybrid.train.probes import Probe, draw
from hybrid.train.schedule import check_schedule
from hybrid.train.timed_saves import KEPT, minutes_between_saves

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

EPOCHS = 100  # a source that a run repeats more often is named


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """Return the arguments of transformers' ``Trainer``, on the selected device.

    Raises:
        ConfigError: the device is not available, or transformers refuses a value.
    """
    values, environment = dict(config.training), {}
    check_device(config.device)
    if config.device == "cpu" or not torch.accelerator.is_available():
        # Explicit: otherwise several processes on CPUs do not connect.
        values["use_cpu"] = True
    if values.get("use_cpu"):
        # Pinned memory is for copies to an accelerator; torch warns without one.
        values.setdefault("dataloader_pin_memory", False)
        # accelerate numbers the CPUs of several processes; torch cannot load a checkpoint onto "cpu:0".
        environment["ACCELERATE_TORCH_DEVICE"] = "cpu"
    values["remove_unused_columns"] = False
    values.setdefault("prediction_loss_only", True)
    if minutes_between_saves(config.save_minutes, config.training):
        values.setdefault("save_total_limit", KEPT)
    if config.eval_data and "eval_strategy" not in values:
        values["eval_strategy"] = "steps"
    try:
        with patch_environment(**environment):
            args = TrainingArguments(**_renamed(values))
    except Exception as error:  # transformers, accelerate and torch raise various types
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError([f"training: {type(error).__name__}: {reason}"]) from error
    trackers: Any = args.report_to  # converted to a list
    check_trackers(trackers)
    check_schedule(args)
    mistakes = []
    if args.fp16 and args.device.type == "cpu":
        mistakes.append("training.fp16: expected false on a CPU, got true; try training.bf16: true")
    if args.eval_strategy != "no" and not config.eval_data:
        mistakes.append(
            f"training.eval_strategy: expected 'no' without eval_data, got {args.eval_strategy!r}"
        )
    for key in ("log_level", "log_level_replica"):
        if getattr(args, key) not in trainer_log_levels:
            near = did_you_mean(str(getattr(args, key)), trainer_log_levels)
            mistakes.append(f"training.{key}: unknown level {getattr(args, key)!r}, {near}")
    if args.eval_on_start and not config.eval_data:
        mistakes.append("training.eval_on_start: expected false without eval_data, got true")
    if args.use_liger_kernel and not is_liger_kernel_available():
        mistakes.append(
            "training.use_liger_kernel: expected false without the package liger-kernel, got true;"
            " try pip install liger-kernel"
        )
    if mistakes:
        raise ConfigError(mistakes)
    return args


@contextmanager
def refusals(path: str) -> Iterator[None]:
    """Convert errors of transformers during the set-up of a run to a ``ConfigError``."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ConfigError([f"{path}: {error}"]) from error


def make_folder(args: TrainingArguments) -> None:
    """Create the output folder of the run.

    Raises:
        ConfigError: the folder cannot be created or is not writable.
    """
    try:
        Path(str(args.output_dir)).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=str(args.output_dir)):
            pass
    except FileExistsError as error:
        line = f"training.output_dir: expected a folder, got the file {args.output_dir}"
        raise ConfigError([line]) from error
    except OSError as error:
        raise ConfigError([f"training.output_dir: {error}"]) from error


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Name the keys of gradient checkpointing as the installed transformers does (changed after
    5.17).
    """
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    renamed = {}
    for key, value in values.items():
        newer = key.replace("gradient_checkpointing", "activation_checkpointing")
        renamed[newer if newer in known else key] = value
    return renamed


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that transformers does not know, or whose package is not installed.

    Raises:
        ConfigError: with one line for each tracker.
    """
    mistakes = []
    callbacks: dict[str, Any] = integration_utils.INTEGRATION_TO_CALLBACK
    present = integration_utils.get_available_reporting_integrations()
    for name in names:
        if name not in callbacks:
            near = did_you_mean(name, [*callbacks, "none", "all"])
            mistakes.append(f"training.report_to: unknown tracker {name!r}, {near}")
        # a tracker registered by the user checks its own requirements
        elif callbacks[name].__module__ == integration_utils.__name__ and name not in present:
            mistakes.append(
                f"training.report_to: expected an installed tracker ({', '.join(present) or 'none'}),"
                f" got {name!r}; try pip install {name}"
            )
    if mistakes:
        raise ConfigError(mistakes)


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ConfigError: lists the available devices.
    """
    if device in ("auto", "cpu"):
        return
    present = torch.accelerator.current_accelerator(check_available=True)
    if present is None or present.type != device:
        there = "cpu" if present is None else f"{present.type}, cpu"
        raise ConfigError([f"device: expected a device of this machine ({there}), got {device!r}"])


def check_engine(accelerator: Accelerator) -> None:
    """Refuse an engine that was requested but that accelerate does not use.

    Raises:
        ConfigError: FSDP on a CPU, where accelerate would replicate instead of shard.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.distributed_type is not DistributedType.FSDP:
        raise ConfigError(
            [
                f"accelerate: expected an accelerator for FSDP, got {accelerator.device.type}; try"
                " configs/accelerate/ddp_cpu.yaml"
            ]
        )


def open_sources(
    configs: Sequence[SourceConfig],
    key: str,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    seed: int,
) -> list[Rows]:
    """Open every source and check its first row.

    Raises:
        ConfigError: with one line for each source that cannot be used.
    """
    rows = row_format(config, tokenizer, config.sequence_length)
    opened, mistakes = [], []
    for number, source in enumerate(configs):
        try:
            # Each source has its own random stream.
            opened.append(open_source(source, tokenizer, rows, seed * 1000 + number))
            check_ids(opened[-1].row(0), vocabulary)
        except (ValueError, TypeError) as error:
            mistakes.append(f"{key}[{number}] ({source.source}): {error}")
    if mistakes:
        raise ConfigError(mistakes)
    return opened


def open_probes(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, made: PreTrainedConfig, seed: int
) -> list[Probe]:
    """Open every probe and draw its rows, from a random stream that training does not use.

    Raises:
        ConfigError: with one line for each probe that cannot be used.
    """
    opened, mistakes = [], []
    limit = getattr(made, "max_position_embeddings", None)
    for number, (name, probe) in enumerate(config.probes.items()):
        rows = {}
        for length in probe.lengths or [config.sequence_length]:
            form = row_format(config, tokenizer, length)
            try:
                if limit is not None and length > limit:
                    raise ValueError(
                        f"expected at most the model's max_position_embeddings {limit}, got {length}"
                    )
                source = open_source(probe, tokenizer, form, seed * 1000 + 500 + number)
                rows[length] = draw(source, probe.rows)
                for row in rows[length]:
                    check_ids(row, made.vocab_size)
            except (ValueError, TypeError) as error:
                mistakes.append(f"probes.{name} ({probe.source}, length {length}): {error}")
        opened.append(Probe(name, probe.every, rows, probe.depth_buckets))
    if mistakes:
        raise ConfigError(mistakes)
    return opened


def row_format(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, length: int) -> RowFormat:
    """Return the format of rows of ``length`` tokens."""
    ids: list[Any] = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    pad_id = next(value for value in ids if isinstance(value, int))
    return RowFormat(length, pad_id, config.packing, config.long_documents)


def total_steps(args: TrainingArguments, sources: Sequence[Rows], rows_per_step: int) -> int:
    """Return the optimizer steps of the run: ``max_steps``, or ``num_train_epochs`` over finite
    data.

    Raises:
        ConfigError: ``max_steps`` is not set and a source is endless.
    """
    if args.max_steps > 0:
        return args.max_steps
    rows = rows_per_epoch(sources)
    if rows is None:
        raise ConfigError(
            [
                "training.max_steps: expected a number of steps for sources without an end (streams"
                " and plug-ins), got none"
            ]
        )
    return math.ceil(rows * args.num_train_epochs / rows_per_step)


def rows_per_epoch(sources: Sequence[Rows]) -> int | None:
    """Return the rows of one epoch over all sources; None if a source is endless."""
    sizes = [s.per_epoch for s in sources]
    return None if None in sizes else sum(s or 0 for s in sizes)


def epochs_as_steps(args: TrainingArguments, sources: Sequence[Rows], rows_per_step: int) -> None:
    """Convert strategies ``epoch`` (save, eval, logging) to steps: ``Trainer`` sees a run as one
    epoch.

    Raises:
        ConfigError: a source is endless.
    """
    rows = rows_per_epoch(sources)
    for what in ("save", "eval", "logging"):
        if getattr(args, f"{what}_strategy") != "epoch":
            continue
        if rows is None:
            raise ConfigError(
                [
                    f"training.{what}_strategy: expected steps for sources without an end, got"
                    f" epoch; try training.{what}_steps"
                ]
            )
        strategy = getattr(args, f"{what}_strategy")
        setattr(args, f"{what}_strategy", type(strategy)("steps"))
        setattr(args, f"{what}_steps", math.ceil(rows / rows_per_step))


def mixture(
    sources: Sequence[Rows],
    configs: Sequence[SourceConfig],
    rows: int,
    seed: int,
    vocabulary: int,
) -> Mixture:
    """Return the rows of a run as one data set.

    Raises:
        ConfigError: a weight is too small for one row in 1000.
    """
    try:
        return Mixture(sources, [c.weight for c in configs], rows, seed, vocabulary)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def scarce(rows: Mixture, configs: Sequence[SourceConfig], rows_per_step: int) -> list[str]:
    """Return one line for each source that repeats within a step, or more than ``EPOCHS`` times."""
    lines = []
    for number, (source, count) in enumerate(zip(rows.sources, rows.counts, strict=True)):
        if not source.per_epoch:
            continue
        drawn = len(rows) * count / BLOCK
        in_step = rows_per_step * count / BLOCK
        times = drawn / source.per_epoch
        if times > EPOCHS or (times > 1 and in_step > source.per_epoch):
            lines.append(
                f"data[{number}] ({configs[number].source}): expected more than"
                f" {source.per_epoch:,} row{'s' * (source.per_epoch > 1)} of text, which this run reads"
                f" {times:,.0f} times; try more data or fewer steps"
            )
    return lines
