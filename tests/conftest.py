"""What all tests share: one thread here and in the processes they start, and caches of their own."""

import itertools
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order; also the default of started processes
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


CACHES = itertools.count()


@pytest.fixture(autouse=True)
def _same_seed_for_every_test():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache_of_datasets(monkeypatch, tmp_path_factory):
    """Let `datasets` keep what it prepares in a folder of each test, here and in other processes."""
    folder = str(tmp_path_factory.getbasetemp() / "datasets" / str(next(CACHES)))
    monkeypatch.setenv("HF_DATASETS_CACHE", folder)
    if "datasets" in sys.modules:  # which has read the variable
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)


@pytest.fixture
def assert_same_weights():
    """Check that two models hold the same tensors, bit for bit."""

    def check(found, expected):
        found, expected = found.state_dict(), expected.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name

    return check


# Reloaded models differ by about 10 units of rounding where products depend on the alignment of
# weights (see other_cpu.py). In half precision one activation rounded the other way is a whole unit.
ROUNDING = {torch.float64: 200, torch.float32: 200, torch.bfloat16: 8, torch.float16: 8}


@pytest.fixture
def assert_close_to_rounding():
    """Check that two results of one computation on equal values in other memory agree.

    The bound is in units of rounding of the largest entry.
    """

    def check(found, expected):
        assert found.dtype == expected.dtype
        units = ROUNDING[expected.dtype] * torch.finfo(expected.dtype).eps
        bound = units * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)

    return check
