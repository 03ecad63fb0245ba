"""Scores of placements: divergence from the teacher, held-out loss, and retrieval; one file each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from hybrid.ablate.metrics import parse_metric
from hybrid.data.collate import RowCollator
from hybrid.data.packing import Row
from hybrid.distill.stages import CHUNK, HIDDEN_ONLY
from hybrid.files import read_json, write_json
from hybrid.modeling.losses import next_tokens
from hybrid.modeling.model import HybridForCausalLM
from hybrid.search.models import LinearMixers, Models
from hybrid.search.placement import Placement
from hybrid_eval import Settings, Subject
from hybrid_eval.cells import cell_score
from hybrid_eval.lm_harness import resolve


@dataclass(frozen=True)
class Score:
    """What was measured of one placement.

    Attributes:
        kept: layers that keep softmax attention.
        kl: KL(teacher || placement), in nats per token.
        kl_error: its standard error over rows; None for one row.
        loss: held-out loss, in nats per token.
        recall: metric -> accuracy; empty where it was not asked for.
    """

    kept: tuple[int, ...]
    kl: float
    kl_error: float | None
    loss: float
    recall: dict[str, float] = field(default_factory=dict)

    @property
    def retrieval(self) -> float | None:
        """Return the mean over the metrics of recall; None without any."""
        values = self.recall.values()
        return math.fsum(values) / len(values) if values else None


@dataclass(frozen=True)
class Retrieval:
    """Metrics of retrieval and the settings of their tasks.

    Attributes:
        metrics: names as in ``hybrid ablate``: a task, or ``TASK@length=1024``.
        evaluate: settings of the tasks, as there.
        tokenizer: of the model.
    """

    metrics: tuple[str, ...]
    evaluate: Mapping[str, Any]
    tokenizer: Any

    def measure(self, model: HybridForCausalLM) -> dict[str, float]:
        """Return metric -> accuracy of a model."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in self.evaluate.items()
        }
        options: Any = values.pop("options", None) or {}
        settings = Settings(**values)
        subject = Subject("candidate", model, self.tokenizer, "object")
        asked = {name: parse_metric(name) for name in self.metrics}
        results: dict[str, Any] = {}
        for name in dict.fromkeys(metric.task for metric in asked.values()):
            task = resolve(name)[0]
            own = dict(options.get(name) or {})
            found = task.run(subject, settings, own, None)
            results[name] = {"task": name, "metric": task.metric, **found}
        return {
            name: cell_score(results[metric.task], dict(metric.cell)).value
            for name, metric in asked.items()
        }


class Scorer:
    """Measures placements; every score is a file, and is measured once.

    Args:
        models: models of the placements.
        rows: held-out rows.
        retrieval: metrics of recall, or None.
        out: folder of the scores.
        tell: called with a line for every new measurement.
    """

    def __init__(
        self,
        models: Models,
        rows: Sequence[Row],
        retrieval: Retrieval | None,
        out: Path,
        tell: Callable[[str], None],
    ) -> None:
        self.models, self.rows, self.retrieval = models, rows, retrieval
        self.out, self.tell = out, tell
        self.weights: dict[str, LinearMixers] = {"mixers": models.linear}
        self._targets: list[torch.Tensor] | None = None

    def score(self, kept: Placement, weights: str = "mixers", recall: bool = False) -> Score:
        """Return the score of a placement, from its file if it is there.

        Args:
            kept: the placement.
            weights: name of the linear mixers, a key of ``self.weights``.
            recall: whether retrieval is wanted; ignored without metrics.
        """
        recall = recall and self.retrieval is not None
        path = self.out / weights / f"{_name(kept)}.json"
        found = _read(path)
        if found is not None and (found.recall or not recall):
            return found
        model = self.models.build(kept, self.weights[weights])
        if found is None:
            found = self._held_out(model, kept)
        if recall:
            assert self.retrieval is not None
            measured = self.retrieval.measure(model)
            found = Score(found.kept, found.kl, found.kl_error, found.loss, measured)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(found), allow_nan=False)
        self.tell(f"{self.models.space.layout(kept)}: {words(found)}")
        return found

    @torch.no_grad()
    def _held_out(self, model: HybridForCausalLM, kept: Placement) -> Score:
        teacher = self.models.teacher
        if self._targets is None:
            self._targets = [_hidden(teacher.eval(), row) for row in self.rows]
        divergences, losses, counts = [], [], []
        for row, wanted in zip(self.rows, self._targets, strict=True):
            kl, loss, count = _compare(model, teacher, row, wanted)
            divergences.append(kl)
            losses.append(loss)
            counts.append(count)
        total = sum(counts)
        kl = math.fsum(divergences) / total
        rest = [d - kl * n for d, n in zip(divergences, counts, strict=True)]
        error = None
        if len(rest) > 1:
            spread = math.fsum(r * r for r in rest) * len(rest) / (len(rest) - 1)
            error = math.sqrt(spread) / total
        values = [kl, math.fsum(losses) / total]
        if not all(map(math.isfinite, values)):
            raise ValueError(
                f"layout {self.models.space.layout(kept)}: expected a finite loss, got {values[1]}; try"
                " distilling the linear mixers (`outputs:`) before the search"
            )
        return Score(tuple(sorted(kept)), kl, error, values[1])


def words(score: Score) -> str:
    """Return a score as a line."""
    recall = "".join(f", {name} {value:.3f}" for name, value in score.recall.items())
    return f"KL {score.kl:.4f}, loss {score.loss:.4f}{recall}"


def _name(kept: Placement) -> str:
    """Return the layers of a placement as the name of a file, as a hash where it would be long."""
    text = "-".join(map(str, sorted(kept))) or "none"
    return text if len(text) <= 120 else hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> Score | None:
    if not path.is_file():
        return None
    values = read_json(path)
    return Score(**{**values, "kept": tuple(values["kept"])})


def _inputs(row: Row, device: torch.device) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in RowCollator()([row]).items()}


def _hidden(model: HybridForCausalLM, row: Row) -> torch.Tensor:
    """Return the hidden states before the head, (T, D)."""
    inputs = _inputs(row, model.device)
    inputs.pop("labels")
    return model(**inputs, **HIDDEN_ONLY).last_hidden_state[0]


def _compare(
    model: HybridForCausalLM, teacher: HybridForCausalLM, row: Row, wanted: torch.Tensor
) -> tuple[float, float, int]:
    """Return KL divergence and loss of a row, summed over its predicted tokens, and their number."""
    found = _hidden(model, row)
    labels = next_tokens(_inputs(row, model.device)["labels"])[0]
    places = (labels >= 0).nonzero()[:, 0]
    kl = loss = 0.0
    for chunk in places.split(CHUNK):
        ours = F.log_softmax(model.compute_logits(found[chunk]).float(), dim=-1)
        theirs = F.log_softmax(teacher.compute_logits(wanted[chunk]).float(), dim=-1)
        kl += F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
        loss += F.nll_loss(ours, labels[chunk], reduction="sum").item()
    return kl, loss, len(places)
