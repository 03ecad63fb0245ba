"""Search by supernet: mixers trained under drawn placements, then placements searched by optuna.

Every layer holds both mixers, and each training step draws one of them in every layer, as in
one-shot architecture search (arXiv 1904.00420). A placement is then measured without training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from hybrid.search.bench import Bench, Proposals
from hybrid.search.learning import LearnChoices, learn, load_mixers
from hybrid.search.placement import Placement, Space
from hybrid.search.report import Table

STUDY = "study.log"

Direction = Literal["minimize", "maximize"]


class DrawMixers(LearnChoices):
    """Each step draws the mixer of every layer: softmax attention with probability ``share``.

    Args:
        share: expected share of the layers with softmax attention, 0..1.
        kwargs: arguments of ``LearnChoices``.
    """

    def __init__(self, *, share: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.share = share

    def draw(self) -> torch.Tensor:
        """Draw one mixer in every layer, a linear one in some layer; nothing is added to the loss."""
        generator = self.generator()
        drawn = torch.rand(len(self.choices), generator=generator) < self.share
        while drawn.all():  # there would be nothing to train
            drawn = torch.rand(len(self.choices), generator=generator) < self.share
        for choice, keep in zip(self.choices.values(), drawn.tolist(), strict=True):
            choice.keep = keep
        return torch.zeros(())


def open_study(path: Path, directions: Sequence[Direction], **options: Any) -> optuna.Study:
    """Open or continue a study that is kept in a file.

    Args:
        path: the file.
        directions: "minimize" or "maximize", for each value of a trial.
        options: of ``optuna.create_study``.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    return optuna.create_study(
        study_name="search",
        storage=JournalStorage(JournalFileBackend(str(path))),
        directions=list(directions),
        load_if_exists=True,
        **options,
    )


def finished(study: optuna.Study) -> int:
    """Return the number of trials with a result."""
    return len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.PRUNED]))


def placement_of(space: Space, keys: Mapping[str, float]) -> Placement:
    """Return the placement of one number a layer: the largest stay, as far as the budget goes."""
    order = sorted(space.layers, key=lambda i: (-keys[f"layer {i}"], i))
    return space.first(order)


def suggest(space: Space, trial: optuna.Trial) -> Placement:
    """Return the placement of a trial, whose parameters are one number a layer (random keys)."""
    names = [f"layer {i}" for i in space.layers]
    return placement_of(space, {name: trial.suggest_float(name, 0.0, 1.0) for name in names})


def keys_of(space: Space, kept: Placement) -> dict[str, float]:
    """Return parameters of a trial with this placement."""
    return {f"layer {i}": 0.75 if i in kept else 0.25 for i in space.layers}


def explore(
    space: Space,
    path: Path,
    measure: Callable[[Placement], Sequence[float]],
    directions: Sequence[Direction],
    *,
    trials: int,
    startup: int,
    seed: int,
    known: Sequence[Placement] = (),
) -> list[Placement]:
    """Search the placements at the budget with optuna's TPE sampler; return the best ones.

    Args:
        space: the placements.
        path: file of the study.
        measure: placement -> values.
        directions: "minimize" or "maximize", for each value.
        trials: number of placements to measure in all.
        startup: of them, drawn at random before the sampler learns from the others.
        seed: of the sampler.
        known: placements that are measured first.

    Returns:
        The placements that no other one dominates.
    """

    study = open_study(path, directions)
    study.sampler = optuna.samplers.TPESampler(
        seed=seed + finished(study), n_startup_trials=startup
    )
    for trial in study.get_trials(states=[TrialState.RUNNING]):  # cut off by an interruption
        if len(trial.params) == len(space.layers):
            study.tell(trial.number, measure(placement_of(space, trial.params)))
        else:
            study.tell(trial.number, state=TrialState.FAIL)
    if not study.trials:
        for kept in known[:trials]:
            study.enqueue_trial(keys_of(space, kept))
    while finished(study) < trials:
        asked = study.ask()
        study.tell(asked, measure(suggest(space, asked)))
    return list(dict.fromkeys(placement_of(space, trial.params) for trial in study.best_trials))


def propose(bench: Bench, proposals: Proposals) -> list[Table]:
    """Train the supernet, and propose the placements that optuna finds best with its mixers."""
    options, space, scorer = bench.config.supernet, bench.space, bench.scorer
    supernet = scorer.models.supernet()
    choices = scorer.models.choices(supernet)
    share = space.most / len(space.layers)
    trainer = partial(DrawMixers, share=share, **bench.learning(options, choices))
    stored = learn(bench.training("supernet"), supernet, trainer)
    linear: Any = {i: choice.branches[1] for i, choice in choices.items()}
    scorer.weights["supernet"] = load_mixers(linear, stored)
    recall = scorer.retrieval is not None

    def measure(kept: Placement) -> list[float]:
        score = scorer.score(kept, "supernet", recall)
        return [score.kl, *([] if score.retrieval is None else [score.retrieval])]

    best = explore(
        space,
        bench.out / "supernet" / STUDY,
        measure,
        ["minimize", *(["maximize"] if recall else [])],
        trials=options.trials,
        startup=options.startup,
        seed=bench.config.seed,
        known=[kept for kept in proposals.names if len(kept) == space.most],
    )
    for kept in best:
        proposals.add("supernet", kept)
    return []
