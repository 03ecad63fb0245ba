"""Inverse of a unit lower triangular matrix, for the delta rule.

Forward substitution, never a power series: with near-equal keys and beta = 1 the powers of the
strict part grow like binomial coefficients, and Neumann doubling loses every digit at 32 rows.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def unit_lower_inverse(strict: Tensor, out: Tensor) -> Tensor:
    """Return (I + A)^-1 for the strictly lower part A of ``strict``.

    Args:
        strict: (b, C, C) contiguous; the rest of it is not read.
        out: (b, C, C) contiguous memory for the result.
    """
    out.copy_(_identity(strict.shape[-1], strict.dtype, strict.device))
    # From the right and in place: row-major memory as it lies, which would be copied otherwise.
    return torch.linalg.solve_triangular(
        strict, out, upper=False, left=False, unitriangular=True, out=out
    )


@lru_cache(maxsize=64)
def _identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=dtype, device=device)
