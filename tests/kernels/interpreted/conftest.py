"""Run by tests/kernels/test_triton.py in a process of its own, with TRITON_INTERPRET=1."""

import os

import pytest
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
