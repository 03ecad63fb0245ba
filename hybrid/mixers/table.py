"""Generator of ``docs/mixers.md``: `python -m hybrid.mixers.table > docs/mixers.md`."""

from __future__ import annotations

import torch

from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.registry import mixers
from hybrid.plan import Plan, plan

HIDDEN_SIZE, CONTEXT = 1024, 4096

HEAD = f"""# Mixers

Generated from the registry by `python -m hybrid.mixers.table`; a test checks that both agree.

The state of a linear mixer is S_t = G_t * S_(t-1) + v_t k_t^T and its output is o_t = S_t q_t, unless
the formula differs. Sizes and costs are those of one layer with default options at D = {HIDDEN_SIZE},
without a feed-forward: parameters; forward FLOPs per token with projections, as a mean over {CONTEXT}
tokens; cache elements of fixed size; cache elements per token.

| symbol | mixer | formula | paper | parameters | FLOPs per token | state | per token | used by |
|---|---|---|---|---|---|---|---|---|
"""


def markdown() -> str:
    """Return the whole page."""
    return HEAD + "".join(_row(name) for name in _ours())


def _ours() -> list[str]:
    """Return the mixers of this package in the order of registration, those with a symbol first."""
    names = [n for n in mixers.names() if mixers.get(n).__module__.startswith("hybrid.mixers.")]
    return sorted(names, key=lambda name: mixers.get(name).symbol is None)


def _row(name: str) -> str:
    cls = mixers.get(name)
    cost = _cost(name)
    state = cost.state_bytes // 4  # weights and states are both counted in float32
    cells = [
        f"`{cls.symbol}`" if cls.symbol else "",
        f"`{name}`",
        f"`{cls.formula}`",
        cls.paper,
        f"{cost.parameters - cost.embedding_parameters:,}",
        f"{cost.flops_per_token:,.0f}",
        f"{state:,}",
        f"{cost.kv_bytes_per_token // 4:,}",
        cls.used_by,
    ]
    return f"| {' | '.join(cells)} |\n"


def _cost(name: str) -> Plan:
    """Return the plan of one layer of the mixer; a vocabulary of one token adds almost nothing."""
    config = HybridConfig(
        layout="Q", ffn="", hidden_size=HIDDEN_SIZE, vocab_size=1, mixers={"Q": {"type": name}}
    )
    return plan(config, context=CONTEXT, dtype=torch.float32)


if __name__ == "__main__":
    print(markdown(), end="")
