"""The summary sentence of a report, computed from its figures, and the glossary."""

from collections.abc import Iterator, Sequence
from typing import Any

from .contrast import attention_share, comparison, corrected
from .pictures import human_bytes, human_tokens
from .pool import Record

_BLIND = 0.1  # score above chance below which a model is called blind


def roles(models: Sequence[Record]) -> dict[str, Record]:
    """Return the first hybrid model, the first with softmax layers only, and the first without
    softmax.

    Models with unknown mixers and knock-outs are ignored.
    """
    found: dict[str, Record] = {}
    for record in models:
        share = attention_share(record)
        if share is None or record.get("ablate"):
            continue
        found.setdefault("full" if share == 1 else "state" if share == 0 else "hybrid", record)
    return found


def _task(results: Record, axis: str, key: str | None = None) -> str | None:
    """Return the first task of an axis that every model has, with this figure."""
    first = results["models"][0]["results"]
    for name, result in first.items():
        there = all(name in model["results"] for model in results["models"])
        if result["axis"] == axis and there and (key is None or key in result):
            return name
    return None


def _difference(model: Record, other: Record, task: str) -> tuple[float, bool] | None:
    """Return the difference of two models, and whether its interval excludes 0."""
    found = comparison(model, other, task)
    if found is None:
        return None
    low, high = found.interval
    return found.difference, low > 0 or high < 0


def _kept(hybrid: Record, full: Record, task: str) -> str:
    mine, other = (corrected(record["results"][task])[0] for record in (hybrid, full))
    figures = " against ".join(f"{r['results'][task]['accuracy']:.2f}" for r in (hybrid, full))
    names = hybrid["name"], full["name"]
    if other <= _BLIND:
        return f"on {task} {names[0]} scores {figures} of {names[1]}, which has not learnt it"
    return f"{names[0]} keeps {mine / other:.0%} of the recall of {names[1]} ({task}: {figures})"


def _text_cost(hybrid: Record, full: Record, task: str) -> str:
    found = _difference(hybrid, full, task)
    unit = hybrid["results"][task]["metric"].replace("_", " ")
    if found is None:
        return ""
    difference, apart = found
    if not apart:
        return f"at the same loss on text, as far as can be told ({difference:+.3f} {unit})"
    return f"at {abs(difference):.3f} {unit} {'more' if difference > 0 else 'less'} on text"


def _memory(hybrid: Record, full: Record) -> str:
    mine, other = (record["results"]["cost"] for record in (hybrid, full))
    share = mine["cache_bytes"] / other["cache_bytes"]
    sizes = f"{human_bytes(mine['cache_bytes'])} against {human_bytes(other['cache_bytes'])}"
    return f"with {share:.0%} of its cache at {human_tokens(mine['context'])} tokens ({sizes})"


def _state(state: Record, beside: Record, recall: str | None, text: str | None) -> str:
    """Describe the recall and the text loss of a model without softmax layers."""
    parts = []
    found = None if text is None else _difference(state, beside, text)
    if found is not None and text is not None:
        unit = state["results"][text]["metric"].replace("_", " ")
        difference, apart = found
        better = "better" if difference < 0 else "worse"
        parts.append(
            f"is {better} on text than {beside['name']} ({difference:+.3f} {unit})"
            if apart
            else f"is as good on text as {beside['name']} ({difference:+.3f} {unit})"
        )
    if recall is not None:
        value, low, _ = corrected(state["results"][recall])
        score = f"{recall}: {state['results'][recall]['accuracy']:.2f}"
        blind = value < _BLIND
        words = f"blind to recall ({score}" if blind else f"recalls part of it ({score}"
        if blind and low <= 0:
            words += f", a guesser {state['results'][recall]['chance']:.2f}"
        parts.append(f"{words})")
    words = "".join(parts)
    joined = (" but " if "blind" in words and "better" in words else " and ").join(parts)
    return f"{state['name']}, without softmax layers, {joined}" if parts else ""


def headline(results: Record) -> str:
    """Return a summary of the results in one or two sentences; empty without a comparison."""
    found = roles(results["models"])
    hybrid, full, state = (found.get(role) for role in ("hybrid", "full", "state"))
    recall, text = _task(results, "retrieval", "chance"), _task(results, "language")
    sentences = []
    if hybrid and full:
        parts = [] if recall is None else [_kept(hybrid, full, recall)]
        tail = [] if text is None else [_text_cost(hybrid, full, text)]
        if all("cost" in record["results"] for record in (hybrid, full)):
            tail.append(_memory(hybrid, full))
        tail = [part for part in tail if part]
        if not parts and tail:
            parts = [f"{hybrid['name']} stands against {full['name']}"]
        if parts:
            sentences.append(
                " ".join([parts[0] + ("," if tail else ""), " and ".join(tail)]).strip()
            )
    if state and (hybrid or full):
        sentences.append(_state(state, hybrid or full or state, recall, text))
    return " ".join(f"{s[0].upper() if s[:1].islower() else s[:1]}{s[1:]}." for s in sentences if s)


def seed_note(results: Record) -> str:
    """Describe the number of seeds of each model, and how to run three."""
    trained = [m for m in results["models"] if m.get("layout") and not m.get("ablate")]
    if len(trained) < 2:
        return ""
    counts = sorted({len(model.get("seeds", (0,))) for model in trained})
    if counts == [1]:
        return (
            "Each layout was trained once: a difference between two of them holds the luck of one "
            "initialisation and one order of the data, which the intervals do not show. Train each with "
            "training.seed=0, 1 and 2 and evaluate them together as 'NAME seed 0', 'NAME seed 1' and "
            "'NAME seed 2' (the quickstart does all of it with --seeds 0,1,2): each layout is then one "
            "point with the variance between its seeds."
        )
    if counts[0] >= 2:
        many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return (
            f"Figures are means over {many} seeds; their intervals hold the spread between the seeds "
            "and that of the items, which all seeds share."
        )
    return "Some layouts were trained once, some several times: see the names."


def _layers(record: Record) -> str:
    """Describe the token mixers of the layers."""
    names: dict[tuple[str, str], list[int]] = {}
    for branch in record.get("branches") or ():
        kind = "a state" if branch["kind"] == "linear" else "softmax"
        kind = "softmax in a window" if branch["kind"] == "attention" and branch["local"] else kind
        layers = names.setdefault((branch["name"], kind), [])
        if branch["layer"] not in layers:
            layers.append(branch["layer"])
    return "; ".join(f"{_ranges(layers)} {name} ({kind})" for (name, kind), layers in names.items())


def _ranges(numbers: Sequence[int]) -> str:
    """Format integers as ranges: layers 0 to 2, 4."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(a) if a == b else f"{a} to {b}" for a, b in runs]
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(words)}"


TERMS = {
    "mqar": "associative recall: keys with their values, then each key again, to be answered",
    "needle": "one key and its value hidden in real text, asked for at the end",
    "niah_grid": "one sentence with a number hidden in text, asked for at the end",
    "kv_recall": "a phone book, one entry of which is asked for",
    "latent_niah": "a sentence hidden in text that shares no word with the question about it",
    "phone_book": "a phone book in bytes, some numbers of which are asked for",
    "heldout": "the loss on text that was kept out of training, in bits per byte: less is better",
    "cost": "the memory that a sequence occupies while the model writes, measured",
    "state_tracking": "a running product of group elements, which takes a state to follow",
    "hops_k": "a chain of assignments to be followed: retrieval, then reasoning",
    "icl_fn": "a mapping to be learnt from examples in the prompt",
    "mmlu_letters": "MMLU's questions, answered by a letter",
    "mmlu_cloze": "MMLU's questions, answered in words",
}


def terms(results: Record, ran: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the terms of this report with definitions: models by their layers, tasks."""
    for record in results["models"]:
        words = _layers(record)
        if words and not record.get("ablate"):
            yield record["name"], words
    softmax = "keeps the keys and values of every token, so that memory grows with the context"
    if any(record.get("branches") for record in results["models"]):
        yield "softmax", softmax
        yield (
            "a state",
            "of fixed size, whatever the context: a linear layer writes each token into it",
        )
    for task in ran:
        if task in TERMS:
            yield task, TERMS[task]
    if any("chance" in result for result in ran.values()):
        yield "chance", "the score of a guesser; [a, b] is a 95% interval"
