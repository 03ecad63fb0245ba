"""transformers' `Trainer` with rows by index, trusted checkpoints and our parameter groups."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from hybrid.mup import growths
from hybrid.train.checkpoints import CheckpointError, write_manifest
from hybrid.train.config import MuonConfig
from hybrid.train.expert_load import ExpertLoad
from hybrid.train.optim import Decay, Several, decaying, groups, matrices
from hybrid.train.probes import Probe, Probes
from hybrid.train.progress import LossWatch, Progress
from hybrid.train.schedule import MultiStepConfig
from hybrid.train.throughput import peak_flops

CONFIG_NAME = "train_config.yaml"


class HybridTrainer(Trainer):
    """`Trainer` for data whose row i is a function of i.

    Args:
        tokens_per_step: tokens that one optimizer step sees, all processes together.
        flops_per_token: forward and backward, for `mfu`; None where it is not known.
        muon: options of Muon, or None for the optimizer that `args.optim` names.
        decay: what has weight decay beside matrices.
        multi_step: that schedule, or None for the one that `args.lr_scheduler_type` names.
        resolved: the configuration, saved beside every checkpoint.
        run: what the manifest of a checkpoint records of the run.
        probes: asked while the run trains.
        kwargs: of `Trainer`.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops(self.args)
        self.muon = muon
        self.decay = decay
        self.multi_step = multi_step
        self.resolved = dict(resolved)
        self.run = dict(run)
        self.probes = list(probes)
        self._clock: tuple[float, int] | None = None
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.expert_load = ExpertLoad()
        self.add_callback(self.expert_load)
        self.add_callback(Probes(self, self.probes))
        # The watch first: the bar shows what is logged.
        self.add_callback(LossWatch())
        self.add_callback(Progress())

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        """Rows in their own order, which the mixture has drawn; `Trainer` skips by index."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """See `hybrid.train.optim`."""
        return decaying(model, self.decay)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Muon for matrices where the config asks for it, `Trainer`'s choice for all else."""
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
        """The multi-step schedule where the config asks for it, else `Trainer`'s by name."""
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
        """As `Trainer`, without a cache: transformers' models mind document boundaries only then."""
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer`; starts the clock."""
        if self._clock is None:
            self._clock = time.perf_counter(), self.state.global_step
        return super().training_step(*args, **kwargs)

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What happens here is not time that training takes."""
        clock, before = self._clock, time.perf_counter()
        yield
        if clock is not None:
            self._clock = clock[0] + time.perf_counter() - before, clock[1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `tokens_per_second` and `mfu` since the last log, without saving and evaluating.

        And for experts what `ExpertLoad` has of their load.
        """
        if "loss" in logs and self._clock is not None:
            before, since = self._clock
            steps, seconds = self.state.global_step - since, time.perf_counter() - before
            logs["tokens_per_second"] = steps * self.tokens_per_step / seconds
            if (used := self.utilisation(logs["tokens_per_second"])) is not None:
                logs["mfu"] = used
        if "loss" in logs:
            logs.update(self.expert_load.summary())
            callbacks = self.callback_handler.callbacks
            boards = [c.tb_writer for c in callbacks if getattr(c, "tb_writer", None) is not None]
            self.expert_load.write(self.args, self.state, boards)
        super().log(logs, start_time)
        self._clock = None

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation (MFU), 0..1; None where the device's peak is not known."""
        if self.flops_per_token is None or self.peak_flops is None:
            return None
        return self.flops_per_token * tokens_per_second / self.peak_flops

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            text = yaml.safe_dump(self.resolved, sort_keys=False)
            (folder / CONFIG_NAME).write_text(text, encoding="utf-8")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As `Trainer`; a tied weight is not missing, it is stored under its other name."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, mark as whole, and only then let older checkpoints go."""
        self._clock = None
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            # What a killed run left half-written must not mix with what we write.
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(folder, self.run)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and not _of_torch_save(error):
                raise
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(
                f"cannot write {folder} ({error}); earlier checkpoints are kept: make room and"
                " start the same command again"
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(self.args.output_dir),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )


def _of_torch_save(error: RuntimeError) -> bool:
    """Whether an error comes from torch's zip writer, which a full disk stops with a RuntimeError."""
    return any(part in str(error) for part in ("PytorchStreamWriter", "inline_container"))
