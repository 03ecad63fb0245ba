"""transformers' ``Trainer`` with rows by index, verified checkpoints and our parameter groups."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from hybrid.data.mixture import DataError
from hybrid.data.packing import IGNORE
from hybrid.files import write_text
from hybrid.modeling.initialization import growths
from hybrid.modeling.model import HybridForCausalLM
from hybrid.train.checkpoints import remove_old, write_manifest, writing
from hybrid.train.config import MuonConfig
from hybrid.train.engines import load_model, load_optimizer, shard_ties_with_the_stack
from hybrid.train.expert_load import ExpertLoad
from hybrid.train.interrupt import StopSignals
from hybrid.train.optim import Decay, Several, decaying, groups, matrices
from hybrid.train.pickles import refuse_code
from hybrid.train.probes import Probe, Probes
from hybrid.train.progress import LossWatch, Progress
from hybrid.train.schedule import MultiStepConfig
from hybrid.train.throughput import peak_flops
from hybrid.train.timed_saves import TimedSaves

CONFIG_NAME = "train_config.yaml"


class HybridTrainer(Trainer):
    """``Trainer`` for data whose row i is a function of i.

    Args:
        tokens_per_step: tokens per optimizer step, over all processes.
        flops_per_token: forward and backward, for ``mfu``; None if not known.
        muon: options of Muon, or None for the optimizer of ``args.optim``.
        decay: parameters with weight decay in addition to matrices.
        multi_step: the multi-step schedule, or None for the one of ``args.lr_scheduler_type``.
        resolved: the configuration, saved with every checkpoint.
        run: values that the manifest of a checkpoint records.
        probes: probes to run during training.
        save_minutes: minutes between checkpoints; 0 means never by time.
        kwargs: arguments of ``Trainer``.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        flops_per_token: float | None,
        muon: MuonConfig | None,
        decay: Decay = Decay(),  # noqa: B008 (it is frozen)
        multi_step: MultiStepConfig | None = None,
        resolved: Mapping[str, Any],
        run: Mapping[str, Any],
        probes: Sequence[Probe] = (),
        save_minutes: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        shard_ties_with_the_stack(self)
        self.label_smoothing = 0.0
        if isinstance(self.model, HybridForCausalLM):
            # ``Trainer`` would smooth the logits itself and ignore the additional losses of the config
            self.label_smoothing, self.label_smoother = self.args.label_smoothing_factor, None
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops(self.args)
        self.muon = muon
        self.decay = decay
        self.multi_step = multi_step
        self.resolved = dict(resolved)
        self.run = dict(run)
        self.probes = list(probes)
        self.step_seconds = 0.0  # time of steps, without saving and evaluation
        self._clock: tuple[float, int] | None = None
        self._held = (0.0, 0)  # sum of losses and number of labels of the evaluation
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.expert_load = ExpertLoad()
        self.add_callback(self.expert_load)
        # Before the watch, which logs where a checkpoint is requested.
        self.stop_signals = StopSignals()
        self.add_callback(self.stop_signals)
        self.add_callback(TimedSaves(save_minutes))
        self.add_callback(Probes(self, self.probes, self.clock_stopped))
        # The watch first: the bar shows the logged values.
        self.add_callback(LossWatch())
        self.add_callback(Progress())

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        """Return rows in the order of the mixture; ``Trainer`` skips by index."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """See ``hybrid.train.optim``."""
        return decaying(model, self.decay)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create Muon for matrices if the config selects it; otherwise ``Trainer``'s optimizer."""
        whole: Any = self.model if model is None else model
        if self.optimizer is not None or (self.muon is None and not growths(whole)):
            return super().create_optimizer(model)
        args, rest = self.args, self.get_optimizer_cls_and_kwargs(self.args, whole)
        options = {"decay": self.decay, "learning_rate": args.learning_rate}
        if self.muon is None:
            names = [n for n, _ in whole.named_parameters()]
            self.optimizer = rest[0](
                [dict(g) for g in groups(whole, names, args.weight_decay, **options)], **rest[1]
            )
            return self.optimizer
        orthogonal = matrices(whole)
        others = {n for n, _ in whole.named_parameters()} - set(orthogonal)
        rate = self.muon.learning_rate
        inner = torch.optim.Muon(
            [dict(g) for g in groups(whole, orthogonal, args.weight_decay)],
            lr=args.learning_rate if rate is None else rate,
            momentum=self.muon.momentum,
            nesterov=self.muon.nesterov,
            ns_steps=self.muon.ns_steps,
            adjust_lr_fn=self.muon.adjust_lr_fn,
        )
        adam = rest[0](
            [dict(g) for g in groups(whole, others, args.weight_decay, **options)], **rest[1]
        )
        self.optimizer = Several([inner, adam])
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the multi-step schedule if the config selects it; otherwise ``Trainer``'s by name."""
        if self.multi_step is not None and self.lr_scheduler is None:
            self.lr_scheduler = self.multi_step.schedule(
                self.optimizer if optimizer is None else optimizer,
                self.args.get_warmup_steps(num_training_steps),
                num_training_steps,
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As ``Trainer``, without a cache: transformers' models respect document boundaries only
        without one.

        Label smoothing applies in training only. A hybrid model applies it itself.
        """
        inputs = {**inputs, "use_cache": False}
        if self.label_smoothing and model.training:
            inputs["label_smoothing"] = self.label_smoothing
        smoother = self.label_smoother
        try:
            self.label_smoother = smoother if model.training else None
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.label_smoother = smoother

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``; the clock starts with the first step."""
        self._clock, self.step_seconds = None, 0.0
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ``Trainer``; starts the clock."""
        if self._clock is None:
            self._clock = time.perf_counter(), self.state.global_step
        return super().training_step(*args, **kwargs)

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Exclude this context from the training time."""
        clock, before = self._clock, time.perf_counter()
        yield
        if clock is not None:
            self._clock = clock[0] + time.perf_counter() - before, clock[1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add ``tokens_per_second`` and ``mfu`` since the last log, without saving and evaluation.

        For models with experts, also add the summary of ``ExpertLoad``.
        """
        if "train_runtime" in logs:  # at the end; the last steps may not be logged yet
            self._lap()
        if "loss" in logs and (speed := self._lap()) is not None:
            logs["tokens_per_second"] = speed
            if (used := self.utilisation(speed)) is not None:
                logs["mfu"] = used
        if "loss" in logs:
            logs.update(self.expert_load.summary())
            callbacks = self.callback_handler.callbacks
            boards = [c.tb_writer for c in callbacks if getattr(c, "tb_writer", None) is not None]
            self.expert_load.write(self.args, self.state, boards)
        # transformers 5.17 logs these at the end. It divides them by the steps of the whole run, of
        # which a resumed process ran only the last ones.
        for key in ("train_loss", "train_samples_per_second", "train_steps_per_second"):
            logs.pop(key, None)
        super().log(logs, start_time)

    def _lap(self) -> float | None:
        """Add the time since the last lap to ``step_seconds``.

        Return tokens per second, or None without a step.
        """
        if self._clock is None or (steps := self.state.global_step - self._clock[1]) == 0:
            return None
        now = time.perf_counter()
        seconds = now - self._clock[0]
        self._clock = now, self.state.global_step
        self.step_seconds += seconds
        return steps * self.tokens_per_step / seconds

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``, with every row: ``dataloader_drop_last`` applies to training only."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ``Trainer``, with the clock stopped."""
        with self.clock_stopped():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """As ``Trainer``; the loss is the mean over all labels, independent of the batches."""
        self._held = (0.0, 0)
        found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, labels = (sum(part) for part in zip(*gather_object([self._held]), strict=True))
        if not labels:
            raise DataError("eval_data: expected rows with labels, got none")
        if found.metrics is not None:
            found.metrics[f"{metric_key_prefix}_loss"] = loss / labels
        return found

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """As ``Trainer``; sums the loss over labels."""
        found = super().prediction_step(model, inputs, *args, **kwargs)
        count = self._get_num_items_in_batch([inputs], self.args.device)
        if count is None:  # a model whose loss is the mean of its own batch
            count = (inputs["labels"][..., 1:] != IGNORE).sum()
        # one process with several devices has the count once per device
        if found[0] is not None and (labels := int(torch.as_tensor(count).max())):
            loss, before = found[0].item() * labels, self._held
            self._held = before[0] + loss, before[1] + labels
        return found

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Return the model FLOPs utilisation (MFU), 0..1; None if the device's peak is not known."""
        if self.flops_per_token is None or self.peak_flops is None:
            return None
        return self.flops_per_token * tokens_per_second / self.peak_flops

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            text = yaml.safe_dump(self.resolved, sort_keys=False)
            write_text(folder / CONFIG_NAME, text)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, model = Path(resume_from_checkpoint), self.model if model is None else model
        if not load_model(self, folder, model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        refuse_code(folder)
        if not load_model(self, folder, self.model):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not load_optimizer(self, Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(state)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As ``Trainer``; a tied weight is not missing, because it is stored under its other name."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, write the manifest, and only then remove older checkpoints."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        with self.clock_stopped(), writing(folder):
            self._save_whole(folder, model, trial)

    def _save_whole(self, folder: Path, model: nn.Module, trial: Any) -> None:
        if self.args.should_save and folder.exists():
            # Incomplete files of a killed run must not mix with new ones.
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        whole = False
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(folder, self.run)
            whole = True
        finally:
            self.args.save_total_limit = limit
            if self.args.should_save and not whole:
                shutil.rmtree(folder, ignore_errors=True)
        if self.args.should_save:
            remove_old(folder, limit, self.state.best_model_checkpoint)
