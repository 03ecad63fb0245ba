"""What the methods of a search share: models, rows, scores, and proposals."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import AutoModelForCausalLM

from hybrid.config.options import ConfigError
from hybrid.convert.replace_mixers import MixerReplacement
from hybrid.distill.runner import (
    DATA,
    START,
    distill,
    held_out_rows,
    load_teacher,
    start_student,
    tokenised,
)
from hybrid.files import read_json, write_json
from hybrid.modeling.model import HybridForCausalLM
from hybrid.search.config import LearningOptions, SearchFile, learning_stage
from hybrid.search.models import Choice, Models
from hybrid.search.placement import Placement, Space, check_layers, layout_string, measure_space
from hybrid.search.scores import Retrieval, Scorer
from hybrid.tokenizer import load_tokenizer
from hybrid.train import TrainConfig, build
from hybrid.train.checkpoints import refuse_changes

IDENTITY = "search_config.json"
SCORES = "scores"
MIXERS = "mixers"
HALVES = 2


def refuse_other_search(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse a folder whose results depend on other values.

    Args:
        path: the file that ``keep_identity`` wrote, if there is one.
        values: of this search.

    Raises:
        ConfigError: the file holds other values; one line for each key.
    """
    if path.is_file():
        refuse_changes(
            read_json(path),
            json.loads(json.dumps(values)),
            f"{path.parent} holds results of a different search, which this one cannot continue (put"
            " the keys back, remove the folder, or set another out); it",
        )


def keep_identity(path: Path, values: Mapping[str, Any]) -> None:
    """Write what results in a folder depend on, unless it is there; refuse other values as above."""
    refuse_other_search(path, values)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, values)


class Proposals:
    """Placements within the budget, with the names of the methods that proposed them.

    Attributes:
        names: placement -> names, in the order of the proposals.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.names: dict[Placement, list[str]] = {}

    def add(self, name: str, kept: Placement) -> None:
        """Add a placement, unless it is beyond the budget."""
        if self.space.fits(kept):
            names = self.names.setdefault(kept, [])
            if name not in names:
                names.append(name)


class Bench:
    """Teacher, all-linear student, held-out rows and scores of one search.

    Args:
        config: the search. Its student is distilled here, if the config asks for it.

    Attributes:
        layers: the searched layers.
        layout: the layout of the all-linear student.
        space: the placements.
        scorer: measures them.
    """

    def __init__(self, config: SearchFile) -> None:
        self.config, self.out = config, Path(config.out)
        plain = config.distillation(config.linear, self.out / MIXERS, {"outputs": {}})
        teacher = load_teacher(plain.teacher)
        self.layers = check_layers(teacher.config, config.layers)
        letters = [
            (config.linear,) if i in self.layers else layer.mixers
            for i, layer in enumerate(teacher.config.layers)
        ]
        self.layout = layout_string(teacher.config, letters)
        self.space = measure_space(
            teacher,
            MixerReplacement(teacher, self.layout, plain.mixers).model,
            self.layers,
            config.linear,
            most_layers=config.budget.layers,
            most_bytes=config.budget.cache,
            context=config.context,
        )
        self._check_counts()
        run, student = self._student(teacher)
        self.show = not run.training.get("disable_tqdm", False)
        moved: Any = teacher
        models = Models(moved.to(student.device), student, self.space)
        tokenizer = load_tokenizer(str(self.out / MIXERS / START))
        rows = held_out_rows(run, config.rows, tokenizer, teacher.config.vocab_size)
        retrieval = None
        if config.metrics:
            retrieval = Retrieval(tuple(config.metrics), config.evaluate, tokenizer)
        self.scorer = Scorer(models, rows, retrieval, self.out / SCORES, self.tell)

    @property
    def counts(self) -> list[int]:
        """Return the numbers of softmax layers to propose layouts for, the largest first."""
        if self.config.counts is not None:
            return sorted(self.config.counts, reverse=True)
        found = [self.space.most]
        while found[-1]:
            found.append(found[-1] // HALVES)
        return found

    def tell(self, line: str) -> None:
        """Print a line about the progress."""
        if self.show:
            print(line, file=sys.stderr)

    def learning(self, options: LearningOptions, choices: dict[int, Choice]) -> dict[str, Any]:
        """Return the arguments that the trainers of supernets share, but those of the run."""
        return {
            "choices": choices,
            "seed": self.config.seed,
            "replaced": self.layers,
            "teacher": self.scorer.models.teacher,
            "temperature": options.temperature,
        }

    def training(self, method: Literal["supernet", "gates"]) -> TrainConfig:
        """Return the training of a method, into a folder of its own."""
        config, folder = self.config, self.out / method
        keep_identity(folder / IDENTITY, config.learning(method))
        stage = learning_stage(getattr(config, method))
        settings = config.distillation(self.layout, folder, stage)
        run = settings.stages["logits"]
        start = self.out / MIXERS / START
        data = tokenised(run, start, self.out / MIXERS / DATA, self.tell)
        model = {"path": str(start), "dtype": settings.teacher.dtype}
        own = {"model": model, "tokenizer": str(start), "data": data, "eval_data": []}
        return run.model_copy(update=own)

    def _student(self, teacher: HybridForCausalLM) -> tuple[TrainConfig, HybridForCausalLM]:
        """Return the all-linear student, distilled if asked for, and the training that would do so."""
        stage = self.config.distill.get("outputs")
        settings = self.config.distillation(
            self.layout, self.out / MIXERS, {"outputs": {} if stage is None else stage}
        )
        run = settings.stages["outputs"]
        device = build.training_arguments(run).device
        folder = start_student(settings, teacher)
        if stage is not None:
            folder = Path(distill(settings)["model"])
        student: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=settings.teacher.dtype)
        return run, student.to(device).requires_grad_(False).eval()

    def _check_counts(self) -> None:
        most = self.space.most
        wrong = [count for count in self.config.counts or () if count > most]
        if wrong:
            raise ConfigError(
                [
                    f"counts: expected numbers of layers within the budget, at most {most}, got {wrong}"
                ]
            )
