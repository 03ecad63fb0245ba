"""Equal cost: find the width at which a variant costs the same as the baseline."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from hybrid.ablate.config import Match, present_at
from hybrid.config import yaml
from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.options import ConfigError
from hybrid.plan import plan
from hybrid.tokenizer import load_tokenizer
from hybrid.train.config import TrainConfig
from hybrid.train.model import model_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIDEST = 1 << 20  # upper bound of the search
GAP = 64  # number of consecutive widths that can be refused (by heads that do not divide them)


@dataclass(frozen=True)
class Cost:
    """The cost of a variant.

    Attributes:
        parameters: all parameters, tied ones once.
        flops_per_token: forward and backward, at the training length.
        cache_bytes: cache of one sequence at the ablation's context, keys in bfloat16.
        state_bytes: the part of the cache that does not grow with the context.
    """

    parameters: int
    flops_per_token: float
    cache_bytes: int
    state_bytes: int


def cost_of(config: TrainConfig, context: int) -> Cost | None:
    """Return the cost of a training configuration's model; None for a model of another package.

    Raises:
        ConfigError: the model does not fit its tokenizer or its rows.
    """
    made = model_config(config, _tokenizer(config.tokenizer))
    if not isinstance(made, HybridConfig):
        return None
    cost = plan(made, config.sequence_length)
    cache = cost.kv_bytes_per_token * context + cost.state_bytes
    return Cost(cost.parameters, cost.training_flops_per_token, cache, cost.state_bytes)


@lru_cache(maxsize=8)
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(name)


def solve(
    config: TrainConfig, match: Match, target: float
) -> tuple[dict[str, Any], int | None, float]:
    """Return the width whose cost is nearest to ``target``.

    Args:
        config: a variant, with any width.
        match: the cost to match, and the key of the width.
        target: the baseline's parameters or FLOPs.

    Returns:
        The model's keys with that width, the width, and the remaining relative difference. The
        width is None if it has no effect and the variant is within the tolerance.

    Raises:
        ValueError: no width is accepted, or the remaining difference is too large.
    """
    refusals: list[str] = []

    @cache
    def cost(width: int) -> float | None:
        try:
            return _measure(config.model_copy(update={"model": _set(config, match, width)}), match)
        except ConfigError as error:
            refusals.append(error.mistakes[0])
            return None

    own = _present(config, match)
    widths = nearest(cost, target, match.step, own)
    if not widths:
        why = f" ({refusals[-1]})" if refusals else ""
        raise ValueError(f"match.width: expected a {match.width} that the model accepts{why}")
    # a width may be refused (heads that do not divide it, too large a head)
    around = {cost(width) for width in (2 * widths[0], max(1, widths[0] // 2), match.step)}
    if around - {None} <= {cost(widths[0])}:
        left = _measure(config, match) / target - 1
        if abs(left) <= match.within:
            return config.model, None, left
        raise ValueError(f"{nothing_to_match(match)}, and {left:+.1%} of {match.cost} remains")
    # try the width of the variant first: a variant of equal cost keeps it
    mine = [] if own is None or cost(own) is None else [own]
    width = min([*mine, *widths], key=lambda w: abs((cost(w) or math.inf) - target))
    left = (cost(width) or math.inf) / target - 1
    if abs(left) > match.within:
        raise ValueError(
            f"match.within: expected a {match.width} within {match.within:.1%} of the {match.cost},"
            f" got {left:+.1%} for the nearest, {width}; {_way_out(cost, target, match, own)}"
        )
    return _set(config, match, width), width, left


def nothing_to_match(match: Match) -> str:
    """Return the message for a width that does not change the cost."""
    return f"match.width: nothing to match: {match.width} changes no {match.cost} here"


def _way_out(
    cost: Callable[[int], float | None], target: float, match: Match, start: int | None
) -> str:
    """Return a step, or else a tolerance, for which a width was found."""
    finer = [step for step in range(match.step, 0, -1) if match.step % step == 0]
    found = [
        (abs((cost(width) or math.inf) / target - 1), step, width)
        for step in finer
        for width in nearest(cost, target, step, start)
    ]
    fits = next((f for f in found if f[0] <= match.within), None)
    if fits is not None:
        return f"try match.step={fits[1]}, which finds {fits[2]}, within {fits[0]:.2%}"
    left, step, width = min(found, key=lambda f: (f[0], -f[1]))
    within = math.ceil(left * 1000) / 1000
    return f"try match.step={step} match.within={within:g}, with {width}, or another match.width"


def nearest(
    cost: Callable[[int], float | None], target: float, step: int, start: int | None
) -> list[int]:
    """Return the accepted multiples of ``step`` just below and above the target of a growing cost."""

    def accepted(count: int) -> int | None:
        near = range(count, count + GAP)
        return next((n for n in near if cost(n * step) is not None), None)

    def reached(count: int) -> float:
        found = accepted(count)
        return math.inf if found is None else cost(found * step) or 0.0

    top = max(1, (start or 8 * step) // step)
    while reached(top) < target and top * step < WIDEST:
        top *= 2
    place = 1 + bisect.bisect_left(range(1, top + 1), target, key=reached)
    above = accepted(place)
    below = next((n for n in range(place - 1, 0, -1) if cost(n * step) is not None), None)
    return [n * step for n in (below, above) if n is not None]


def _measure(config: TrainConfig, match: Match) -> float:
    found = cost_of(config, 1)
    if found is None:
        raise ConfigError(["match: expected a hybrid model, got another"])
    return float(found.parameters if match.cost == "parameters" else found.flops_per_token)


def _set(config: TrainConfig, match: Match, width: int) -> dict[str, Any]:
    """Return the model's keys with the width set."""
    return yaml.with_key({"model": dict(config.model)}, match.width, width)["model"]


def _present(config: TrainConfig, match: Match) -> int | None:
    """Return the width in a configuration, or None."""
    found = present_at({"model": config.model}, match.width)
    if found is None and match.width == "model.hidden_size":
        return HybridConfig.hidden_size
    return found if isinstance(found, int) else None
