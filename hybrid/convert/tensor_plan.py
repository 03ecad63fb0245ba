"""The tensor plan: a weight map applied to a model, as steps from their tensors to ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from hybrid.convert.checkpoint import some
from hybrid.convert.family import Family
from hybrid.convert.stack import Block, blocks, mtp_blocks
from hybrid.convert.tensor_rules import Fuse, Operation, Place, Rule, Tensors
from hybrid.convert.tensor_sources import TensorSource
from hybrid.modeling.model import HybridForCausalLM


class Step(NamedTuple):
    """Some of their tensors, the corresponding ones of ours, and the operations between them.

    Attributes:
        theirs, ours: their names.
        operations: from theirs to ours.
        place: the layer in which the step is applied.
        constant: the value of theirs, if it follows from the config; it is written and not read.
        copy_of: our tensor of which theirs is a copy, if another step creates it; it is written,
            and on import it is only compared.
        whole: another name of theirs for our tensor as it is; files can have either.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    operations: tuple[Operation, ...]
    place: Place
    constant: torch.Tensor | None = None
    copy_of: str | None = None
    whole: str = ""

    @property
    def is_read(self) -> bool:
        """Return whether ours are created from theirs."""
        return self.constant is None and self.copy_of is None

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the names of our tensors from which theirs are created."""
        return self.ours if self.copy_of is None else (self.copy_of,)

    def read(self, tensors: Tensors) -> Tensors:
        """Convert theirs to ours."""
        for operation in self.operations:
            tensors = operation.read(tensors, self.place)
        return tensors

    def write(self, tensors: Tensors) -> Tensors:
        """Convert ours to theirs."""
        if self.constant is not None:
            return [self.constant]
        for operation in reversed(self.operations):
            tensors = operation.write(tensors, self.place)
        return tensors

    def their_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes that theirs must have, computed from ours."""
        ours = [torch.empty(shape, device="meta") for shape in self.place.shapes]
        return [tuple(tensor.shape) for tensor in self.write(ours)]

    def misfit(self, found: Sequence[tuple[int, ...]]) -> str | None:
        """Return what is wrong with the shapes of theirs in a checkpoint; None if they fit."""
        wanted = self.their_shapes()
        loose = [o for o in self.operations if isinstance(o, Fuse) and o.loose]
        if loose and _whole(found, loose[0].dim) == _whole(wanted, loose[0].dim):
            return None
        pairs = zip(self.theirs, wanted, found, strict=True)
        wrong = [f"{n}: expected the shape {w}, found {f}" for n, w, f in pairs if w != f]
        return wrong[0] if wrong else None


def _whole(shapes: Sequence[tuple[int, ...]], dim: int) -> tuple[int, ...]:
    """Return the shape of tensors concatenated along a dim."""
    return (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])


def steps(
    family: Family, model: HybridForCausalLM, spelt: HybridForCausalLM | None = None
) -> list[Step]:
    """Return the steps of the family's weight map for one model of ours.

    Args:
        family: the family of the map.
        model: our model, on any device.
        spelt: the same stack in the family's letters, if ``model`` has others.

    Raises:
        ValueError: the map does not create a weight of ours; the message names it.
    """
    stack = blocks(model, family.literal)
    named = stack if spelt is None else blocks(spelt, family.literal)
    letters = ["".join(part.letter for part in block.mixers) for block in named]
    tied = model.all_tied_weights_keys
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
    sites = _sites(family, model, stack, letters)
    found = [
        _step(rule, site, shapes)
        for rule in family.weights
        for site in (sites if rule.per_layer else [OUTSIDE])
    ]
    found += _module_steps(family, model, spelt or model, sites[0].layers, shapes)
    made = [step for step in found if step is not None]
    covered = [name for step in made for name in step.ours]
    assert len(covered) == len(set(covered)), f"two rules of {family.name} make the same weight"
    left = sorted(set(shapes) - set(covered))
    if left:
        raise ValueError(f"the map of {family.name!r} has no place for our {some(left)}")
    return made


def as_filed(planned: Sequence[Step], source: TensorSource) -> list[Step]:
    """Return the steps with the names in a checkpoint, if it can have one of two."""
    return [
        step._replace(theirs=(step.whole,), operations=()) if step.whole in source.specs else step
        for step in planned
    ]


def as_published(family: Family, planned: Sequence[Step]) -> list[Step]:
    """Return the steps with the published tensor names."""
    found = []
    for step in planned:
        if any(part in step.whole for part in family.filed_whole):
            step = step._replace(theirs=(step.whole,), operations=())
        found.append(step._replace(theirs=tuple(map(family.file_name, step.theirs))))
    return found


class Site(NamedTuple):
    """One layer of ours, or none, and its position in theirs.

    Attributes:
        block: the layer.
        letters: letters of its mixers in the family.
        layers: number of layers in theirs.
        i: index of the layer in theirs.
        depth, block_i: for layers that share weights, see ``Family.joins_next``.
        joined: whether it is merged with the layer before.
    """

    block: Block | None
    letters: str = ""
    layers: int = 0
    i: int = 0
    depth: int = 0
    block_i: int = 0
    joined: bool = False

    def spell(self, name: str) -> str:
        """Fill the indices into a name of theirs."""
        for mark, number in (("i", self.i), ("depth", self.depth), ("block", self.block_i)):
            name = name.replace(f"{{{mark}}}", str(number))
        return name


OUTSIDE = Site(None)


def _sites(
    family: Family, model: HybridForCausalLM, stack: Sequence[Block], letters: Sequence[str]
) -> list[Site]:
    """Return the position of each of our layers in theirs."""
    joins = [bool(word) and word in family.joins_next for word in letters]
    index = [i - sum(joins[:i]) for i in range(len(stack))]
    number = {block.mixer_layer: i for block, i in zip(stack, index, strict=True) if block.mixers}
    specs = model.config.stack
    source = [specs[b.mixer_layer].source if b.mixers else 0 for b in stack]
    return [
        Site(
            block,
            letters[i],
            layers=len(stack) - sum(joins),
            i=index[i],
            depth=sum(joins[:i]),
            block_i=number.get(source[i], 0),
            joined=i > 0 and joins[i - 1],
        )
        for i, block in enumerate(stack)
    ]


def _module_steps(
    family: Family,
    model: HybridForCausalLM,
    spelt: HybridForCausalLM,
    depth: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[Step | None]:
    """Return the steps of a model's multi-token prediction modules.

    ``depth``: layers of their main stack.
    """
    if family.mtp is None:
        return
    stacks, named = (mtp_blocks(each, family.literal) for each in (model, spelt))
    for k, (stack, others) in enumerate(zip(stacks, named, strict=True)):
        size, first = len(stack), family.mtp.first(k, len(stack), depth)
        for rule in family.mtp.own_rules(k, first, size):
            yield _step(rule, OUTSIDE, shapes)
        for i, (block, other) in enumerate(zip(stack, others, strict=True), start=first):
            site = Site(block, "".join(part.letter for part in other.mixers), depth, i)
            for rule in family.weights:
                if rule.per_layer:
                    yield _step(family.mtp.layer_rule(rule, k), site, shapes)
        for theirs, ours in family.mtp.own_copies(first, size).items():
            # a tied head is the embedding
            source = ours if ours in shapes else model.all_tied_weights_keys[ours]
            yield Step((theirs,), (), (), Place(None, (shapes[source],)), copy_of=source)


def _step(rule: Rule, site: Site, shapes: Mapping[str, tuple[int, ...]]) -> Step | None:
    block, options = site.block, None
    if rule.joined is not None and rule.joined != site.joined:
        return None
    if rule.mixer:
        assert block is not None
        found = [
            p for letter, p in zip(site.letters, block.mixers, strict=True) if letter in rule.mixer
        ]
        if not found:
            return None
        options = found[0].options
    if rule.ffn:
        assert block is not None
        if block.ffn is None or block.ffn.letter not in rule.ffn:
            return None
        options = block.ffn.options
    if rule.when is not None and not rule.when(options):
        return None
    ours = tuple(_index(name, block) for name in rule.our_names)
    if any(name not in shapes for name in ours):
        return None
    theirs = tuple(site.spell(name) for name in rule.their_names)
    if any("{e}" in name for name in theirs):
        experts = range(options.num_experts)
        theirs = tuple(name.replace("{e}", str(e)) for name in theirs for e in experts)
    place = Place(options, tuple(shapes[name] for name in ours))
    made = None if rule.constant is None else rule.constant(options, site.i, site.layers)
    return Step(theirs, ours, rule.operations, place, made, whole=site.spell(rule.whole))


def _index(ours: str, block: Block | None) -> str:
    """Return our name with the index of our layer, which can differ from theirs."""
    if block is None:
        return ours
    in_ffn = "{i}.ffn" in ours
    return ours.replace("{i}", str(block.ffn_layer if in_ffn else block.mixer_layer))
