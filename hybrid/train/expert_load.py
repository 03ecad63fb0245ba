"""The load of experts during training: update biases, log the imbalance, write histograms."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hybrid.ffn import balance
from hybrid.files import write_text
from hybrid.train.checkpoints import writing

FILE = "expert_load.jsonl"


class ExpertLoad(TrainerCallback):
    """Callback that ends each optimizer step of ``hybrid.ffn.balance`` and sums loads between two
    logs.

    Works with any ``Trainer`` and any model of this package; has no effect on models without
    experts.
    """

    def __init__(self) -> None:
        self.loads: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Drop histograms of steps that a resumed run repeats."""
        path = Path(str(args.output_dir)) / FILE
        if state.is_world_process_zero and path.is_file():
            # the last line of a killed run may be incomplete
            lines = [
                x for x in path.read_text(encoding="utf-8").splitlines(True) if x.endswith("\n")
            ]
            kept = [x for x in lines if json.loads(x)["step"] <= state.global_step]
            write_text(path, "".join(kept))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Update the biases and add the counts."""
        for name, load in balance.finish_step(kwargs["model"]).items():
            self.loads[name] = self.loads[name] + load if name in self.loads else load

    def summary(self) -> dict[str, float]:
        """Return the values to log since the last log; empty without experts.

        ``expert_imbalance`` is the load of the busiest expert divided by the mean load, minus one
        (MaxVio of arXiv 2408.15664), in the layer where it is largest. ``expert_idle_share`` is the
        share of experts, over all layers, without a token. No token is ever dropped: experts have
        no capacity.
        """
        if not self.loads:
            return {}
        worst = max((x.max() / x.mean().clamp(min=1e-20)).item() for x in self.loads.values())
        idle = torch.cat([x == 0 for x in self.loads.values()]).float().mean().item()
        return {"expert_imbalance": worst - 1, "expert_idle_share": idle}

    def write(
        self, args: TrainingArguments, state: TrainerState, writers: Iterable[Any] = ()
    ) -> None:
        """Append one line to ``expert_load.jsonl``, the tokens of each expert by router, and reset
        the counts.

        ``writers`` of TensorBoard get one histogram per router over the expert indices.
        """
        loads, self.loads = self.loads, {}
        if not loads or not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        counts = {name: [int(n) for n in load.tolist()] for name, load in loads.items()}
        path = folder / FILE
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "load": counts}) + "\n")
        for writer in writers:
            for name, load in counts.items():
                _add_histogram(writer, f"expert_load/{name}", load, state.global_step)


def _add_histogram(writer: Any, tag: str, load: list[int], step: int) -> None:
    """Write expert i as a bar from i to i + 1.

    The sums are those of the expert indices, one per token.
    """
    tokens = list(enumerate(load))
    writer.add_histogram_raw(
        tag,
        min=0,
        max=len(load),
        num=sum(load),
        sum=sum(i * n for i, n in tokens),
        sum_squares=sum(i * i * n for i, n in tokens),
        bucket_limits=[i + 1 for i, _ in tokens],
        bucket_counts=load,
        global_step=step,
    )
