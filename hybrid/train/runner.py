"""Run training from a configuration to a checkpoint."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from transformers import set_seed

from hybrid.data.collate import RowCollator
from hybrid.files import read_json, sync, write_json
from hybrid.terminal import Interrupted
from hybrid.tokenizer import load_tokenizer
from hybrid.train import build
from hybrid.train.checkpoints import newest_whole, refuse_other_run, step_of, writing
from hybrid.train.config import TrainConfig
from hybrid.train.engines import refuse_other_engine
from hybrid.train.failures import memory_refusals
from hybrid.train.model import load_model, model_config
from hybrid.train.optim import Decay
from hybrid.train.pickles import refuse_code
from hybrid.train.slicing import check_slices, held_out, sliced, spread
from hybrid.train.storage import check_storage, sole_run
from hybrid.train.throughput import training_flops_per_token
from hybrid.train.timed_saves import minutes_between_saves
from hybrid.train.trainer import HybridTrainer

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hybrid.data.rows import Rows
    from hybrid.data.sources import SourceConfig

RESULT = "train_result.json"
DIVERGED = "diverged.json"  # the reason, if the loss diverged


@dataclass(frozen=True)
class RunResult:
    """The result of a run, saved as ``train_result.json``.

    Attributes:
        output_dir: the checkpoint's folder.
        steps: optimizer steps of the whole run.
        losses: (step, mean training loss since the last entry) over the whole run, in nats per
            token.
        eval_losses: (step, loss on eval_data), in nats per token.
        probes: name -> (step, accuracy over all its labels).
        seconds: wall time of this process's training.
        tokens: tokens in this process's steps, over all ranks; 0 for a run that was finished already,
            whose files are unchanged.
        tokens_per_second: during steps; without loading, saving and evaluation.
        flops_per_token: forward and backward, from each mixer's own count; None for other models.
        mfu: model FLOPs utilisation, 0..1; None if the peak of the device is not known.
        parameters: number of parameters of the model.
        resumed_from: first step of this process, 0 for a new run.
    """

    output_dir: str
    steps: int
    losses: list[tuple[int, float]]
    eval_losses: list[tuple[int, float]]
    probes: dict[str, list[tuple[int, float]]]
    seconds: float
    tokens: int
    tokens_per_second: float
    flops_per_token: float | None
    mfu: float | None
    parameters: int
    resumed_from: int


def run(
    config: TrainConfig, trainer_class: Callable[..., HybridTrainer] = HybridTrainer
) -> RunResult:
    """Train a model. If the output folder has a complete checkpoint, continue from the newest one.

    Args:
        config: configuration of the run.
        trainer_class: another trainer class or factory, for other losses on the same data.

    Raises:
        ConfigError: the configuration cannot run here, or the output folder has checkpoints of
            another run (before training starts).
        CheckpointError: a checkpoint could not be written; earlier ones are kept.
        OutOfMemory: the model, the optimizer and the batch do not fit in memory.
        FloatingPointError: the loss is not finite; ``diverged.json`` in the output folder has the
            reason.
        Interrupted: SIGINT or SIGTERM ended the run after a step, with a checkpoint.
    """
    with ExitStack() as stack, memory_refusals(config):
        return _run(prepare_run(config, trainer_class, stack))


def _run(trainer: HybridTrainer) -> RunResult:
    args = trainer.args
    checkpoint = _find_checkpoint(trainer)
    if finished := _finished(checkpoint, args):
        return finished
    started = time.perf_counter()
    with _divergence_on_disk(args), _stopped_by_signals(trainer):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - started
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None:
        # Checkpoints may be sharded; the final model must load anywhere.
        plugin.set_state_dict_type("FULL_STATE_DICT")
    with writing(Path(str(args.output_dir))):
        trainer.save_model()
        if args.should_save:
            for path in Path(str(args.output_dir)).iterdir():  # checkpoints are synced already
                if path.is_file():
                    sync(path)
    resumed_from = 0 if checkpoint is None else step_of(checkpoint)
    result = _result(trainer, seconds, resumed_from)
    if args.should_save:
        path = Path(result.output_dir) / RESULT
        with writing(path):
            write_json(path, dataclasses.asdict(result))
    return result


def prepare_run(
    config: TrainConfig,
    trainer_class: Callable[..., HybridTrainer] = HybridTrainer,
    stack: ExitStack | None = None,
) -> HybridTrainer:
    """Build everything before the first step, and return the trainer.

    Args:
        config, trainer_class: see ``run``.
        stack: holds the lock of the output folder; if None, the folder is not locked.

    Raises:
        ConfigError: the configuration cannot run here.
    """
    args = build.training_arguments(config)
    tokenizer = load_tokenizer(config.tokenizer)
    made = model_config(config, tokenizer)
    data_seed = args.seed if args.data_seed is None else args.data_seed
    opened = build.open_sources(config.data, "data", config, tokenizer, made.vocab_size, data_seed)
    parts = config.context_parallel
    check_slices(config, args, made)
    groups = args.world_size // parts
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * groups
    args.max_steps = build.total_steps(args, opened, rows_per_step)
    build.epochs_as_steps(args, opened, rows_per_step)
    size = made.vocab_size
    rows = build.mixture(opened, config.data, args.max_steps * rows_per_step, data_seed, size)
    if args.process_index == 0:
        for line in build.scarce(rows, config.data, rows_per_step):
            print(f"warning: {line}", file=sys.stderr)
    held = None
    if config.eval_data:
        apart = build.open_sources(
            config.eval_data, "eval_data", config, tokenizer, made.vocab_size, data_seed + 1
        )
        held = held_out(
            build.mixture(apart, config.eval_data, config.eval_rows, data_seed, size),
            parts,
            args.eval_batch_size,
            args.world_size,
        )
    probes = build.open_probes(config, tokenizer, made, data_seed)
    build.make_folder(args)
    check_storage(args)
    if stack is not None:
        stack.enter_context(sole_run(args))
    set_seed(args.seed)
    resolved = config.as_dict()
    model = load_model(config, made)
    with build.refusals("training"):
        trainer = trainer_class(
            tokens_per_step=rows_per_step * config.sequence_length,
            flops_per_token=training_flops_per_token(made, config.sequence_length),
            muon=config.muon,
            multi_step=config.multi_step,
            decay=Decay(config.decay_embeddings, config.decay_norms, config.decay_gates),
            resolved=resolved,
            run=_identity(resolved, args, data_seed, rows_per_step) | _seen(config.data, opened),
            probes=probes,
            save_minutes=minutes_between_saves(config.save_minutes, config.training),
            model=model,
            args=args,
            train_dataset=sliced(rows, parts, args.train_batch_size),
            eval_dataset=held,
            data_collator=RowCollator(),
            processing_class=tokenizer,
        )
        trainer.get_optimizer_cls_and_kwargs(
            args, model
        )  # raises if the optimizer is not installed
    build.check_engine(trainer.accelerator)
    spread(trainer.model, parts)
    return trainer


def _identity(
    resolved: dict[str, Any], args: TrainingArguments, data_seed: int, rows_per_step: int
) -> dict[str, Any]:
    """Return the values that must not change when a checkpoint is resumed."""
    keys = ("model", "tokenizer", "data", "sequence_length", "packing", "long_documents", "muon")
    kinds = ("decay_embeddings", "decay_norms", "decay_gates")  # parameter groups of the optimizer
    return {key: resolved[key] for key in (*keys, *kinds)} | {
        "training.optim": args.optim,
        "training.seed": args.seed,
        "training.data_seed": data_seed,
        "rows of a step (per_device_train_batch_size x accumulation x processes)": rows_per_step,
    }


def _seen(configs: Sequence[SourceConfig], opened: Sequence[Rows]) -> dict[str, Any]:
    """Return fingerprints of the sources, to detect changed data under the same name."""
    found: dict[str, Any] = {}
    for number, (config, source) in enumerate(zip(configs, opened, strict=True)):
        name = f"data[{number}] ({config.source})"
        found[f"{name}: rows"] = source.per_epoch
        found |= {f"{name}: {key}": value for key, value in source.identity().items()}
    return found


def _find_checkpoint(trainer: HybridTrainer) -> Path | None:
    """Return the checkpoint to resume from; the first process selects it for all."""
    args = trainer.args
    found: list[Any] = [None, None]
    if args.process_index == 0:
        found[0] = newest_whole(
            Path(str(args.output_dir)), lambda line: print(line, file=sys.stderr)
        )
    broadcast_object_list(found)
    if found[0] is not None:
        refuse_other_run(found[0], trainer.run)
        refuse_other_engine(found[0], trainer)
        refuse_code(found[0])
        if args.process_index == 0:
            print(f"resuming from {found[0]}", file=sys.stderr)
    return found[0]


def _finished(checkpoint: Path | None, args: TrainingArguments) -> RunResult | None:
    """Return the stored result if the run ended at its last checkpoint, without new tokens.

    The files of the run stay unchanged. The first process decides for all.
    """
    found: list[Any] = [None]
    path = Path(str(args.output_dir)) / RESULT
    if args.process_index == 0 and checkpoint is not None and step_of(checkpoint) >= args.max_steps:
        stored = read_json(path) if path.is_file() else {}
        if stored.get("steps") == step_of(checkpoint):
            found[0] = stored
            print(
                f"{args.output_dir}: finished already ({stored['steps']} of {args.max_steps} steps);"
                " raise training.max_steps to go on",
                file=sys.stderr,
            )
    broadcast_object_list(found)
    if found[0] is None:
        return None
    curves = {
        "losses": [tuple(entry) for entry in found[0]["losses"]],
        "eval_losses": [tuple(entry) for entry in found[0]["eval_losses"]],
        "probes": {k: [tuple(entry) for entry in v] for k, v in found[0]["probes"].items()},
    }
    none = {"seconds": 0.0, "tokens": 0, "resumed_from": found[0]["steps"]}
    return RunResult(**{**found[0], **curves, **none})


@contextmanager
def _stopped_by_signals(trainer: HybridTrainer) -> Iterator[None]:
    """Stop training after the current step on SIGINT or SIGTERM.

    Raises:
        Interrupted: a signal was received.
    """
    stop = trainer.stop_signals
    try:
        with stop.watching():
            yield
    except RuntimeError as error:
        # a signal to all processes also ends the data workers, which torch reports here
        if not stop.signal or "DataLoader worker" not in str(error):
            raise
        raise Interrupted("interrupted; run the same command again to resume") from error
    except KeyboardInterrupt as error:
        step = trainer.state.global_step
        text = f"stopped immediately in step {step + 1}; earlier checkpoints are kept"
        raise Interrupted(f"{text}: run the same command again to resume") from error
    if stop.stopped:
        raise stop.outcome(trainer.args, trainer.state.global_step)


@contextmanager
def _divergence_on_disk(args: TrainingArguments) -> Iterator[None]:
    """Write the reason of a divergence to disk, for the process that started this one."""
    path = Path(str(args.output_dir)) / DIVERGED
    if args.should_save:
        path.unlink(missing_ok=True)
    try:
        yield
    except FloatingPointError as error:
        if args.should_save:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"reason": str(error)})
        raise


def _result(trainer: HybridTrainer, seconds: float, resumed_from: int) -> RunResult:
    steps = trainer.state.global_step
    tokens = (steps - resumed_from) * trainer.tokens_per_step
    speed = tokens / trainer.step_seconds if trainer.step_seconds else 0.0
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    return RunResult(
        output_dir=str(trainer.args.output_dir),
        steps=steps,
        losses=_curve(trainer.state.log_history, "loss"),
        eval_losses=_curve(trainer.state.log_history, "eval_loss"),
        probes={
            probe.name: _curve(trainer.state.log_history, f"eval_{probe.name}_accuracy")
            for probe in trainer.probes
        },
        seconds=seconds,
        tokens=tokens,
        tokens_per_second=speed,
        flops_per_token=trainer.flops_per_token,
        mfu=trainer.utilisation(speed),
        parameters=sum(p.numel() for p in unwrapped.parameters()),
        resumed_from=resumed_from,
    )


def _curve(history: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(int(entry["step"]), entry[key]) for entry in history if key in entry]
