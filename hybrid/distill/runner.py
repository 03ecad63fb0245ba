"""Run a distillation: from a configuration to a student and a report."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid.checkpoint_paths import check_weights
from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.options import ConfigError
from hybrid.convert import from_published
from hybrid.convert.checkpoint import new_folder
from hybrid.convert.replace_mixers import replace_mixers
from hybrid.data.documents import INDEX
from hybrid.data.packing import Row
from hybrid.data.preparation import prepare
from hybrid.data.sources import SourceConfig, plugins
from hybrid.distill import report as words
from hybrid.distill.config import (
    DistillConfig,
    LanguageStage,
    LogitsStage,
    OutputsStage,
    TeacherConfig,
)
from hybrid.distill.measure import knock_outs, output_errors, row_losses
from hybrid.distill.parts import replaced_layers
from hybrid.distill.stages import LanguageModelling, MatchLogits, MatchOutputs
from hybrid.files import read_json, write_json
from hybrid.locks import sole_writer
from hybrid.modeling.model import HybridForCausalLM
from hybrid.tokenizer import load_tokenizer
from hybrid.train import TrainConfig, build, run
from hybrid.train.checkpoints import refuse_changes
from hybrid.train.runner import RESULT

START = "student"  # the student before the first stage
DATA = "data"  # tokenised training data
CONFIG = "distill_config.json"
ERROR_ROWS = 4  # rows on which the error of each new mixer is measured


def distill(config: DistillConfig) -> dict[str, Any]:
    """Run a distillation, or continue an interrupted one.

    Writes to ``output_dir``: ``student``, the model before the first stage; a folder for each stage
    with a complete model and its tokenizer; ``report.json`` and ``report.md``.

    Returns:
        The report, with the content of ``report.json``.

    Raises:
        ConfigError: the configuration cannot be run here, or the folder belongs to another run.
            Raised before any computation.
        ValueError: the teacher cannot be read, or its layers cannot be replaced. Raised before any
            computation.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(["processes: expected 1 for a distillation, got more; try no launcher"])
    _refuse_ignored_keys(config)
    out = Path(config.output_dir)
    with sole_writer(out), torch.random.fork_rng():
        _refuse_other_run(out, config)
        teacher = load_teacher(config.teacher)
        start = start_student(config, teacher)
        write_json(out / CONFIG, config.as_dict())
        return _Distillation(config, teacher, start).go()


def load_teacher(where: TeacherConfig) -> HybridForCausalLM:
    """Return the teacher, without gradients: a published model, or a hybrid model.

    Raises:
        ValueError: it does not exist or cannot be read.
    """
    path = Path(check_weights(where.folder))
    ours = path.is_dir() and where.gguf_file is None and (path / "config.json").is_file()
    model: Any
    if ours and read_json(path / "config.json").get("model_type") == HybridConfig.model_type:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=where.dtype)
    else:
        model = from_published(where.folder, dtype=where.dtype, gguf_file=where.gguf_file)
    return model.requires_grad_(False).eval()


def start_student(config: DistillConfig, teacher: HybridForCausalLM) -> Path:
    """Write the student before the first stage, with the teacher's tokenizer; return its folder.

    Raises:
        ConfigError: the layout changes nothing, or the tokenizer cannot be loaded.
        ValueError: layers that cannot be replaced.
    """
    start = Path(config.output_dir) / START
    if start.is_dir():
        return start
    student = replace_mixers(teacher, config.layout, config.mixers)
    if not replaced_layers(teacher, student):
        raise ConfigError(
            [
                f"layout: expected a new mixer, got {config.layout!r}, which keeps the teacher's layers"
            ]
        )
    extra = {} if config.teacher.gguf_file is None else {"gguf_file": config.teacher.gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.teacher.folder, **extra)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ConfigError([f"teacher: expected a tokenizer, got {reason}"]) from error
    with new_folder(start) as made:
        student.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return start


def _refuse_ignored_keys(config: DistillConfig) -> None:
    """Refuse label smoothing in stages without labels, whose target is the teacher."""
    mistakes = [
        f"{name}.training.label_smoothing_factor: expected 0 in a stage without labels, got"
        f" {smoothing}; try language.training.label_smoothing_factor"
        for name, stage in config.stages.items()
        if not isinstance(config.stage(name), LanguageStage)
        and (smoothing := stage.training.get("label_smoothing_factor"))
    ]
    if mistakes:
        raise ConfigError(mistakes)


def _refuse_other_run(out: Path, config: DistillConfig) -> None:
    path = out / CONFIG
    if not path.is_file():
        return
    refuse_changes(
        read_json(path),
        json.loads(json.dumps(config.as_dict())),
        f"{out} belongs to a different run, and this one cannot continue it (put the keys back,"
        " remove the folder, or set another output_dir); it",
    )


def tokenised(
    settings: TrainConfig, tokenizer: Path, out: Path, say: Callable[[str], None]
) -> list[SourceConfig]:
    """Return the sources of a run, with finite texts tokenised once into folders of ``out``.

    Args:
        settings: the run.
        tokenizer: folder of its tokenizer.
        out: a source that is there is not tokenised again.
        say: called with a line for each source.
    """
    found = []
    for number, source in enumerate(settings.data):
        prepared = (Path(source.source) / INDEX).is_file() or source.source in plugins()
        if prepared or source.streaming:
            found.append(source)
            continue
        folder = out / str(number)
        if not (folder / INDEX).is_file():
            say(f"tokenising {source.source}")
            options = {key: getattr(source, key) for key in ("text_key", "split", "name")}
            prepare(source.source, folder, tokenizer=str(tokenizer), **options)
        found.append(SourceConfig(source=str(folder), weight=source.weight))
    return found


def held_out_rows(settings: TrainConfig, count: int, tokenizer: Any, vocabulary: int) -> list[Row]:
    """Return the first ``count`` rows of the ``eval_data`` of a run."""
    seed = build.training_arguments(settings).seed
    opened = build.open_sources(
        settings.eval_data, "eval_data", settings, tokenizer, vocabulary, seed
    )
    rows: Any = build.mixture(opened, settings.eval_data, count, seed, vocabulary)
    return [rows[i] for i in range(count)]


class _Distillation:
    """State common to all stages: teacher, data, losses and report."""

    def __init__(self, config: DistillConfig, teacher: Any, start: Path) -> None:
        self.config, self.start, self.out = config, start, Path(config.output_dir)
        self.tokenizer = load_tokenizer(str(start))
        first = next(iter(config.stages.values()))
        self.args = build.training_arguments(first)
        self.show = not self.args.disable_tqdm
        self.teacher: HybridForCausalLM = teacher.to(self.args.device)
        self.replaced = replaced_layers(teacher, self._load(start))
        count = self.config.eval_rows
        self.rows = held_out_rows(first, count, self.tokenizer, teacher.config.vocab_size)
        path = self.out / words.JSON
        self.report = read_json(path) if path.is_file() else self._empty()

    def go(self) -> dict[str, Any]:
        """Measure, train each stage, measure again; return the report."""
        if "teacher" not in self.report["losses"]:
            self._say("measuring the teacher")
            self.report["losses"]["teacher"] = row_losses(self.teacher, self.rows, self.show).mean
        self._measure("student", self.start)
        folder = self.start
        for name in self.config.stages:
            folder = self._stage(name, folder)
            self._measure(name, folder)
        if self.config.knockout_rows and "knock_outs" not in self.report:
            self._knock_out(folder)
        self.report["model"] = str(folder)
        words.write(self.report, self.out)
        return self.report

    def _stage(self, name: str, before: Path) -> Path:
        """Train a stage unless it is complete; return the folder of the student after it."""
        folder = self.out / name
        if not (folder / RESULT).is_file():
            settings = self.config.stages[name]
            own = {
                "model": {"path": str(before), "dtype": self.config.teacher.dtype},
                "tokenizer": str(self.start),
                "data": tokenised(settings, self.start, self.out / DATA, self._say),
                "eval_data": [],
            }
            training = settings.model_copy(update=own)
            self._say(f"stage {name}: from {before} to {folder}")
            run(training, self._trainer(name))
        self.report["seconds"][name] = read_json(folder / RESULT)["seconds"]
        return folder

    def _trainer(self, name: str) -> Callable[..., LanguageModelling]:
        stage = self.config.stage(name)
        common: dict[str, Any] = {"replaced": self.replaced, "freeze": stage.freeze}
        if isinstance(stage, OutputsStage):
            own = {"teacher": self.teacher, "solve_rows": stage.solve_rows}
            return partial(MatchOutputs, **common, **own)
        if isinstance(stage, LogitsStage):
            own = {"teacher": self.teacher, "temperature": stage.temperature}
            return partial(MatchLogits, **common, **own)
        return partial(LanguageModelling, **common)

    def _measure(self, name: str, folder: Path) -> None:
        """Measure the loss of a student and the errors of its new mixers, unless already measured."""
        if name in self.report["losses"]:
            return
        student = self._load(folder)
        self._say(f"measuring {folder}")
        self.report["losses"][name] = row_losses(student, self.rows, self.show).mean
        if name in ("student", "outputs"):
            errors = output_errors(self.teacher, student, self.replaced, self.rows[:ERROR_ROWS])
            self.report["output_errors"][name] = {str(i): e for i, e in errors.items()}
        words.write(self.report, self.out)

    def _knock_out(self, folder: Path) -> None:
        student, rows = self._load(folder), self.rows[: self.config.knockout_rows]
        self._say("knocking out one branch after the other")
        whole = row_losses(student, rows, self.show)
        branches = knock_outs(student, self.replaced, rows, whole, self.show)
        self.report["knock_outs"] = [
            {**dataclasses.asdict(branch), "idle": branch.idle} for branch in branches
        ]

    def _load(self, folder: Path) -> HybridForCausalLM:
        dtype = self.config.teacher.dtype
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.to(self.args.device).eval()

    def _empty(self) -> dict[str, Any]:
        where = self.config.teacher
        return {
            "teacher": where.gguf_file or where.path or where.package,
            "teacher_layout": self.teacher.config.layout,
            "layout": self.config.layout,
            "eval_rows": len(self.rows),
            "knockout_rows": self.config.knockout_rows,
            "sequence_length": len(self.rows[0]["input_ids"]),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "losses": {},
            "output_errors": {},
            "seconds": {},
        }

    def _say(self, text: str) -> None:
        if self.show:
            print(text, file=sys.stderr)
