"""The model of the tests: five softmax layers, of which one matters."""

from hybrid.layout import parse
from hybrid.search.placement import measure_space

LAYERS, MATTERS, BEST = 5, 3, "DDDSD"


def letters(layout):
    return "".join(str(layer) for layer in parse(layout).layers)


def proposed(report, method):
    """Layouts that a method proposed with exactly one softmax layer."""
    return [
        letters(p["layout"])
        for p in report["points"]
        if p["softmax_layers"] == 1 and any(m.startswith(method) for m in p["methods"])
    ]


def space_of(pair, **budget):
    limits = {"most_layers": None, "most_bytes": None} | budget
    return measure_space(*pair, tuple(range(LAYERS)), "D", context=256, **limits)
