"""Choice of the published family that a model of ours can be written as."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from transformers import PreTrainedConfig

from hybrid.convert.configs import to_theirs
from hybrid.convert.family import FAMILIES, Family, NotExpressible
from hybrid.convert.stack import blocks
from hybrid.modeling.model import HybridForCausalLM

logger = logging.getLogger(__name__)

# a family's config, and the model in the family's letters: see ``to_theirs``
_Written = tuple[PreTrainedConfig, HybridForCausalLM]


def fitting(model: HybridForCausalLM) -> tuple[list[str], dict[str, NotExpressible]]:
    """Return the families that fit a model, and for the others the reasons why they do not."""
    candidates, refused = _candidates(model, sorted(FAMILIES))
    return [*candidates], refused


def _candidates(
    model: HybridForCausalLM, names: Iterable[str]
) -> tuple[dict[str, _Written], dict[str, NotExpressible]]:
    """Run ``to_theirs`` for each of these families; return its result or its error."""
    fit, refused = {}, {}
    for name in names:
        try:
            fit[name] = to_theirs(FAMILIES[name], model)
        except NotExpressible as error:
            refused[name] = error
    return fit, refused


def only_fit(model: HybridForCausalLM) -> tuple[Family, PreTrainedConfig, HybridForCausalLM]:
    """Return the family to export to, with the result of ``to_theirs``; each family is tried once."""
    origin = model.config.imported_from
    known = [origin] if origin in FAMILIES else []
    candidates, refused = _candidates(model, known)
    if not candidates:
        candidates, others = _candidates(model, sorted(FAMILIES.keys() - {*known}))
        refused = {name: (refused | others)[name] for name in sorted(refused | others)}
        # hybrid families also fit plain softmax; prefer a family without other layer types
        full = {n: w for n, w in candidates.items() if _uses_all_of(FAMILIES[n], w[1])}
        candidates = full or candidates
    fit = [*candidates]
    if len(fit) == 1:
        if origin in refused:
            reason = _first(refused[origin].obstacles)
            logger.warning("written as %s, no longer as %s: %s", fit[0], origin, reason)
        return FAMILIES[fit[0]], *candidates[fit[0]]
    if fit:
        raise ValueError(
            f"this model fits the published architectures {', '.join(fit)}; choose one of them"
            " (--as on the command line)"
        )
    present = {part.name for block in blocks(model) for part in block.mixers}

    def distance(name: str) -> tuple[int, int]:
        return len(present - {*FAMILIES[name].letters.values()}), len(refused[name].obstacles)

    nearest = sorted(refused, key=distance)[:3]
    lines = [f"{name}: {_first(refused[name].obstacles)}" for name in nearest]
    raise NotExpressible("this model fits no published architecture; the nearest are", lines)


def _first(lines: Sequence[str]) -> str:
    return f"{lines[0]} (and {len(lines) - 1} more)" if len(lines) > 1 else lines[0]


def _uses_all_of(family: Family, model: HybridForCausalLM) -> bool:
    """Return whether a model has every mixer and feed-forward type of the family."""
    stack = blocks(model, family.literal)
    letters = {part.letter for block in stack for part in block.mixers}
    symbols = {block.ffn.letter for block in stack if block.ffn is not None}
    wanted = {symbol for rule in family.weights for symbol in rule.ffn}
    return letters >= set(family.letters) and symbols >= wanted
