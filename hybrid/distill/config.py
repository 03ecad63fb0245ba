"""The configuration of a distillation: typed, with every mistake named before anything is computed."""

# ruff: noqa: RUF009  (`option` is `dataclasses.field` with a help text)

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid.config.options import ConfigError, build, did_you_mean, option
from hybrid.layout import LayoutError, parse
from hybrid.train import TrainConfig, yaml
from hybrid.train import parse_config as parse_training

STAGES = ("outputs", "logits", "language")
"""The stages, in their order."""

PARTS = ("replaced", "kept", "ffn", "norms", "embeddings")
"""What a stage can hold still: new mixers, the other mixers, feed-forwards, norms of the stream, and
embeddings with the head."""

# Keys of a training config that all stages have in common.
COMMON = ("data", "eval_data", "sequence_length", "packing", "long_documents", "device")


@dataclass(frozen=True)
class TeacherConfig:
    """Where the teacher is: exactly one of `path` and `package`."""

    path: str | None = option(None, help="a folder, or the name of one on the hub")
    package: str | None = option(None, help="an installed Python package whose folder holds it")
    gguf_file: str | None = option(None, help="a GGUF file of that folder")
    dtype: str = option("float32", help="of its weights, and of the student's")

    @property
    def folder(self) -> str:
        """`path`, or the folder of `package`.

        Raises:
            ConfigError: no such package is installed.
        """
        if self.package is None:
            return str(self.path)
        spec = importlib.util.find_spec(self.package) if self.package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            name = self.package.replace("_", "-")
            raise ConfigError([f"teacher.package: no package {self.package!r}; pip install {name}"])
        return spec.submodule_search_locations[0]


@dataclass(frozen=True)
class StageConfig:
    """What every stage has: what it holds still, and how it trains."""

    freeze: list[str] = option(default_factory=list, help=f"of {', '.join(PARTS)}")
    training: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "as `training:`, over what all stages have"}
    )


@dataclass(frozen=True)
class OutputsStage(StageConfig):
    """Stage 1: each new mixer gives what the one that it replaces gives, for the teacher's inputs."""

    freeze: list[str] = option(
        default_factory=lambda: ["kept", "ffn", "norms", "embeddings"],
        help="only the new mixers take part",
    )
    solve_rows: int = option(
        0, help="rows on which output projections are first solved for, by least squares; 0: none"
    )


@dataclass(frozen=True)
class LogitsStage(StageConfig):
    """Stage 2: the KL divergence of the student's next tokens from the teacher's."""

    temperature: float = option(1.0, help="that both logits are divided by")


@dataclass(frozen=True)
class LanguageStage(StageConfig):
    """Stage 3: language modelling."""


_CLASSES = {"outputs": OutputsStage, "logits": LogitsStage, "language": LanguageStage}


@dataclass(frozen=True)
class DistillConfig:
    """What `hybrid.distill.distill` needs; the YAML file has the same keys.

    `stages` holds for each stage what it trains with, ready for `hybrid.train.run` but for the model.
    """

    teacher: TeacherConfig
    layout: str
    mixers: dict[str, dict[str, Any]]
    output_dir: str
    eval_rows: int
    knockout_rows: int
    outputs: OutputsStage | None
    logits: LogitsStage | None
    language: LanguageStage | None
    stages: dict[str, TrainConfig]

    def stage(self, name: str) -> StageConfig:
        """The settings of a stage that takes place."""
        found = getattr(self, name)
        assert found is not None
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for comparison with those of a run that is to be continued."""
        values = dataclasses.asdict(dataclasses.replace(self, stages={}))
        return values | {"stages": {name: s.as_dict() for name, s in self.stages.items()}}


@dataclass(frozen=True)
class _File:
    """The keys of the file."""

    teacher: dict[str, Any] = option(help="see TeacherConfig")
    layout: str = option(help="of the student; letters that the teacher has keep their layers")
    data: Any = option(help="as of a training config")
    eval_data: Any = option(help="as of a training config: what the losses are taken on")
    sequence_length: int = option(help="tokens of a row")
    mixers: dict[str, dict] | None = option(None, help="letter -> options over those inherited")
    eval_rows: int = option(32, help="rows of eval_data")
    knockout_rows: int = option(16, help="of them, for the knock-out of each branch; 0: none")
    packing: Any = option("concatenate", help="as of a training config")
    long_documents: str = option("split", help="as of a training config")
    device: str = option("auto", help="as of a training config")
    output_dir: str = option("runs/distill", help="folder for all that comes out")
    training: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] | None = option(None, help="stage 1; null: none")
    logits: dict[str, Any] | None = option(None, help="stage 2; null: none")
    language: dict[str, Any] | None = option(None, help="stage 3; null: none")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """A YAML file, with `key=value` overrides, as a checked configuration.

    Args:
        path: the file. Its name gives the default `output_dir`, `runs/NAME`.
        overrides: e.g. `layout=SSSL`, `outputs.training.max_steps=10`; values are YAML.

    Raises:
        ConfigError: with one line for each mistake.
    """
    values = yaml.apply_overrides(yaml.read(path), overrides)
    values.setdefault("output_dir", str(Path("runs") / Path(path).stem))
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], title: str = "the config") -> DistillConfig:
    """Plain values as a checked configuration; the mistakes of all parts are reported together.

    Raises:
        ConfigError: with one line for each mistake.
    """
    mistakes: list[str] = []
    file = build(_File, values, "", mistakes)
    if file is None:
        raise ConfigError(mistakes, title)
    teacher = build(TeacherConfig, file.teacher, "teacher", mistakes)
    if teacher is not None:
        mistakes += _teacher_mistakes(teacher)
    try:
        parse(file.layout)
    except LayoutError as error:
        mistakes.append(str(error))
    stages = {}
    for name in STAGES:
        given = getattr(file, name)
        stage = None if given is None else build(_CLASSES[name], given, name, mistakes)
        stages[name] = stage
        if stage is not None:
            mistakes += _stage_mistakes(name, stage)
    if all(stage is None for stage in stages.values()):
        mistakes.append(f"no stage: give at least one of {', '.join(STAGES)}")
    runs = _runs(file, stages, mistakes)
    mistakes += [
        f"{key}: expected at least {least}, found {getattr(file, key)}"
        for key, least in (("eval_rows", 1), ("knockout_rows", 0))
        if getattr(file, key) < least
    ]
    if mistakes or teacher is None:
        raise ConfigError(mistakes, title)
    common = {key: getattr(file, key) for key in ("layout", "output_dir", "eval_rows")}
    return DistillConfig(
        teacher=teacher,
        mixers=file.mixers or {},
        knockout_rows=min(file.knockout_rows, file.eval_rows),
        stages=runs,
        **stages,
        **common,
    )


def _teacher_mistakes(teacher: TeacherConfig) -> list[str]:
    if (teacher.path is None) == (teacher.package is None):
        return ["teacher: give exactly one of path and package"]
    try:
        folder = Path(teacher.folder)
    except ConfigError as error:
        return error.mistakes
    if teacher.gguf_file is None or not folder.is_dir() or (folder / teacher.gguf_file).is_file():
        return []
    there = sorted(path.name for path in folder.glob("*.gguf"))
    return [f"teacher.gguf_file: {folder} has no {teacher.gguf_file!r}; it holds {there or 'none'}"]


def _stage_mistakes(name: str, stage: StageConfig) -> list[str]:
    lines = [
        f"{name}.freeze: no part {part!r}, {did_you_mean(str(part), PARTS)}"
        for part in stage.freeze
        if part not in PARTS
    ]
    if set(stage.freeze) == set(PARTS):
        lines.append(f"{name}.freeze: holds everything still; nothing would train")
    if isinstance(stage, OutputsStage):
        others = [part for part in PARTS if part != "replaced"]
        if sorted(stage.freeze) != sorted(others):
            lines.append(f"{name}.freeze: only the new mixers take part; leave it out")
        if stage.solve_rows < 0:
            lines.append(f"{name}.solve_rows: expected at least 0, found {stage.solve_rows}")
    if isinstance(stage, LogitsStage) and not stage.temperature > 0:
        lines.append(f"{name}.temperature: expected above 0, found {stage.temperature}")
    return lines


def _runs(
    file: _File, stages: Mapping[str, StageConfig | None], mistakes: list[str]
) -> dict[str, TrainConfig]:
    """The training config of each stage; a mistake that all share is named once."""
    runs: dict[str, TrainConfig] = {}
    seen: set[str] = set()
    for number, (name, stage) in enumerate(stages.items()):
        if stage is None:
            continue
        training = {**file.training, **stage.training}
        if "output_dir" in training:
            mistakes.append(f"{name}.training.output_dir: every stage has a folder of its own")
        # each stage sees rows of its own
        seed = training.get("seed", 42)
        training.setdefault("data_seed", seed + number if isinstance(seed, int) else number)
        training["output_dir"] = str(Path(file.output_dir) / name)
        given = {key: getattr(file, key) for key in COMMON}
        try:
            # which model is known when the stage before has ended
            values = {"model": {"path": "."}, "training": training, **given}
            runs[name] = parse_training(values, name)
        except ConfigError as error:
            fresh = [line for line in error.mistakes if line not in seen]
            seen.update(fresh)
            mistakes += [f"{name}.{x}" if x.startswith("training") else x for x in fresh]
    return runs
