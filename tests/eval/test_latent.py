"""Needles that share no word with their question."""

import re

import pytest

from hybrid_eval.registry import TASKS, check_options
from hybrid_eval.text.latent import LANDMARKS
from hybrid_eval.text.tasks import samples
from hybrid_eval.tokens import ByteEncoder

NEEDLE = re.compile(r"(\w+) lives next to the ([\w' ]+?)\.")
PLAIN = {"the", "to", "next", "which", "has", "been", "character", "is", "who", "lives"}


def made(hops=1, depth=0.5, n=4):
    return samples(
        "latent_niah", tokenizer=ByteEncoder(), lengths=[1500], depths=[depth], n=n, hops=hops
    )


@pytest.mark.parametrize("hops", [1, 2])
def test_one_character_lives_in_the_place_that_is_asked_for(hops):
    for sample in made(hops):
        found = NEEDLE.findall(sample.prompt)
        asked = re.search(r"Which character has been to (.+)\?$", sample.prompt)[1]
        there = [who for who, mark in found if LANDMARKS[mark][hops - 1] == asked]
        assert there == list(sample.outputs)
        assert len(found) == 4
        assert sample.text.endswith(f"The character who has been to {asked} is")
        # nothing but small words stands in both
        (needle,) = (f"{who} {mark}" for who, mark in found if who == there[0])
        assert not set(needle.lower().split()) & (set(asked.lower().split()) - PLAIN)
        assert sample.prompt_tokens + sample.max_new_tokens + sample.slack == 1500


def test_places_are_told_apart():
    for place in (0, 1):
        assert len({where[place] for where in LANDMARKS.values()}) == len(LANDMARKS)


def test_the_needle_is_at_its_depth():
    for depth in (0.0, 0.3, 1.0):
        sample = made(depth=depth, n=1)[0]
        start = sample.prompt.index(f"{sample.outputs[0]} lives")
        head = sample.prompt.index("\n") + 1
        end = sample.prompt.rindex("\nWhich")
        share = (start - head) / (end - head)
        assert share == pytest.approx(depth, abs=0.08)


def test_hops_are_one_or_two():
    with pytest.raises(ValueError, match=r"hops must be 1 \(city\) or 2 \(country\), got 3"):
        made(hops=3)
    check_options(TASKS["latent_niah"], {"hops": 2})
    with pytest.raises(ValueError, match=r"latent_niah\.hops must be a whole number"):
        check_options(TASKS["latent_niah"], {"hops": "two"})
