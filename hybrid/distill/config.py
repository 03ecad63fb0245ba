"""The configuration of a distillation: typed; all mistakes are reported before training starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from hybrid.config import yaml
from hybrid.config.declare import Count0, Declared, Positive, Size, Text, parse, refuse
from hybrid.config.options import ConfigError
from hybrid.layout import LayoutError
from hybrid.layout import parse as parse_layout
from hybrid.train import TrainConfig
from hybrid.train import parse_config as parse_training
from hybrid.train.config import RowsConfig, Sources
from hybrid.train.limits import training_values

STAGES = ("outputs", "logits", "language")
"""The stages, in their order."""

Part = Literal["replaced", "kept", "ffn", "norms", "embeddings"]
"""Parts of the student that a stage can freeze: new mixers, other mixers, feed-forwards, norms of
the residual
stream, and embeddings with the head."""

PARTS: tuple[Part, ...] = ("replaced", "kept", "ffn", "norms", "embeddings")


def _stage_training(values: dict[str, Any]) -> dict[str, Any]:
    if "output_dir" in values:
        refuse(["output_dir: expected none, since each stage has its own folder; remove the key"])
    return training_values(values)


def _check_layout(text: str) -> str:
    try:
        parse_layout(text)
    except LayoutError as error:
        refuse([str(error).removeprefix("layout")])
    return text


Training = Annotated[dict[str, Any], AfterValidator(_stage_training)]


class TeacherConfig(Declared):
    """Location of the teacher: exactly one of ``path`` and ``package``."""

    path: Text | None = Field(None, description="a folder, or the name of a hub repository")
    package: Text | None = Field(
        None, description="an installed Python package whose folder contains the teacher"
    )
    gguf_file: Text | None = Field(None, description="a GGUF file of that folder")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="dtype of the weights of teacher and student"
    )

    @property
    def folder(self) -> str:
        """Return ``path``, or the folder of ``package``.

        Raises:
            ConfigError: the package is not installed.
        """
        if self.package is None:
            return str(self.path)
        spec = importlib.util.find_spec(self.package) if self.package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            name = self.package.replace("_", "-")
            raise ConfigError(
                [
                    f"teacher.package: expected an installed package, got {self.package!r}; try pip"
                    f" install {name}"
                ]
            )
        return spec.submodule_search_locations[0]

    @model_validator(mode="after")
    def _one_place(self) -> TeacherConfig:
        if (self.path is None) == (self.package is None):
            refuse([": expected exactly one of path and package"])
        try:
            folder = Path(self.folder)
        except ConfigError as error:
            refuse([line.removeprefix("teacher.") for line in error.mistakes])
            raise
        name = self.gguf_file
        if name is not None and folder.is_dir() and not (folder / name).is_file():
            there = sorted(path.name for path in folder.glob("*.gguf"))
            refuse([f"gguf_file: expected a file of {folder} ({there or 'none'}), got {name!r}"])
        return self


def _as_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class StageConfig(Declared):
    """Keys of every stage: frozen parts and training arguments."""

    freeze: list[Part] = Field(default_factory=list, description=f"of {', '.join(PARTS)}")
    training: Training = Field(
        default_factory=dict, description="as `training:`; overrides the keys common to all stages"
    )

    @field_validator("freeze")
    @classmethod
    def _something_trains(cls, freeze: list[Part]) -> list[Part]:
        if set(freeze) == set(PARTS):
            refuse([": expected at least one part to train, got all parts frozen"])
        return freeze


class OutputsStage(StageConfig):
    """Stage 1: each new mixer learns the output of the mixer that it replaces, on the teacher's
    inputs.
    """

    freeze: list[Part] = Field(
        default_factory=lambda: [part for part in PARTS if part != "replaced"],
        description="always empty: only the new mixers are trained",
    )
    solve_rows: int = Field(
        0,
        ge=0,
        le=1 << 28,
        description="rows of the initial least-squares solution of the output projections; 0: none",
    )

    @field_validator("freeze")
    @classmethod
    def _only_new_mixers(cls, freeze: list[Part]) -> list[Part]:
        if sorted(freeze) != sorted(part for part in PARTS if part != "replaced"):
            refuse([": expected none, since only the new mixers are trained; remove the key"])
        return freeze


class LogitsStage(StageConfig):
    """Stage 2: the KL divergence between the next-token distributions of student and teacher."""

    temperature: Positive = Field(1.0, description="divisor of the logits of teacher and student")


class LanguageStage(StageConfig):
    """Stage 3: language modelling."""


class DistillFile(RowsConfig):
    """The keys of the YAML file."""

    teacher: Annotated[TeacherConfig, BeforeValidator(_as_path)] = Field(
        description="location of the teacher; text is its path"
    )
    layout: Annotated[Text, AfterValidator(_check_layout)] = Field(
        description="layout of the student; letters of the teacher's layout keep their layers"
    )
    eval_data: Annotated[Sources, Field(min_length=1)] = Field(
        description="held-out data for the losses, as in a training config"
    )
    mixers: dict[str, dict[str, Any]] | None = Field(
        None, description="letter -> options that override the inherited ones"
    )
    eval_rows: Size = Field(32, description="number of evaluated rows of eval_data")
    knockout_rows: Count0 = Field(
        16, description="how many of these rows to evaluate without each branch; 0: none"
    )
    output_dir: Text = Field("runs/distill", description="folder of all outputs")
    training: Training = Field(
        default_factory=dict, description="keys of TrainingArguments for all stages"
    )
    outputs: OutputsStage | None = Field(None, description="stage 1; null: none")
    logits: LogitsStage | None = Field(None, description="stage 2; null: none")
    language: LanguageStage | None = Field(None, description="stage 3; null: none")

    @model_validator(mode="after")
    def _some_stage(self) -> DistillFile:
        if all(getattr(self, name) is None for name in STAGES):
            refuse([f": expected at least one of {', '.join(STAGES)}, got none"])
        return self


class DistillConfig(Declared):
    """The configuration of ``hybrid.distill.distill``; ``DistillFile`` has the keys of the YAML
    file.

    ``stages`` has the training configuration of each stage, complete except for the model.
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
        """Return the settings of an enabled stage."""
        found = getattr(self, name)
        assert found is not None
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, to compare with those of a run to resume."""
        values = self.model_dump(exclude={"stages"})
        return values | {"stages": {name: s.as_dict() for name, s in self.stages.items()}}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a YAML file, apply ``key=value`` overrides, and return the checked configuration.

    Args:
        path: the file. Its name is the default of ``output_dir``: ``runs/NAME``.
        overrides: e.g. ``layout=SSSL``, ``outputs.training.max_steps=10``; values are YAML.

    Raises:
        ConfigError: with one line for each mistake.
    """
    values = yaml.apply_overrides(yaml.read(path), overrides)
    values.setdefault("output_dir", str(Path("runs") / Path(path).stem))
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], title: str = "the config") -> DistillConfig:
    """Check plain values and return the configuration; report the mistakes of all parts together.

    Raises:
        ConfigError: with one line for each mistake.
    """
    file = parse(DistillFile, values, title)
    stages = {name: getattr(file, name) for name in STAGES}
    return DistillConfig(
        teacher=file.teacher,
        layout=file.layout,
        mixers=file.mixers or {},
        output_dir=file.output_dir,
        eval_rows=file.eval_rows,
        knockout_rows=min(file.knockout_rows, file.eval_rows),
        stages=_runs(file, stages, title),
        **stages,
    )


def _runs(
    file: DistillFile, stages: Mapping[str, StageConfig | None], title: str
) -> dict[str, TrainConfig]:
    """Return the training config of each enabled stage."""
    runs: dict[str, TrainConfig] = {}
    mistakes: list[str] = []
    common = {key: getattr(file, key) for key in RowsConfig.model_fields}
    for number, (name, stage) in enumerate(stages.items()):
        if stage is None:
            continue
        training = {**file.training, **stage.training}
        # each stage uses different rows
        training.setdefault("data_seed", training.get("seed", 42) + number)
        training["output_dir"] = str(Path(file.output_dir) / name)
        try:
            # the model is known after the previous stage
            values = {"model": {"path": "."}, "training": training, **common}
            runs[name] = parse_training(values, name)
        except ConfigError as error:  # conflicts between common keys and keys of the stage
            mistakes += [f"{name}.{line}" for line in error.mistakes]
    if mistakes:
        raise ConfigError(mistakes, title)
    return runs
