"""Operations of weight maps: what each makes of tensors, and that its inverse undoes it."""

import pytest
import torch

from hybrid.convert.tensor_rules import (
    Fuse,
    Place,
    Reorder,
    Reshape,
    Split,
    Squeeze,
    Stack,
    Transpose,
    Unsqueeze,
)

OPERATIONS = {
    # operation, shapes of theirs, shapes of ours
    "squeeze": (Squeeze(1), [(6, 1, 4)], [(6, 4)]),
    "unsqueeze": (Unsqueeze(0), [(6, 4)], [(1, 6, 4)]),
    "transpose": (Transpose(), [(6, 4), (3, 2)], [(4, 6), (2, 3)]),
    "reshape": (Reshape(lambda options: (2, 12)), [(2, 12)], [(6, 4)]),
    "split": (Split(), [(9, 4)], [(2, 4), (3, 4), (4, 4)]),
    "split_in_groups": (Split(groups=lambda options: 2), [(12, 4)], [(4, 4), (2, 4), (6, 4)]),
    "split_other_dim": (Split(dim=1), [(4, 9)], [(4, 2), (4, 7)]),
    "fuse": (Fuse(), [(3, 4), (3, 4)], [(6, 4)]),
    "fuse_sizes": (Fuse(lambda options: (2, 5)), [(2, 4), (5, 4)], [(7, 4)]),
    "reorder": (Reorder(lambda options: (2, 3, 4), (2, 0, 1)), [(9, 4)], [(9, 4)]),
    "stack": (Stack(), [(3, 4)] * 5, [(5, 3, 4)]),
    "stack_two": (Stack(2), [(3, 4)] * 10, [(5, 6, 4)]),
}  # fmt: skip
each_operation = pytest.mark.parametrize("name", OPERATIONS)


@each_operation
def test_operation_and_its_inverse(name):
    operation, theirs, ours = OPERATIONS[name]
    place = Place(None, tuple(ours))
    tensors = [torch.randn(shape) for shape in theirs]
    read = operation.read(tensors, place)
    assert [tuple(tensor.shape) for tensor in read] == ours
    back = operation.write(read, place)
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))


def test_groups_hold_a_share_of_each():
    fused = torch.arange(12)
    operation, _, _ = OPERATIONS["split_in_groups"]
    a, b, c = operation.read([fused], Place(None, ((4,), (2,), (6,))))
    assert (a.tolist(), b.tolist(), c.tolist()) == (
        [0, 1, 6, 7],
        [2, 8],
        [3, 4, 5, 9, 10, 11],
    )


def test_reorder_names_their_blocks():
    operation = Reorder(lambda options: (1, 2, 3), (2, 0, 1))
    read = operation.read([torch.tensor([0, 10, 11, 20, 21, 22])], Place(None, ((6,),)))
    assert read[0].tolist() == [20, 21, 22, 0, 10, 11]
