"""One search from a configuration to layouts on the frontier."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import AutoModelForCausalLM

from hybrid.config.options import ConfigError
from hybrid.distill.config import DistillConfig
from hybrid.distill.runner import (
    DATA,
    START,
    distill,
    held_out_rows,
    load_teacher,
    start_student,
    tokenised,
)
from hybrid.files import read_json, write_json, write_text
from hybrid.locks import sole_writer
from hybrid.modeling.model import HybridForCausalLM
from hybrid.search import gates, importance, report
from hybrid.search.config import LearningOptions, SearchFile, learning_stage
from hybrid.search.learning import GATES, learn, load_mixers
from hybrid.search.models import Choice, Models
from hybrid.search.placement import (
    Placement,
    Space,
    check_layers,
    layout_string,
    measure_space,
)
from hybrid.search.scores import Retrieval, Score, Scorer
from hybrid.search.supernet import STUDY, DrawMixers, explore
from hybrid.terminal import Interrupted
from hybrid.tokenizer import load_tokenizer
from hybrid.train import TrainConfig
from hybrid.train.checkpoints import refuse_changes

IDENTITY = "search_config.json"
SCORES = "scores"
MIXERS = "mixers"
DISTILLATION = "distill.yaml"
HALVES = 2

Proposals = dict[Placement, list[str]]
"""Placement -> names of the methods that proposed it."""


def search(config: SearchFile) -> dict[str, Any]:
    """Search for the softmax layers that should stay; the same call continues an interrupted one.

    ``config.out`` receives every score (``scores/``), the distilled linear mixers (``mixers/``),
    ``report.json``, ``report.md``, ``layouts.csv``, ``frontier.png`` and ``distill.yaml``, the
    configuration of the printed commands.

    Returns:
        The report, as ``report.json`` holds it.

    Raises:
        ConfigError: the configuration cannot be run here, or the folder holds another search.
        ValueError: the teacher cannot be read, or its layers cannot be replaced.
        Interrupted: Ctrl-C; all scores are kept.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(["a search runs in one process; start it without a launcher"])
    out = Path(config.out)
    with sole_writer(out), torch.random.fork_rng():
        same_as_before(out / IDENTITY, config.identity())
        try:
            return _Search(config).go()
        except Interrupted:
            raise
        except KeyboardInterrupt as error:
            done = sum(1 for _ in (out / SCORES).rglob("*.json"))
            raise Interrupted(
                f"interrupted; {done} scores in {out} are kept: start the same command again to go on"
            ) from error


def same_as_before(path: Path, values: Mapping[str, Any]) -> None:
    """Write what results in a folder depend on; refuse another one.

    Raises:
        ConfigError: the file holds other values; one line for each key.
    """
    values = json.loads(json.dumps(values))
    if path.is_file():
        refuse_changes(
            read_json(path),
            values,
            f"{path.parent} holds results of a different search, which this one cannot continue (put"
            " the keys back, remove the folder, or set another out); it",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, values)


class _Search:
    """The parts that the methods share."""

    def __init__(self, config: SearchFile) -> None:
        self.config, self.out = config, Path(config.out)
        plain = config.distillation(config.linear, self.out / MIXERS, {"outputs": {}})
        teacher = load_teacher(plain.teacher)
        self.layers = check_layers(teacher.config, config.layers)
        student, settings = self._student(teacher)
        moved: Any = teacher
        teacher = moved.to(student.device)
        self.space = measure_space(
            teacher,
            student,
            self.layers,
            config.linear,
            most_layers=config.budget.layers,
            most_bytes=config.budget.cache,
            context=config.context,
        )
        self._check_counts()
        models = Models(teacher, student, self.space)
        self.tokenizer = load_tokenizer(str(self.out / MIXERS / START))
        first = next(iter(settings.stages.values()))
        rows = held_out_rows(first, config.rows, self.tokenizer, teacher.config.vocab_size)
        retrieval = None
        if config.metrics:
            retrieval = Retrieval(tuple(config.metrics), config.evaluate, self.tokenizer)
        self.settings = first
        self.scorer = Scorer(models, rows, retrieval, self.out / SCORES, self.tell)
        self.show = not first.training.get("disable_tqdm", False)

    def go(self) -> dict[str, Any]:
        """Run the methods, score what they propose, and write the report."""
        self._write_distillation()
        proposals: Proposals = {}
        for count in self.counts:
            if count:
                self._propose(proposals, f"uniform {count}", self.space.uniform(count))
                self._propose(proposals, f"last {count}", self.space.last(count))
        tables: list[Any] = []
        for method in self.config.methods:
            tables += getattr(self, f"_{method}")(proposals)
        weights = "supernet" if "supernet" in self.config.methods else "mixers"
        recall = self.scorer.retrieval is not None
        points = [
            self._point(self.scorer.score(kept, weights, recall), names)
            for kept, names in proposals.items()
        ]
        whole = self.scorer.score(self.space.complete, recall=recall)
        points.append({**self._point(whole, ["teacher"]), "command": None})
        return report.finish(self._report(points, weights, tables), self.out)

    def _point(self, score: Score, names: list[str]) -> dict[str, Any]:
        kept = frozenset(score.kept)
        return {
            "layout": self.space.layout(kept),
            "kept": list(score.kept),
            "softmax_layers": len(kept),
            "cache_bytes": self.space.cache_bytes(kept),
            "fits": self.space.fits(kept),
            "loss": score.loss,
            "kl": score.kl,
            "kl_error": score.kl_error,
            **score.recall,
            "methods": names,
            "command": self._command(kept),
        }

    def _report(
        self, points: list[dict[str, Any]], weights: str, tables: list[Any]
    ) -> dict[str, Any]:
        config, rows = self.config, self.scorer.rows
        where = config.distill["teacher"]
        teacher = next(where[k] for k in ("gguf_file", "path", "package") if where.get(k))
        trained = {
            "mixers": "as they are after `outputs`, without any training for a layout",
            "supernet": "those of the supernet",
        }
        return {
            "name": config.name,
            "about": f"Which softmax layers of {teacher} (layout {self.space.config.layout}) should"
            f" stay, and which become {config.linear}?",
            "budget": budget_words(self.space),
            "metrics": list(config.metrics),
            "context": config.context,
            "points": points,
            "tables": tables,
            "weights": weights,
            "footer": f"All layouts are scored with the same linear mixers: {trained[weights]}. Loss and"
            f" KL divergence from the teacher: nats per token on {len(rows)} held-out rows of"
            f" {len(rows[0]['input_ids'])} tokens, +- standard error over rows. Seed {config.seed}.",
        }

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

    def _importance(self, proposals: Proposals) -> list[Any]:
        options, space, scorer = self.config.importance, self.space, self.scorer
        recall = scorer.retrieval is not None
        measures = [m for m in options.rank if m == "kl" or recall]
        alone = importance.without_each(space, scorer, recall and "recall" in measures)
        for measure in measures:
            order = importance.ranking(alone, measure)
            for count in self.counts:
                self._propose(proposals, f"rank by {measure}", space.first(order, count))
        for direction in options.greedy:
            if direction == "backward":
                path = importance.backward(space, scorer, options, alone)
            else:
                path = importance.forward(space, scorer, options)
            fitting = [kept for kept in path if space.fits(kept)]
            wanted = {*self.counts, max(map(len, fitting))}
            for kept in fitting:
                if len(kept) in wanted:
                    self._propose(proposals, f"greedy {direction}", kept)
        whole = scorer.score(space.complete, recall=recall)
        return [importance.table(alone, whole)]

    def _supernet(self, proposals: Proposals) -> list[Any]:
        options, space, scorer = self.config.supernet, self.space, self.scorer
        models = scorer.models
        supernet = models.supernet()
        choices = models.choices(supernet)
        share = space.most / len(space.layers)
        trainer = partial(DrawMixers, share=share, **self._learning(options, choices))
        stored = learn(self._run("supernet"), supernet, trainer)
        linear: Any = {i: choice.branches[1] for i, choice in choices.items()}
        scorer.weights["supernet"] = load_mixers(linear, stored)
        recall = scorer.retrieval is not None

        def measure(kept: Placement) -> list[float]:
            score = scorer.score(kept, "supernet", recall)
            return [score.kl, *([] if score.retrieval is None else [score.retrieval])]

        known = [kept for kept in proposals if len(kept) == space.most]
        best = explore(
            space,
            self.out / "supernet" / STUDY,
            measure,
            ["minimize", *(["maximize"] if recall else [])],
            trials=options.trials,
            startup=options.startup,
            seed=self.config.seed,
            known=known,
        )
        for kept in best:
            self._propose(proposals, "supernet", kept)
        return []

    def _gates(self, proposals: Proposals) -> list[Any]:
        options, space = self.config.gates, self.space
        models = self.scorer.models
        supernet = models.supernet()
        choices = models.choices(supernet)
        logits = torch.full((len(space.layers),), gates.START, device=supernet.device)
        parameter = torch.nn.Parameter(logits)
        supernet.register_parameter("gates", parameter)
        trainer = partial(
            gates.LearnGates,
            space=space,
            penalty=options.penalty,
            tau=options.temperature_of_gates,
            gate_learning_rate=options.learning_rate,
            gates=parameter,
            **self._learning(options, choices),
        )
        learnt = learn(self._run("gates"), supernet, trainer)[GATES]
        values = dict(zip(space.layers, learnt.tolist(), strict=True))
        order = sorted(values, key=lambda i: values[i], reverse=True)
        for count in self.counts:
            self._propose(proposals, "gates", space.first(order, count))
        return [gates.table(values, options.temperature_of_gates)]

    def _learning(self, options: LearningOptions, choices: dict[int, Choice]) -> dict[str, Any]:
        """Return the arguments that the trainers of supernets share, but those of the run."""
        return {
            "choices": choices,
            "seed": self.config.seed,
            "replaced": self.layers,
            "teacher": self.scorer.models.teacher,
            "temperature": options.temperature,
        }

    def _run(self, method: Literal["supernet", "gates"]) -> TrainConfig:
        """Return the training of a method, into a folder of its own."""
        config, folder = self.config, self.out / method
        same_as_before(folder / IDENTITY, config.learning(method))
        stage = learning_stage(getattr(config, method))
        settings = config.distillation(self.layout, folder, stage)
        run = settings.stages["logits"]
        start = self.out / MIXERS / START
        data = tokenised(run, start, self.out / MIXERS / DATA, self.tell)
        model = {"path": str(start), "dtype": settings.teacher.dtype}
        own = {"model": model, "tokenizer": str(start), "data": data, "eval_data": []}
        return run.model_copy(update=own)

    def _propose(self, proposals: Proposals, name: str, kept: Placement) -> None:
        if not self.space.fits(kept):
            return
        names = proposals.setdefault(kept, [])
        if name not in names:
            names.append(name)

    def _student(self, teacher: HybridForCausalLM) -> tuple[HybridForCausalLM, DistillConfig]:
        """Return the model with the linear mixer in all searched layers, distilled if asked for."""
        config = self.config
        letters = [
            (config.linear,) if i in self.layers else layer.mixers
            for i, layer in enumerate(teacher.config.layers)
        ]
        self.layout = layout = layout_string(teacher.config, letters)
        stage = config.distill.get("outputs")
        settings = config.distillation(
            layout, self.out / MIXERS, {"outputs": {} if stage is None else stage}
        )
        folder = start_student(settings, teacher)
        if stage is not None:
            folder = Path(distill(settings)["model"])
        student: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=settings.teacher.dtype)
        device = "cpu" if settings.stages["outputs"].device == "cpu" else None
        student = student.to(device or _device()).requires_grad_(False).eval()
        return student, settings

    def _check_counts(self) -> None:
        most = self.space.most
        wrong = [count for count in self.config.counts or () if count > most]
        if wrong:
            raise ConfigError(
                [
                    f"counts: expected numbers of layers within the budget, at most {most}, got {wrong}"
                ]
            )

    def _write_distillation(self) -> None:
        """Write the configuration of the printed commands."""
        values = {k: v for k, v in self.config.distill.items() if k != "output_dir"}
        values["layout"] = self.space.layout(self.space.first(self.layers))
        text = "# Written by `hybrid search`; its commands set layout and output_dir.\n"
        write_text(
            self.out / DISTILLATION, text + yaml.safe_dump(values, sort_keys=False, width=100)
        )

    def _command(self, kept: Placement) -> list[str]:
        """Return the words of the command that distils a placement."""
        layout = self.space.layout(kept)
        try:
            plain = yaml.safe_load(layout) == layout
        except yaml.YAMLError:
            plain = False
        name = "-".join(map(str, sorted(kept))) or "none"
        place = self.out / "distilled" / (name if len(name) <= 120 else f"{len(kept)}-layers")
        return [
            *("hybrid", "distill", str(self.out / DISTILLATION)),
            *(f"layout={layout if plain else json.dumps(layout)}", f"output_dir={place}"),
        ]


def _device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def budget_words(space: Space) -> str:
    """Return the budget as text."""
    if space.most_bytes is None:
        return f"at most {space.most_layers} of {len(space.layers)} layers stay softmax attention"
    return f"a cache of at most {space.most_bytes:,} bytes at {space.context:,} tokens"
