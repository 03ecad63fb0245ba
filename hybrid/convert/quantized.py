"""Dequantize checkpoints that are published only in quantized form, one tensor at a time.

Two formats. ``mxfp4`` (OCP Microscaling Formats 1.0; the experts of gpt-oss): ``NAME_blocks`` (E,
R, G, 16) with two 4-bit values per byte, and ``NAME_scales`` (E, R, G) with one exponent per 32
values; together they are ``NAME`` (E, 32 G, R). ``fp8`` (DeepSeek-V3, arXiv 2412.19437, section
3.3; Kimi K2, Qwen3-FP8): ``NAME`` in 8 bits and ``NAME_scale_inv`` with one factor per block,
usually 128 x 128, or one for the whole matrix.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hybrid.convert.checkpoint import Spec
from hybrid.convert.configs import QUANTIZED
from hybrid.convert.tensor_sources import TensorSource

logger = logging.getLogger(__name__)

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FACTORS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
MX_BLOCK = 32  # values that share an exponent
MX_BYTES = MX_BLOCK // 2
MX_ROWS = 2**16  # blocks at a time: additional memory stays at a few MB

Dequantize = Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]


class Packed(NamedTuple):
    """One tensor that the file stores as values and scales.

    Attributes:
        values, scales: names of the stored tensors.
        shape: shape of the dequantized tensor.
        dequantize: (values, scales, dtype) -> the tensor.
    """

    values: str
    scales: str
    shape: tuple[int, ...]
    dequantize: Dequantize


class Dequantized:
    """A quantized checkpoint as a ``TensorSource`` of dequantized tensors.

    Args:
        source: the tensors of the files.
        settings: ``quantization_config`` of their config.json.
        dtype: dtype of dequantized tensors; other tensors are unchanged.

    Raises:
        ValueError: another format; missing scales or values, or a wrong shape or dtype.
    """

    def __init__(
        self, source: TensorSource, settings: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.source, self.dtype = source, dtype
        self.packed = METHODS[method_of(settings)](source.specs, settings)
        used = {n for p in self.packed.values() for n in (p.values, p.scales)}
        # scales of activations, for 8-bit matrix products
        used |= {name.removesuffix("weight") + "activation_scale" for name in self.packed}
        self.specs: Mapping[str, Spec] = {
            **{name: spec for name, spec in source.specs.items() if name not in used},
            **{name: Spec(packed.shape, dtype) for name, packed in self.packed.items()},
        }

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        if name not in self.packed:
            return self.source.read(name)
        values, scales, _, dequantize = self.packed[name]
        return dequantize(self.source.read(values), self.source.read(scales), self.dtype)


def plain(
    source: TensorSource, config: Mapping[str, Any], folder: Path, dtype: torch.dtype | None = None
) -> TensorSource:
    """Return the source, dequantized if the config requires it.

    Args:
        source: the tensors of the files.
        config: their config.json.
        folder: for messages.
        dtype: dtype of dequantized tensors; None for bfloat16.

    Raises:
        ValueError: see ``Dequantized``; the message names the folder.
    """
    inner = config.get("text_config")
    found = [
        settings
        for level in (config, inner if isinstance(inner, Mapping) else {})
        for key in QUANTIZED
        if (settings := level.get(key)) is not None
    ]
    if not found:
        return source
    try:
        read = Dequantized(source, found[0], dtype or torch.bfloat16)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    kind = str(read.dtype).removeprefix("torch.")
    method, count = method_of(found[0]), len(read.packed)
    logger.warning("%s: %d tensors of %s become %s, and stay so", folder, count, method, kind)
    return read


def method_of(settings: Any) -> str:
    """Return the format of a ``quantization_config``. Raises ValueError if it is not supported."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"quantization_config: expected an object, found {settings!r}")
    method = settings.get("quant_method")
    if method not in [*METHODS]:  # a list, because the value may be unhashable
        raise ValueError(
            f"the weights are quantized by {method!r}, and only {' and '.join(METHODS)} are read;"
            " take the checkpoint that they were made from (its card names it), or give"
            " from_published a model that transformers has dequantized"
        )
    return method


def _mxfp4(specs: Mapping[str, Spec], settings: Mapping[str, Any]) -> dict[str, Packed]:
    found = {}
    stems = [n.removesuffix(s) for n in specs for s in ("_blocks", "_scales") if n.endswith(s)]
    for name in dict.fromkeys(stems):
        blocks, scales = f"{name}_blocks", f"{name}_scales"
        missing = [part for part in (blocks, scales) if part not in specs]
        if missing:
            raise ValueError(f"{name} is quantized by mxfp4, and {missing[0]} is not there")
        shape = specs[blocks].shape
        if len(shape) != 4 or shape[-1] != MX_BYTES:
            raise ValueError(
                f"{blocks}: expected the shape (experts, rows, groups, {MX_BYTES}), found {shape}"
            )
        _expect(scales, specs[scales], shape[:-1], f"an exponent for each block of {blocks}")
        for part in (blocks, scales):
            _expect_dtype(part, specs[part], (torch.uint8,))
        found[name] = Packed(blocks, scales, (shape[0], shape[2] * MX_BLOCK, shape[1]), _from_mxfp4)
    return found


def _fp8(specs: Mapping[str, Spec], settings: Mapping[str, Any]) -> dict[str, Packed]:
    block = _block(settings.get("weight_block_size"))
    found = {}
    for name, (shape, dtype) in specs.items():
        if dtype not in FP8:
            continue
        if len(shape) < 2:
            raise ValueError(f"{name}: expected a matrix, as fp8 has blocks of, found {shape}")
        scales = f"{name}_scale_inv"
        if scales not in specs:
            raise ValueError(f"{name} is quantized by fp8, and its scales {scales} are not there")
        if block is None:
            grid = () if specs[scales].shape == () else (1,)
        else:
            grid = (*shape[:-2], *(-(-n // b) for n, b in zip(shape[-2:], block, strict=False)))
        what = f"{name} is {shape}, and its blocks {block or 'one'}"
        _expect(scales, specs[scales], grid, what)
        _expect_dtype(scales, specs[scales], FACTORS)
        found[name] = Packed(name, scales, shape, _from_fp8(*(block or shape[-2:])))
    return found


def _block(found: Any) -> tuple[int, int] | None:
    """Return rows and columns of a block; None for one block per matrix."""
    if found is None:
        return None
    match found:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise ValueError(
        f"weight_block_size: expected rows and columns above 0, such as [128, 128], found {found!r}"
    )


METHODS = {"mxfp4": _mxfp4, "fp8": _fp8}


def _from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=dtype, rows_per_chunk=MX_ROWS)


def _from_fp8(rows: int, columns: int) -> Dequantize:
    """Our own, because transformers refuses an incomplete last block: 576 rows in DeepSeek-V3's
    keys.
    """

    def dequantize(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(..., N, K) and (..., ceil(N / rows), ceil(K / columns)) -> (..., N, K)."""
        made = torch.empty(values.shape, dtype=dtype)
        factors = scales.float().reshape(scales.shape if scales.ndim > 1 else (1, 1))
        for i in range(factors.shape[-2]):
            row = slice(i * rows, (i + 1) * rows)
            wide = factors[..., i : i + 1, :].repeat_interleave(columns, dim=-1)
            made[..., row, :] = values[..., row, :].float() * wide[..., : values.shape[-1]]
        return made

    return dequantize


def _expect(name: str, spec: Spec, shape: tuple[int, ...], why: str) -> None:
    if spec.shape != shape:
        raise ValueError(f"{name}: expected the shape {shape} ({why}), found {spec.shape}")


def _expect_dtype(name: str, spec: Spec, allowed: tuple[torch.dtype, ...]) -> None:
    if spec.dtype not in allowed:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(
            f"{name}: expected {known}, found {str(spec.dtype).removeprefix('torch.')}"
        )
