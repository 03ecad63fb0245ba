"""Expand an ablation to its variants: the enabled changes, the width and the cost of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hybrid.ablate.config import ALL_BUT, Ablation, Sweep, flat, train_config, with_overrides
from hybrid.ablate.grid import Cell, cells, short
from hybrid.ablate.matching import Cost, cost_of, nothing_to_match, solve
from hybrid.config.options import ConfigError
from hybrid.train.config import TrainConfig

Kind = Literal["alone", "leave-one-out"]


@dataclass(frozen=True)
class Variant:
    """One configuration, trained with every seed.

    Attributes:
        name: ``baseline``, a change's name, ``all``, or ``all-but-NAME``; in a grid with the cell,
            ``baseline@pairs=16``.
        base_name: the name without the cell.
        changes: names of the enabled changes.
        config: the training configuration; each run sets seed and folder.
        width: the solved value of ``match``; None without ``match``, or if the width has no effect.
        cost: None for a model of another package.
        difference: relative difference of the matched cost to the baseline's; without a match, of
            the parameters.
        cell: cell of the grid.
        evaluate: settings of the evaluation.
        trials: the same variant with each value of a sweep; the first seed selects one.
        value: the swept value of a trial; None otherwise.
    """

    name: str
    base_name: str
    changes: tuple[str, ...]
    config: TrainConfig
    width: int | None
    cost: Cost | None
    difference: float | None
    cell: Cell = field(default_factory=Cell)
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    trials: tuple[Variant, ...] = ()
    value: Any = None


@dataclass(frozen=True)
class Contrast:
    """Two variants that differ in one change: ``changed`` has it, ``unchanged`` does not."""

    change: str
    kind: Kind
    changed: str
    unchanged: str
    cell: str = ""


@dataclass(frozen=True)
class Design:
    """All variants, and the pairs that measure each change."""

    ablation: Ablation
    variants: list[Variant]
    contrasts: list[Contrast]

    @property
    def out(self) -> Path:
        """Return the folder of the runs and the report."""
        return Path(self.ablation.out)

    def folder(self, variant: Variant, seed: int) -> Path:
        """Return the folder of one run."""
        return self.out / variant.name / f"seed-{seed}"

    def runs(self) -> Iterator[tuple[Variant, int, Path]]:
        """Return variant, seed and folder of each run, ordered by seed, so that early results have
        pairs.

        A sweep has every trial with the first seed, and the variant with the other seeds.
        """
        for number, seed in enumerate(self.ablation.seeds):
            for variant in self.variants:
                tried = variant.trials if number == 0 and variant.trials else (variant,)
                for trial in tried:
                    yield trial, seed, self.folder(trial, seed)

    def every_run(self) -> Iterator[tuple[Variant, int, Path]]:
        """Return ``runs``, and all runs of any trial that a sweep can select."""
        for variant in self.variants:
            for trial in variant.trials or (variant,):
                for seed in self.ablation.seeds:
                    yield trial, seed, self.folder(trial, seed)


def plan_runs(ablation: Ablation) -> Design:
    """Return the design of an ablation; models are built on the meta device only.

    Raises:
        ConfigError: changes that cannot be combined, or a cost that cannot be matched.
    """
    mistakes = _conflicts(ablation)
    if mistakes:
        raise ConfigError(mistakes, f"ablation {ablation.name!r}")
    variants: list[Variant] = []
    contrasts: list[Contrast] = []
    for cell in cells(ablation.grid):
        sets, own = _layout(ablation, cell)
        contrasts += own
        variants += _cell_variants(ablation, cell, sets, mistakes)
    match = ablation.match
    # a variant without the width is not matched; it is a mistake if no variant has the width
    if match is not None and not mistakes and all(v.width is None for v in variants):
        mistakes.append(nothing_to_match(match))
    if mistakes:
        raise ConfigError(mistakes, f"ablation {ablation.name!r}")
    return Design(ablation, variants, contrasts)


def _cell_variants(
    ablation: Ablation, cell: Cell, sets: dict[str, tuple[str, ...]], mistakes: list[str]
) -> list[Variant]:
    """Return the variants of one cell of the grid, the baseline first."""
    variants: list[Variant] = []
    for name, changes in sets.items():
        base = variants[0] if variants else None
        shown = named(name, cell)
        try:
            variants.append(_variant(ablation, name, changes, base, cell))
        except ConfigError as error:
            mistakes += [f"{shown}: {line}" for line in error.mistakes]
        except ValueError as error:
            mistakes.append(f"{shown}: {error}")
        if not variants:
            break  # no baseline to compare with
    return variants


def named(name: str, cell: Cell) -> str:
    """Return the name of a variant in a cell of the grid."""
    return f"{name}@{cell.name}" if cell.name else name


def _layout(ablation: Ablation, cell: Cell) -> tuple[dict[str, tuple[str, ...]], list[Contrast]]:
    """Return name -> changes of every variant, each set of changes once, and the contrasts of a
    cell.
    """

    def contrast(change: str, kind: Kind, changed: str, unchanged: str) -> Contrast:
        return Contrast(change, kind, named(changed, cell), named(unchanged, cell), cell.name)

    every = tuple(ablation.changes)
    sets: dict[str, tuple[str, ...]] = {"baseline": ()}
    sets |= {name: (name,) for name in every}
    contrasts = [contrast(name, "alone", name, "baseline") for name in every]
    if not ablation.leave_one_out or len(every) < 2:
        return sets, contrasts
    sets["all"] = every
    for name in every:
        rest = tuple(other for other in every if other != name)
        # with two changes, all but one equals the other alone
        same = next((n for n, changes in sets.items() if changes == rest), None)
        if same is None:
            same = ALL_BUT + name
            sets[same] = rest
        contrasts.append(contrast(name, "leave-one-out", "all", same))
    return sets, contrasts


def _conflicts(ablation: Ablation) -> list[str]:
    """Return a line for each pair of combined changes that set one key differently."""
    if not ablation.leave_one_out:
        return []
    lines = []
    given = [(name, flat(change)) for name, change in ablation.changes.items()]
    for number, (name, keys) in enumerate(given):
        for other, theirs in given[:number]:
            for key, value in keys.items():
                for their_key, their_value in theirs.items():
                    if _clash(key, value, their_key, their_value):
                        lines.append(
                            f"changes.{name}: expected other keys than in changes.{other}, got"
                            f" {min(key, their_key)} in both; try leave_one_out: false to compare"
                            " each with the baseline only"
                        )
    return lines


def _clash(key: str, value: Any, other: str, other_value: Any) -> bool:
    if key == other:
        return value != other_value
    return key.startswith(other + ".") or other.startswith(key + ".")


def _variant(
    ablation: Ablation, name: str, changes: tuple[str, ...], base: Variant | None, cell: Cell
) -> Variant:
    mistakes: list[str] = []
    values = with_overrides(ablation.baseline, cell.overrides, f"grid {cell.name}: ", mistakes)
    for change in changes:
        values = with_overrides(values, ablation.changes[change], change, mistakes)
    evaluate = with_overrides(ablation.evaluate, cell.evaluate, "evaluate", mistakes)
    config = train_config(values, "together: " if changes else "", mistakes)
    if config is None or mistakes:
        raise ConfigError(mistakes, name)
    width = difference = None
    if ablation.match is not None and base is not None:
        assert base.cost is not None
        on = ablation.match.cost
        target = base.cost.parameters if on == "parameters" else base.cost.flops_per_token
        model, width, difference = solve(config, ablation.match, float(target))
        config = config.model_copy(update={"model": model})
    cost = cost_of(config, ablation.context)
    if cost is None and ablation.match is not None:
        raise ValueError("match: expected a hybrid model, got another")
    if difference is None and cost is not None:
        difference = cost.parameters / base.cost.parameters - 1 if base and base.cost else 0.0
    full = named(name, cell)
    made = Variant(full, name, changes, config, width, cost, difference, cell, evaluate)
    return made if ablation.sweep is None else _with_trials(made, ablation.sweep)


def _with_trials(variant: Variant, sweep: Sweep) -> Variant:
    """Return the variant with a trial for every value of a sweep."""
    trials = []
    for value in sweep.values:
        mistakes: list[str] = []
        values = with_overrides(variant.config.as_dict(), {sweep.key: value}, "sweep", mistakes)
        config = train_config(values, f"sweep.values {value!r}: ", mistakes)
        if config is None or mistakes:
            raise ConfigError(mistakes, variant.name)
        name = f"{variant.name}@{short(sweep.key)}={value}"
        trials.append(replace(variant, name=name, config=config, value=value))
    return replace(variant, trials=tuple(trials))
