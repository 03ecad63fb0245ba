"""Checkpoint folders: read and write safetensors tensor by tensor, without a whole file in memory."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from hybrid.checkpoint_paths import inside
from hybrid.files import check_new_folder, read_json, sync, sync_folder, write_json

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Suffixes of weight files that are not read, and the reasons.
NOT_READ = {
    (".safetensors",): "which an index has to list",
    (".bin", ".pt", ".pth"): "and pickled weights are never loaded",
    (".gguf",): "which is read if given itself, as FOLDER/NAME.gguf",
}
DEFAULT_SHARD_SIZE = "5GB"

# Files of a model beside its config and weights, which are copied unchanged.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "tiktoken.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

# safetensors' names of the supported dtypes
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Spec(NamedTuple):
    """Shape and dtype of a tensor, known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensor in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The tensors of a folder: ``specs`` from the headers, and each tensor on request.

    Files are read, not memory-mapped: a released tensor uses no memory, and a tensor in use does
    not change with its file.

    Raises:
        ValueError: the folder has no safetensors; the index lists missing files or tensors; two
            files have a tensor that the index does not list; or a file is damaged. The message
            names each.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._places: dict[str, tuple[BufferedReader, int]] = {}
        self._wanted: dict[str, str] = {}  # tensor -> file, from the index
        # tensors in other files than the index lists: name -> file, offset, spec
        self._copies: list[tuple[str, BufferedReader, int, Spec]] = []
        self.specs: dict[str, Spec] = {}
        try:
            for name in self._files():
                self._open(name)
            self._check_copies()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in the dtype of the file."""
        return _read_tensor(name, *self._places[name], self.specs[name])

    def _files(self) -> list[str]:
        """Return the names of the weight files; store the entries of the index in ``_wanted``."""
        index, single = self.folder / INDEX, (self.folder / SINGLE).is_file()
        if not index.is_file():
            if not single:
                raise ValueError(f"{self.folder}: no {SINGLE} and no {INDEX}; {self._instead()}")
            return [SINGLE]
        weight_map = read_json(index, unique=True).get("weight_map")
        if not isinstance(weight_map, dict) or not all(map(_is_text, weight_map.values())):
            raise ValueError(f"{index}: expected an object 'weight_map' of tensor names to files")
        shards = sorted(set(weight_map.values()))
        missing = [x for x in shards if not inside(self.folder, x, INDEX).is_file()]
        if single and SINGLE not in shards:
            if missing != shards:  # transformers would use the single file, other readers the index
                raise ValueError(
                    f"{self.folder}: {SINGLE} is there, and {INDEX} names other files; remove the"
                    " weights that are not meant"
                )
            logger.warning("%s: none of the files that it names is there; %s is", index, SINGLE)
            return [SINGLE]
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} of the {len(shards)} files in {INDEX} are missing:"
                f" {some(missing)}"
            )
        self._wanted = weight_map
        return shards

    def _instead(self) -> str:
        """Describe the files that are there instead of readable weights."""
        others = sorted(path.name for path in self.folder.iterdir())
        for endings, why in NOT_READ.items():
            if found := [name for name in others if name.endswith(endings)]:
                return f"found {some(found)}, {why}"
        return f"found {some(others)}" if others else "the folder is empty"

    def _open(self, shard: str) -> None:
        path = inside(self.folder, shard)
        try:
            with safe_open(str(path), framework="pt") as checked:
                specs = {name: _spec(checked, name, path) for name in checked.keys()}  # noqa: SIM118
        except SafetensorError as error:
            with path.open("rb") as file:
                start = file.read(8)
            if start == b"version ":
                raise ValueError(
                    f"{path}: a pointer of Git LFS in place of the file; fetch it with 'git lfs pull'"
                ) from error
            raise ValueError(f"{path}: no safetensors file, or a damaged one: {error}") from error
        promised = {name for name, place in self._wanted.items() if place == shard}
        if promised - specs.keys():
            raise ValueError(
                f"{path}: {INDEX} promises {some(sorted(promised - specs.keys()))}, and the file"
                " has not"
            )
        file = self._stack.enter_context(path.open("rb"))
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, spec in specs.items():
            start = 8 + size + header[name]["data_offsets"][0]
            if self._wanted.get(name, shard) != shard:
                self._copies.append((name, file, start, spec))
                continue
            if name in self._places:
                raise ValueError(
                    f"{name} is in {self._places[name][0].name} and in {path}, and {INDEX} does not"
                    " say which is meant"
                )
            self._places[name] = (file, start)
            self.specs[name] = spec

    def _check_copies(self) -> None:
        """Refuse a tensor with different values in two files: readers differ in which one they use."""
        for name, file, start, spec in self._copies:
            place = self.folder / self._wanted[name]
            same = spec == self.specs[name] and torch.equal(
                _bytes(_read_tensor(name, file, start, spec)), _bytes(self.read(name))
            )
            if not same:
                raise ValueError(
                    f"{name} is in {place} and, with other values, in {file.name}; remove the file or"
                    " the tensor that is not meant"
                )
            logger.warning("%s of %s left out: it is the same in %s", name, file.name, place)


def _read_tensor(name: str, file: BufferedReader, start: int, spec: Spec) -> torch.Tensor:
    made = torch.empty(spec.shape, dtype=spec.dtype)
    file.seek(start)
    if file.readinto(_bytes(made).numpy().data) != spec.nbytes:
        raise ValueError(f"{file.name}: ends within {name}; it was cut while being read")
    return made


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _spec(file: Any, name: str, path: Path) -> Spec:
    part = file.get_slice(name)
    kind = part.get_dtype()
    if kind not in DTYPES:
        raise ValueError(
            f"{path}: {name} is of the type {kind}, which is not read; known: {', '.join(DTYPES)}"
        )
    return Spec(tuple(part.get_shape()), DTYPES[kind])


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Create a temporary folder whose files move to ``out`` on success; on an error, remove it.

    The folder is beside ``out`` and is renamed to it. If ``out`` exists and is empty, the folder is
    inside ``out``, because ``out`` may be a mount point or a link. Files are synced to disk before
    the rename.

    Raises:
        ValueError: ``out`` exists and is not an empty folder, or cannot be created.
        OSError: the disk is full or missing; ``out`` is unchanged.
    """
    out = Path(out)
    try:
        check_new_folder(out)
        present = out.is_dir()
        out.parent.mkdir(parents=True, exist_ok=True)
        place = out if present else out.parent
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=place))
    except OSError as error:
        raise ValueError(f"{out}: cannot be made: {error.strerror}") from error
    try:
        yield made
        sync_folder(made)
        if present:  # the config last: without it an incomplete folder is not a checkpoint
            for path in sorted(made.iterdir(), key=lambda path: path.name == "config.json"):
                path.rename(out / path.name)
        else:
            made.chmod(0o755)
            made.rename(out)
        sync(place)
    finally:
        if made.exists():
            shutil.rmtree(made)


def write_weights(
    folder: Path,
    specs: Mapping[str, Spec],
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]],
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
) -> None:
    """Write tensors to safetensors files, each directly to its place.

    Args:
        folder: the output folder.
        specs: all tensors to write, in the order of the files.
        tensors: yields (name, tensor) in any order.
        max_shard_size: bytes of one file, such as ``5GB``; a larger tensor has its own file.
    """
    shards = _shards(specs, parse_size(max_shard_size))
    places: dict[str, tuple[Path, int]] = {}
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        offsets = _write_header(folder / file, {name: specs[name] for name in names})
        places |= {name: (folder / file, offset) for name, offset in offsets.items()}
        weight_map |= dict.fromkeys(names, file)
    left = set(specs)
    for name, tensor in tensors():
        spec = Spec(tuple(tensor.shape), tensor.dtype)
        assert spec == specs[name], f"{name}: {spec} came, {specs[name]} was announced"
        path, offset = places[name]
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        left.remove(name)
    assert not left, f"announced and never written: {some(sorted(left))}"
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index, indent=2, sort_keys=True)


def _shards(specs: Mapping[str, Spec], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = limit
    for name, spec in specs.items():
        if shards[-1] and spec.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= spec.nbytes
    return shards


def _write_header(path: Path, specs: Mapping[str, Spec]) -> dict[str, int]:
    """Write the header of a safetensors file and reserve its data; return the offset of each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in specs.items():
        start, end = end, end + Spec(shape, dtype).nbytes
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns data to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name in specs}


def parse_size(size: str | int) -> int:
    """Parse a size: ``5GB`` -> 5_000_000_000, in decimal units as in transformers.

    Raises:
        ValueError: not a size, or not above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", str(size).strip().upper())
    if not match or match[2] not in UNITS or int(float(match[1]) * UNITS[match[2]]) < 1:
        raise ValueError(f"max_shard_size: expected bytes or a size such as 5GB, found {size!r}")
    return int(float(match[1]) * UNITS[match[2]])


def copy_companions(source: Path, out: Path) -> None:
    """Copy the tokenizer and the generation config, if they exist.

    Raises:
        ValueError: a link leaves the folder, or a file is damaged so that the copy would not load.
    """
    for name in COMPANIONS:
        if (path := inside(source, name)).is_file():
            if path.suffix == ".json":
                read_json(path)
            shutil.copyfile(path, out / name)


def some(names: list[str], most: int = 3) -> str:
    """Return the first names of a list as text, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
