"""The layout language: what strings mean, what is refused and how, and that printing is minimal."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.layout import (
    MAX_DEPTH,
    Layer,
    Layout,
    LayoutError,
    Row,
    check_bound,
    check_symbol,
    describe,
    parse,
    parse_ffn,
    resolve,
)


def plain(layout: Layout) -> str:
    """Every layer written out, by a rule of its own: no counts, no groups."""
    return "".join(
        layer.ffn or (layer.mixers[0] if len(layer.mixers) == 1 else f"[{''.join(layer.mixers)}]")
        for layer in layout.layers
    )


def mixers(text: str) -> list[str]:
    return ["".join(layer.mixers) for layer in parse(text).layers]


# What strings mean


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("L", "L"),
        ("LLLS", "LLLS"),
        ("L3S", "LLLS"),
        ("(LLS)2", "LLSLLS"),
        ("((LS)2M)2", "LSLSMLSLSM"),
        ("(L7 S)2", "LLLLLLLSLLLLLLLS"),
        (" L 2\n S\t", "LLS"),
        ("L1(S)1", "LS"),
        ("L02", "LL"),
        ("L12", "L" * 12),
        ("(L)2", "LL"),
        ("lL", "lL"),
        ("LLL*3", "LLL***"),
        ("M-M-M*-", "M-M-M*-"),
        ("-3E2", "---EE"),
        ("\u03bb2", "\u03bb\u03bb"),
        ("[MS]2L", "[MS][MS]L"),
        ("[ M S W ]", "[MSW]"),
        ("([MS]L)2", "[MS]L[MS]L"),
        ("[SS]", "[SS]"),
    ],
)
def test_meaning(text, expanded):
    assert plain(parse(text)) == expanded


def test_layers_of_each_kind():
    assert parse("M[MS]-E").layers == (
        Layer(("M",)),
        Layer(("M", "S")),
        Layer((), "-"),
        Layer((), "E"),
    )


def test_equality_hash_and_length_follow_the_stack_not_the_spelling():
    assert parse("(LS)2") == parse("L S L S")
    assert hash(parse("(LS)2")) == hash(parse("LSLS"))
    assert parse("[MS]") != parse("[SM]")
    assert parse("[MS]") != parse("MS")
    assert len(parse("(L7S)10")) == 80


def test_symbols_in_order_of_first_use_without_feed_forwards():
    assert parse("S-L[MS]E*").symbols() == ("S", "L", "M", "*")
    assert parse("-E").symbols() == ()


@pytest.mark.parametrize(("text", "literal"), [("LS", False), ("LS-", True), ("[MS]E", True)])
def test_names_ffn(text, literal):
    assert parse(text).names_ffn is literal


def test_source_is_kept_for_messages_only():
    layout = parse("L 3 S")
    assert layout.source == "L 3 S"
    assert copy.deepcopy(layout) == pickle.loads(pickle.dumps(layout)) == layout
    assert dataclasses.replace(layout, layers=parse("S").layers).source == ""
    assert eval(repr(layout)) == layout


# What is refused, where, and with which way out


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("", 0, ["empty layout"]),
        (" \n", 0, ["empty layout"]),
        ("LL?S", 2, ["'?'", "a letter"]),
        ("LL|LS", 2, ["Megatron", "pipeline", "remove"]),
        ("M-M*-/M*", 5, ["Megatron", "MTP", "remove"]),
        ("[M|S]", 2, ["pipeline"]),
        ("L\u00d77", 1, ["MULTIPLICATION SIGN", "L7"]),
        ("M\u2013", 1, ["EN DASH", "plain '-'"]),
        ("{LS}2", 0, ["( )"]),
        ("L,S", 1, ["remove it"]),
        ("3L", 0, ["nothing to repeat"]),
        ("(3L)", 1, ["nothing to repeat"]),
        ("L2 2", 3, ["a count after a count"]),
        ("L0", 1, ["0 times"]),
        ("(LS)00", 4, ["0 times"]),
        ("L\u00b2", 1, ["SUPERSCRIPT TWO"]),
        ("L\u0663", 1, ["ARABIC-INDIC DIGIT THREE"]),
        ("()", 1, ["empty group"]),
        ("L(S", 3, ["column 2", "never closed", "')'"]),
        ("((L)", 4, ["column 1", "never closed"]),
        ("LS)2", 2, ["closes nothing"]),
        ("LS]", 2, ["closes nothing"]),
        ("[MS", 3, ["column 1", "never closed", "']'"]),
        ("[]", 1, ["two or more"]),
        ("[M]", 2, ["two or more", "write M"]),
        ("[M-]", 2, ["'-'", "nothing else"]),
        ("[ME]", 2, ["'E'", "nothing else"]),
        ("[M2S]", 2, ["'2'", "twice"]),
        ("[M[SW]]", 2, ["'['"]),
        ("[(MS)]", 1, ["'('"]),
    ],
)
def test_refusals(text, column, words):
    with pytest.raises(LayoutError) as caught:
        parse(text)
    message = str(caught.value)
    assert caught.value.column == column
    assert f"column {column + 1}" in message
    shown, caret = message.splitlines()[1:3]
    assert shown[4:] == text.replace("\n", " ")
    assert caret == " " * (4 + column) + "^"
    for word in words:
        assert word in message


@pytest.mark.parametrize("value", [None, 5, False, ["MS"], b"LS"])
def test_what_is_no_string_is_refused_with_the_yaml_trap_named(value):
    for function in (parse, parse_ffn, resolve):
        with pytest.raises(LayoutError, match=f"got {type(value).__name__}(?s:.*)quotes"):
            function(value)


def test_caret_stays_under_its_column_in_long_and_wide_strings():
    with pytest.raises(LayoutError) as caught:
        parse("L" * 500 + "?" + "S" * 500)
    shown, caret = str(caught.value).splitlines()[1:3]
    assert len(shown) < 90
    assert shown[caret.index("^")] == "?"
    with pytest.raises(LayoutError) as caught:
        parse("\u4e2d\u4e2d?")  # each of the first two takes two columns of a terminal
    assert str(caught.value).splitlines()[2] == " " * 8 + "^"


def test_error_survives_pickling():
    with pytest.raises(LayoutError) as caught:
        parse("L|")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "((((A999)999)999)999)",
        "(" * 200 + "A" + ")99" * 200,
        "A100001",
        "A99999BB",
        "A99999(" * 1000 + "A" + ")" * 1000,
        "A" + "9" * 100_000,
        "A" * (MAX_DEPTH + 1),
    ],
)
def test_gigantic_is_refused_at_once(text):
    start = time.process_time()
    with pytest.raises(LayoutError, match=r"too many layers(?s:.*)100,000"):
        parse(text)
    assert time.process_time() - start < 2


def test_cap_is_on_the_whole_stack_and_is_reached():
    assert len(parse("A50000(B)50000")) == MAX_DEPTH


def test_deep_nesting_needs_no_recursion():
    depth = 50_000
    assert parse("(" * depth + "A" + ")" * depth) == parse("A")
    with pytest.raises(LayoutError, match="never closed"):
        parse("(" * depth)


# Symbols


@pytest.mark.parametrize("symbol", ["S", "m", "*", "\u03bb"])
def test_symbols_that_may_be_bound(symbol):
    check_symbol(symbol)


@pytest.mark.parametrize(
    ("symbol", "words"),
    [
        ("E", "mixture-of-experts"),
        ("-", "dense feed-forward"),
        ("", "one character"),
        ("LS", "one character"),
        (3, "one character"),
        ("7", "no symbol"),
        ("(", "no symbol"),
        ("|", "no symbol"),
        (" ", "no symbol"),
    ],
)
def test_symbols_that_may_not_be_bound(symbol, words):
    with pytest.raises(LayoutError, match=words):
        check_symbol(symbol)


@given(st.characters())
def test_check_symbol_and_parse_agree_on_what_a_mixer_is(char):
    try:
        check_symbol(char)
    except LayoutError:
        with pytest.raises(LayoutError):
            parse(f"[{char}S]")
    else:
        assert parse(char).symbols() == (char,)


def test_check_bound():
    check_bound(parse("M-[SL]E"), {"M", "S", "L", "W"})
    with pytest.raises(LayoutError, match="did you mean") as caught:
        check_bound(parse("L (s L)3 q"), {"L": 1, "S": 2})
    assert caught.value.column == 3
    assert "S (did you mean it?)" in str(caught.value)
    with pytest.raises(LayoutError, match="CYRILLIC CAPITAL LETTER EM"):
        check_bound(parse("L\u041c"), "LM")
    with pytest.raises(LayoutError, match=r"Megatron(?s:.*)softmax attention"):
        check_bound(parse("M-*"), "MS")
    with pytest.raises(LayoutError, match="none is known"):
        check_bound(Layout((Layer(("L",)),)), "")


WRONG_TYPES: list[Any] = ["LS", []]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Layer(), "nothing in it"),
        (lambda: Layer(("E",)), "mixture-of-experts"),
        (lambda: Layer(("LS",)), "one character"),
        (lambda: Layer(*WRONG_TYPES[:1]), "tuple"),
        (lambda: Layer(("L",), "F"), "no such feed-forward"),
        (lambda: Layer(("L",), *WRONG_TYPES[1:]), "no such feed-forward"),
        (lambda: Layout(()), "0 layers"),
        (lambda: Layout((Layer(("L",)),) * (MAX_DEPTH + 1)), "100,001 layers"),
        (lambda: Layout((Layer(("L",), "-"),)), "no symbol of its own"),
    ],
)
def test_hand_made_layers_and_layouts_are_checked(make, words):
    with pytest.raises(LayoutError, match=words):
        make()


# Whole stacks


def ffns(*args, **kwargs) -> str:
    return "".join(layer.ffn or "." for layer in resolve(*args, **kwargs))


def test_a_feed_forward_is_laid_after_each_mixer():
    assert resolve("L[MS]") == (Layer(("L",), "-"), Layer(("M", "S"), "-"))
    assert resolve("LS", "") == (Layer(("L",)), Layer(("S",)))
    assert ffns("LLLS", "-E") == "-E-E"
    assert ffns("LLLSL", "-E") == "-E-E-"
    assert ffns("(L4S)4", "-E19") == "-" + "E" * 19
    assert ffns("LS", "-E3", num_hidden_layers=8) == "-EEE-EEE"
    assert ffns("LS", "(- E) 2", num_hidden_layers=4) == "-E-E"


def test_layouts_with_feed_forwards_are_literal():
    assert resolve("M-*E") == (Layer(("M",)), Layer((), "-"), Layer(("*",)), Layer((), "E"))
    assert resolve(parse("M-"), num_hidden_layers=4) == parse("M-M-").layers
    assert resolve("M-", " (-)1 ") == parse("M-").layers
    for ffn in ("E", "-E", ""):
        with pytest.raises(LayoutError, match="leave ffn out") as caught:
            resolve("MM*-M-", ffn)
        assert caught.value.column == 3


def test_cycling_fills_the_depth():
    assert resolve("LLLS", num_hidden_layers=12) == resolve("(LLLS)3")
    assert resolve("LLLS", num_hidden_layers=4) == resolve("LLLS")


@pytest.mark.parametrize(
    ("depth", "nearest"), [(13, "12 or 16"), (15, "12 or 16"), (2, "4 or 8"), (5, "4 or 8")]
)
def test_a_depth_that_does_not_divide_names_the_two_nearest(depth, nearest):
    with pytest.raises(LayoutError, match=f"num_hidden_layers={nearest}(?s:.*)tail") as caught:
        resolve("LLLS", num_hidden_layers=depth)
    written = str(caught.value).rpartition("e.g. ")[2]
    assert resolve(written) == (resolve("LLLS") * depth)[:depth]


@pytest.mark.parametrize("depth", [0, -4, True, 4.0, "4", MAX_DEPTH * 4])
def test_a_depth_that_is_none(depth):
    with pytest.raises(LayoutError, match="num_hidden_layers="):
        resolve("LLLS", num_hidden_layers=depth)


def test_a_pattern_longer_than_the_stack_is_refused():
    with pytest.raises(LayoutError, match="20 feed-forwards for 4 layers"):
        resolve("LLLS", "-E19")


@pytest.mark.parametrize("ffn", ["L", "-S", "[--]", "none", "*", "-|E", "-0", "(-"])
def test_bad_patterns_say_that_they_are_patterns(ffn):
    with pytest.raises(LayoutError, match=r"^ffn, column"):
        resolve("LLLS", ffn)


def test_parse_ffn():
    assert parse_ffn("") == ()
    assert parse_ffn("-E3") == ("-", "E", "E", "E")


def test_describe_merges_equal_neighbours():
    assert describe(resolve("(L3S)2[MS]2")) == [
        Row("0-2", ("L",), "-", 3),
        Row("3", ("S",), "-", 1),
        Row("4-6", ("L",), "-", 3),
        Row("7", ("S",), "-", 1),
        Row("8-9", ("M", "S"), "-", 2),
    ]
    assert describe(parse("M-").layers) == [Row("0", ("M",), None, 1), Row("1", (), "-", 1)]
    assert describe([]) == []


# Published models: depths and positions of attention as in their configuration files, from 0

PUBLISHED = [
    ("MiniMax-01", "(L7 S)10", "E80", 80, "S", range(7, 80, 8)),
    ("Ring-mini-linear", "(L4 S)4", "-E19", 20, "S", range(4, 20, 5)),
    ("Ring-flash-linear", "(L7 S)4", "-E31", 32, "S", range(7, 32, 8)),
    ("Qwen3-Next-80B-A3B", "(GGGS)12", "E48", 48, "S", range(3, 48, 4)),
    ("Qwen3.5-9B", "(GGGS)8", "-32", 32, "S", range(3, 32, 4)),
    ("Qwen3.5-27B", "(GGGS)16", "-64", 64, "S", range(3, 64, 4)),
    ("Qwen3.5-35B-A3B", "(GGGS)10", "E40", 40, "S", range(3, 40, 4)),
    ("Kimi-Linear-48B", "(KKKX)6 KKX", "-E26", 27, "X", [3, 7, 11, 15, 19, 23, 26]),
    ("OLMo-Hybrid-7B", "(GGGS)8", "-32", 32, "S", range(3, 32, 4)),
    ("Jamba-1.5-mini", "(mmmmSmmm)4", "(-E)16", 32, "S", range(4, 32, 8)),
    ("Jamba-1.5-large", "(mmmmSmmm)9", "(-E)36", 72, "S", range(4, 72, 8)),
    ("Bamba-9B", "M9 S M8 S M8 S M4", "-32", 32, "S", [9, 18, 27]),
    ("Granite-4.0-H-small", "M5 (S M9)3 S M4", "E40", 40, "S", [5, 15, 25, 35]),
    ("Granite-4.0-H-350m", "M10 SMMSMMMS M9 S M4", "-32", 32, "S", [10, 13, 17, 27]),
    ("Falcon-H1-0.5B", "[SM]36", "-36", 36, "SM", range(36)),
    (
        "Zamba2-2.7B",
        "M (M5 Z)7 M4 Z M3 Z MM",
        "",
        54,
        "Z",
        [6, 12, 18, 24, 30, 36, 42, 47, 51],
    ),
    ("RecurrentGemma-2B", "(RRW)8 RR", "-26", 26, "W", range(2, 26, 3)),
    ("RecurrentGemma-9B", "(RRW)12 RR", "-38", 38, "W", range(2, 38, 3)),
    ("LFM2-1.2B", "CCSCCSCCSCSCSCSC", "-16", 16, "S", [2, 5, 8, 10, 12, 14]),
    ("Samba-1.7B", "(mW)12", "-24", 24, "W", range(1, 24, 2)),
    ("Jet-Nemotron-2B", "J14 S J4 S WW J6", "-28", 28, "S", [14, 19]),
    (
        "HypeNet-2B",
        "LLSSLLSLSS L11 SLLLSLL",
        "-28",
        28,
        "S",
        [2, 3, 6, 8, 9, 21, 25],
    ),
]


@pytest.mark.parametrize(
    ("text", "ffn", "depth", "symbol", "where"),
    [case[1:] for case in PUBLISHED],
    ids=[case[0] for case in PUBLISHED],
)
def test_published_layouts(text, ffn, depth, symbol, where):
    layers = resolve(text, ffn)
    assert len(layers) == depth
    assert all((layer.ffn is None) == (ffn == "") for layer in layers)
    assert [i for i, name in enumerate(mixers(text)) if name == symbol] == list(where)
    assert parse(str(parse(text))) == parse(text)


def test_nemotron_h_8b_as_published():
    layout = parse("M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-")
    kinds = [layer.ffn or layer.mixers[0] for layer in resolve(layout)]
    assert len(kinds) == 52
    assert {kind: kinds.count(kind) for kind in "M*-"} == {"M": 24, "*": 4, "-": 24}


# Printing


@st.composite
def layout_texts(draw, symbols="LSm*-E"):
    """Strings of the language, with white space, nesting and needless groups and counts."""
    gap = st.sampled_from(["", "", "", " ", "\n"])
    count = st.sampled_from(["", "", "1", "2", "3", "12", "004"])
    symbol = st.sampled_from(symbols)
    bracket = st.lists(st.sampled_from("LSm*"), min_size=2, max_size=3).map(
        lambda names: f"[{' '.join(names)}]"
    )
    item = st.tuples(symbol | symbol | bracket, gap, count, gap).map("".join)
    text = st.recursive(
        st.lists(item, min_size=1, max_size=5).map("".join),
        lambda inner: st.lists(
            st.tuples(st.just("("), inner, st.just(")"), count, gap).map("".join) | inner,
            min_size=1,
            max_size=3,
        ).map("".join),
        max_leaves=6,
    )
    return draw(gap) + draw(text)


@settings(deadline=None, max_examples=200)
@given(layout_texts())
def test_print_and_parse_are_inverses_and_printing_never_lengthens(text):
    layout = parse(text)
    printed = str(layout)
    assert parse(printed) == layout
    assert str(parse(printed)) == printed
    assert len(printed) <= len(plain(layout))
    assert len(printed) <= len("".join(text.split()))


tokens = st.sampled_from(["A", "B", "[AB]", "-", "*"]) | st.sampled_from(["A", "B"])
layer_of = {t: parse(t).layers[0] for t in ["A", "B", "[AB]", "-", "*"]}


@settings(deadline=None, max_examples=100)
@given(st.lists(tokens, min_size=1, max_size=12), st.integers(1, 60), st.lists(tokens, max_size=8))
def test_hand_made_layouts_print_too(cycle, repeats, tail):
    names = cycle * repeats + tail
    layout = Layout(tuple(layer_of[name] for name in names))
    printed = str(layout)
    assert parse(printed) == layout
    assert len(printed) <= len("".join(names))


def refusal(function, *args) -> LayoutError | None:
    try:
        function(*args)
    except LayoutError as error:
        return error
    return None


@given(st.text())
def test_no_text_crashes(text):
    error = refusal(parse, text)
    if error:
        assert str(error).count("\n") == 3
    else:
        assert parse(str(parse(text))) == parse(text)


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet="LS-E*[]()0123 |/", max_size=14))
def test_no_text_of_our_own_characters_crashes(text):
    for ffn in ("-", text):
        error = refusal(resolve, text, ffn)
        if error:
            assert "expected" in str(error)
        else:
            layers = resolve(text, ffn)
            assert sum(row.repeated for row in describe(layers)) == len(layers) == len(parse(text))


def shortest_by_enumeration(limit: int, longest: int) -> dict[str, int]:
    """Length of the shortest string for each sequence over A, B that has one of <= `limit`.

    Builds the language from its grammar, by length of string, without a parser or a search.
    """
    items: list[set[str]] = [set() for _ in range(limit + 1)]
    rows: list[set[str]] = [set() for _ in range(limit + 1)]
    for size in range(1, limit + 1):
        bases = {"A", "B"} if size == 1 else set()
        if size > 2:
            bases |= rows[size - 2]  # "(" row ")"
        items[size] |= bases
        for base_size in range(1, size):
            digits = size - base_size
            base = {"A", "B"} if base_size == 1 else rows[base_size - 2] if base_size > 2 else set()
            for count in range(10 ** (digits - 1), min(10**digits, longest + 1)):
                items[size] |= {b * count for b in base if len(b) * count <= longest}
        rows[size] |= items[size]
        for left in range(1, size):
            rows[size] |= {
                a + b
                for a, b in itertools.product(items[left], rows[size - left])
                if len(a) + len(b) <= longest
            }
    best: dict[str, int] = {}
    for size, found in enumerate(rows):
        for sequence in found:
            best.setdefault(sequence, size)
    return best


def test_shortest_against_enumeration_of_the_grammar():
    best = shortest_by_enumeration(limit=8, longest=13)
    assert len(best) > 5000
    assert best["AAAB" * 3] == len("(A3B)3")
    for sequence, size in best.items():
        layout = parse(sequence)
        assert len(str(layout)) == size, sequence
        assert parse(str(layout)) == layout


def test_shortest_against_every_short_string():
    best: dict[Layout, int] = {}
    for size in range(1, 7):
        for characters in itertools.product("AB()23" if size > 5 else "AB()[]23", repeat=size):
            try:
                layout = parse("".join(characters))
            except LayoutError:
                continue
            best.setdefault(layout, size)
    assert len(best) > 500
    for layout, size in best.items():
        if len(layout) > 128:  # counts such as 33333
            continue
        # Not ==: the printer has digits that were not enumerated, such as A4 for AAAA.
        assert len(str(layout)) <= size, str(layout)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("LL", "LL"),  # no longer than L2, and plainer
        ("LLLS", "L3S"),
        ("(LLLS)10", "(L3S)10"),
        ("(RRW)8RR", "(RRW)8RR"),
        ("LSLS", "LSLS"),
        ("((LS)2)3", "(LS)6"),
        ("[MS][MS]", "[MS]2"),
        ("(M-)4", "(M-)4"),
    ],
)
def test_the_plainest_of_the_shortest(text, printed):
    assert str(parse(text)) == printed


@pytest.mark.parametrize("text", ["L128", "(L3S)32", "((LS)3M)18MM", "L127S"])
def test_printing_128_layers_is_fast(text):
    layout = Layout(parse(text).layers)
    start = time.process_time()
    assert len(str(layout)) <= len(text)
    assert time.process_time() - start < 1


@pytest.mark.slow
def test_printing_beyond_the_exact_search():
    source = random.Random(0)
    cases = ["L100000", "L50000S50000", "(L3S)25000", "M(M5Z)900MM", "((LS)3M)99L300"]
    cases += ["(" + "".join(source.choices("LSM", k=90)) + ")9"]  # longer groups than it looks for
    for text in cases:
        layout = parse(text)
        printed = str(layout)
        assert len(printed) <= len(text)
        assert parse(printed) == layout
    noise = "".join(source.choices("LSM", k=2000))
    bare = Layout(parse(noise).layers)  # without the source as a fallback
    assert parse(str(bare)) == bare
    assert len(str(bare)) < len(noise)


def test_a_long_repetition_prints_as_one_group_without_its_source():
    group = "".join(random.Random(1).choices("LSM", k=90))
    bare = Layout(parse(group).layers * 40)
    assert str(bare) == f"({Layout(parse(group).layers)})40"
