"""Run a command on an Intel CPU as if MKL had found another maker's.

    python tests/other_cpu.py python -m pytest -q tests/hybrid/modeling

On some CPUs (an AMD EPYC, say) MKL rounds a product differently when an operand does not start at a
multiple of 16 bytes, as tensors in a safetensors file often do not. Equal weights give logits there
that differ in the last bits before and after a reload. This command shows it on any machine with a C
compiler: it preloads a library that hides the CPU's maker from MKL.

With ``--shuffle`` every second allocation of torch starts 8 bytes off, so that any two results in
different memory may differ. Tests that compare two calls of one process bit for bit fail then, and
may: torch's own allocations all start at multiples of 64.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

MAKER = """
int mkl_serv_intel_cpu(void) { return 0; }
int mkl_serv_intel_cpu_true(void) { return 0; }
"""

# malloc gives multiples of 16, so a pointer that is 8 off was shifted here.
SHUFFLE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

extern void __libc_free(void *);
static uint32_t state = 2654435769u;

void free(void *pointer) {
    __libc_free((uintptr_t)pointer % 16 == 8 ? (char *)pointer - 8 : pointer);
}

int posix_memalign(void **out, size_t alignment, size_t size) {
    Dl_info caller;
    int is_torch = dladdr(__builtin_return_address(0), &caller) && strstr(caller.dli_fname, "libc10.so");
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    size_t shift = is_torch && state >> 31 ? 8 : 0;
    size_t rounded = (size + shift + alignment - 1) / alignment * alignment;
    char *found = aligned_alloc(alignment, rounded);
    if (!found) return ENOMEM;
    *out = found + shift;
    return 0;
}
"""


def compile_library(source, folder):
    """Compile the library to preload; return its path."""
    path = Path(folder, "other_cpu.c")
    path.write_text(source)
    built = path.with_suffix(".so")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", built, path, "-ldl"], check=True)
    return built


def main(command):
    """Run the command with the library preloaded; return its exit status."""
    shuffle = command[:1] == ["--shuffle"]
    with tempfile.TemporaryDirectory() as folder:
        library = compile_library(SHUFFLE + MAKER if shuffle else MAKER, folder)
        preload = f"{library} {os.environ.get('LD_PRELOAD', '')}".strip()
        environment = {**os.environ, "LD_PRELOAD": preload}
        return subprocess.run(command[shuffle:], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
