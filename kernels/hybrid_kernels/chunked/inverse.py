"""Inverse of a unit lower triangular matrix, for the delta rule.

Forward substitution, never a power series: with near-equal keys and beta = 1 the powers of the
strict part grow like binomial coefficients, and Neumann doubling loses every digit at 32 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """Return (I - L)^-1 for the strictly lower part L of (b, C, C) ``strict``."""
    identity = torch.eye(strict.shape[-1], dtype=strict.dtype, device=strict.device)
    # From the right: row-major memory as it lies, where the left would be copied to columns.
    return torch.linalg.solve_triangular(
        strict.neg(), identity.expand_as(strict), upper=False, left=False, unitriangular=True
    )
