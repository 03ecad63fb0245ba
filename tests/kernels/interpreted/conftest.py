"""Run by tests/kernels/test_triton.py in a process of its own, with TRITON_INTERPRET=1."""

import os

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1", "these files run through test_triton.py"


class _Kept:
    def restore(self):
        pass


@pytest.fixture(autouse=True, scope="session")
def patch_the_language_once():
    """Keep the interpreter from patching triton.language anew in each call of a helper function.

    That patching is nine tenths of its time. This process never leaves the interpreter, so once
    per module that a kernel sees is enough.
    """
    patch, seen = interpreter._patch_lang, set()

    def once(fn):
        languages = (interpreter.tl, interpreter.tl.core)
        key = tuple(any(x is lang for x in fn.__globals__.values()) for lang in languages)
        if key not in seen:
            seen.add(key)
            patch(fn)
        return _Kept()

    interpreter._patch_lang = once
    yield
    interpreter._patch_lang = patch


@pytest.fixture(autouse=True, scope="session")
def round_to_nearest():
    """Round float32 to the nearest bfloat16, as devices do; the interpreter cuts digits off.

    So what it says of the error in bfloat16 holds for devices.
    """
    convert = interpreter._convert_float

    def nearest(x, given, wanted, mode):
        if given == tl.float32 and wanted == tl.bfloat16:
            cast = torch.from_numpy(np.array(x, dtype=np.float32)).bfloat16()
            return cast.view(torch.int16).numpy().view(np.uint16)
        return convert(x, given, wanted, mode)

    interpreter._convert_float = nearest
    yield
    interpreter._convert_float = convert
