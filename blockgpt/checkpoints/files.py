"""The tensors of a checkpoint: which rank owns which chunk, writing chunks, the checked index, reading.

A chunk is a block of a tensor: `offsets` and `sizes` in elements of each dimension, as in
torch.distributed.checkpoint. index.json names the file of each chunk:

    {"blocks.0.attn.q_proj.weight": {"dtype": "F32", "shape": [64, 64], "pieces": [
        {"file": "model-00000.safetensors", "offset": [0, 0], "shape": [32, 64]}, …]}, …}

A new kind of tensor needs a key in `own_chunks`; a new dtype needs a line in SAFETENSORS_DTYPES. `TensorFile` writes
the files, the safetensors library reads them.
"""

import itertools
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from blockgpt.errors import CheckpointError, UserError, first_line, short_repr
from blockgpt.files import CHUNK_BYTES, PreallocatedFile
from blockgpt.training.launch import Runtime

MAX_OPEN_FILES = 64  # of a checkpoint at once
SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
JSON_SUFFIX = ".json"  # of the key of optimizer state that is no tensor
TENSOR_FILE = re.compile(r"(model|optimizer)-\d{5,9}\.safetensors")


# ---- which rank owns what

class LocalChunk(NamedTuple):
    """A chunk in this process's memory; `shape` is that of the whole tensor."""

    shape: tuple[int, ...]
    offsets: list[int]
    data: torch.Tensor


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a DTensor; `isinstance` is avoided, since torch needs a second to import the class."""
    return hasattr(tensor, "placements")


def local_chunk(tensor: Any) -> LocalChunk:
    """The chunk of `tensor`, a DTensor or not, that this process holds; a plain tensor is one chunk.

    Where two mesh dimensions shard one dimension (FSDP over tensor parallelism, torch's _StridedShard), the later mesh
    dimension shards first; each shards as torch.chunk does. torch's compute_local_shape_and_global_offset (2.11 to
    2.13) is wrong there if tensor parallelism does not divide the dimension: of 13 rows on a 3 x 2 mesh, it gives the
    last row to the wrong process. fully_shard and full_tensor agree with the arithmetic here.
    """
    shape, offsets, sizes = tuple(tensor.shape), [0] * tensor.dim(), list(tensor.shape)
    if not is_dtensor(tensor):
        return LocalChunk(shape, offsets, tensor.detach())
    mesh = tensor.device_mesh
    mesh_dims = list(zip(tensor.placements, mesh.shape, mesh.get_coordinate(), strict=True))
    if any(type(placement).__name__ == "_StridedShard" for placement in tensor.placements):
        mesh_dims.reverse()
    for placement, mesh_size, coordinate in mesh_dims:
        if hasattr(placement, "dim"):
            dim = placement.dim
            size = -(-sizes[dim] // mesh_size)
            start = min(coordinate * size, sizes[dim])
            offsets[dim] += start
            sizes[dim] = min(size, sizes[dim] - start)
        else:
            assert placement.is_replicate(), placement
    local = tensor.detach().to_local()
    assert list(local.shape) == sizes, (tensor.placements, tuple(mesh.shape), local.shape, sizes)
    return LocalChunk(shape, offsets, local)


def is_owner(tensor: Any) -> bool:
    """Whether this process writes its chunk of a DTensor, of all processes that hold the same chunk.

    A mesh without rank 0 is a replica of a mesh with it: another data-parallel or tensor-parallel group.
    """
    mesh = tensor.device_mesh
    first = all(coordinate == 0 for placement, coordinate in zip(tensor.placements, mesh.get_coordinate(), strict=True)
                if not hasattr(placement, "dim"))
    return first and 0 in mesh.mesh


def assign_owners(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """{name: rank that writes it} for `sizes` {name: bytes}: the largest first, each to the rank with the least."""
    loads, owners = [0] * world_size, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that holds this rank's state: the one inside a ZeroRedundancyOptimizer."""
    return getattr(optimizer, "optim", optimizer)


def reshard_parameters(model: torch.nn.Module) -> None:
    """Free what FSDP gathered for a forward pass, so that the model's parameters are the sharded ones."""
    for module in model.modules():
        reshard: Callable[[], None] | None = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()


def own_chunks(model: torch.nn.Module, optimizer: torch.optim.Optimizer, runtime: Runtime) -> dict[str, LocalChunk]:
    """{key: chunk} of the parameters, as <name>, and of the optimizer state, as <state>/<name>, that this rank writes.

    Together the ranks write each chunk of each tensor once. Replicated tensors are divided among the ranks by size.

    Raises:
        UserError: optimizer state that cannot be saved.
    """
    reshard_parameters(model)
    own_optimizer = local_optimizer(optimizer)
    parameters = dict(model.named_parameters())
    owners = assign_owners({name: p.nbytes for name, p in parameters.items() if not is_dtensor(p)}, runtime.world_size)
    chunks = {}

    def add(key: str, tensor: torch.Tensor) -> None:
        chunk = local_chunk(tensor)
        if chunk.data.numel() or 0 in chunk.shape:  # else this rank has no row of it, and another has
            chunks[key] = chunk

    for name, p in parameters.items():
        owned = is_owner(p) if is_dtensor(p) else owners[name] == runtime.rank
        if owned:
            add(name, p)
        for state_key, value in own_optimizer.state.get(p, {}).items():
            key = f"{state_key}{'' if isinstance(value, torch.Tensor) else JSON_SUFFIX}/{name}"
            value = state_tensor(name, p, state_key, value)
            if is_dtensor(value):
                state_owned = is_owner(value)
            elif is_dtensor(p):  # a step count, equal on all ranks
                state_owned = runtime.rank == 0
            else:
                state_owned = owned or own_optimizer is not optimizer  # under ZeRO-1 only its owner has it
            if state_owned:
                add(key, value)
    return chunks


def state_tensor(name: str, p: Any, state_key: str, value: Any) -> Any:
    """The entry of an optimizer's state as the tensor that is saved; what is no tensor, as its JSON text in bytes.

    Any shape can be saved that one rank holds as a whole: Adafactor's rows and columns, the scales of 8-bit blocks. Of
    a sharded parameter, state must be a scalar or sharded as the parameter is.

    Raises:
        UserError: it cannot be saved, so that it could not be loaded.
    """
    what = f"optimizer state {short_repr(state_key)} of {name}"
    if not isinstance(state_key, str) or "/" in state_key or state_key.endswith(JSON_SUFFIX):
        raise UserError(f"{what}: its key cannot be saved")
    is_tensor = isinstance(value, torch.Tensor)
    if not is_tensor:
        try:
            text = json.dumps(value).encode()
        except (TypeError, ValueError) as error:
            raise UserError(f"{what}: cannot be saved: {first_line(error)}") from None
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)
    if value.dtype not in SAFETENSORS_DTYPES:
        raise UserError(f"{what}: {value.dtype} cannot be saved")
    placed_alike = is_dtensor(value) and not any(placement.is_partial() for placement in value.placements)
    if is_dtensor(p) and value.dim() and not (placed_alike and value.shape == p.shape):
        raise UserError(f"{what}: its shape {tuple(value.shape)} cannot be sharded as the parameter's {tuple(p.shape)} "
                        "is (drop use_fsdp and tensor_parallel, or take another optimizer)")
    return value


# ---- writing

Layout = Mapping[str, tuple[torch.dtype, Sequence[int]]]  # {key: (dtype, shape)} of the tensors of a file


def arrange(layout: Layout, metadata: Mapping[str, str] | None = None) -> tuple[Layout, bytes, int]:
    """(tensors in their order in a safetensors file, its header, its size in bytes).

    metadata: strings for the header.
    """
    # The widest dtype first, so that every tensor is aligned to its elements.
    ordered = dict(sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, (dtype, shape) in ordered.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[key] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return ordered, struct.pack("<Q", len(text)) + text, 8 + len(text) + end


def tensor_bytes(layout: Layout, read: Callable[[str], torch.Tensor]) -> Iterator[np.ndarray]:
    """What follows the header: `read(key)` for each key, as uint8 arrays."""
    for key, (dtype, shape) in layout.items():
        tensor = read(key)
        assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape), key
        flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))  # one element: any stride
        yield flat.view(torch.uint8).numpy()


class TensorFile(PreallocatedFile):
    """A new safetensors file, preallocated; the arguments are `arrange`'s. OSError if it cannot be written."""

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        self.layout, self.header, size = arrange(layout, metadata)
        super().__init__(path, size)

    def write_tensors(self, read: Callable[[str], torch.Tensor]) -> dict[str, Any]:
        """Write `read(key)` for each key and force the file to the disk; its manifest entry {"size", "sha256"}."""
        self.write(self.header)
        for data in tensor_bytes(self.layout, read):
            self.write(data.data)
        return self.finish()


def has_tensors(path: Path, layout: Layout, read: Callable[[str], torch.Tensor]) -> bool:
    """Whether a file has the bytes that `TensorFile.write_tensors` writes: a comparison, faster than a digest."""
    ordered, header, size = arrange(layout)
    buffer = np.empty(CHUNK_BYTES, np.uint8)
    with open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != size:
            return False
        for expected in itertools.chain([np.frombuffer(header, np.uint8)], tensor_bytes(ordered, read)):
            while len(expected):
                n = file.readinto(buffer[:len(expected)].data)
                if not n or not np.array_equal(buffer[:n], expected[:n]):
                    return False
                expected = expected[n:]
    return True


def file_layouts(rank: int, chunks: Mapping[str, LocalChunk]) -> dict[str, Layout]:
    """{file name: its tensors} of the files in which a rank writes its chunks; those without an element are in none."""
    layouts: dict[str, dict[str, tuple[torch.dtype, Sequence[int]]]] = {}
    for key, chunk in chunks.items():
        if chunk.data.numel():
            layouts.setdefault(file_of(key, rank), {})[key] = (chunk.data.dtype, list(chunk.data.shape))
    return dict(sorted(layouts.items()))


def file_of(key: str, rank: int) -> str:
    return f"{'optimizer' if '/' in key else 'model'}-{rank:05d}.safetensors"


def write_chunks(directory: Path, rank: int, chunks: Mapping[str, LocalChunk]) -> dict[str, Any]:
    """Write this rank's tensor files.

    Returns:
        {"files": {name: manifest entry}, "chunks": {key: [file, dtype, whole shape, offsets, sizes]}}, JSON-able
    """
    metadata = {key: [file_of(key, rank), SAFETENSORS_DTYPES[chunk.data.dtype], list(chunk.shape), chunk.offsets,
                      list(chunk.data.shape)] for key, chunk in chunks.items()}
    opened: dict[str, TensorFile] = {}
    try:
        for file_name, layout in file_layouts(rank, chunks).items():  # preallocate all before the first byte is written
            opened[file_name] = TensorFile(directory / file_name, layout)
        files = {file_name: file.write_tensors(lambda key: chunks[key].data) for file_name, file in opened.items()}
    finally:
        for file in opened.values():
            file.file.close()
    return {"files": files, "chunks": metadata}


# ---- the index

class StoredChunk(NamedTuple):
    """A chunk in a file."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class TensorEntry(NamedTuple):
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[StoredChunk]


class Index:
    """The tensors of a checkpoint's directory, by key. `CheckpointError` if `value` is not a valid index.json."""

    def __init__(self, directory: Path, value: Mapping[str, Any]) -> None:
        self.directory = directory
        self.entries: dict[str, TensorEntry] = {}
        self.open_files: dict[str, Any] = {}
        for key, entry in value.items():
            try:
                self.entries[key] = parse_entry(entry)
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{directory}/index.json: {short_repr(key)} cannot be read ({error})") from None

    def parameter_names(self) -> list[str]:
        return [key for key in self.entries if "/" not in key]

    def optimizer_keys(self) -> list[str]:
        """The keys of the optimizer state, <state>/<name>."""
        return [key for key in self.entries if "/" in key]

    def check(self, file_names: Iterable[str]) -> None:
        """`CheckpointError` unless the safetensors files `file_names` hold exactly the chunks of the index."""
        expected: dict[str, dict[str, tuple[str, list[int]]]] = {name: {} for name in file_names}
        for key, entry in self.entries.items():
            for chunk in entry.chunks:
                if chunk.file not in expected:
                    raise CheckpointError(f"{self.directory}/index.json: {chunk.file} is not in the manifest")
                expected[chunk.file][key] = (SAFETENSORS_DTYPES[entry.dtype], list(chunk.sizes))
        for name, indexed in expected.items():
            with safetensors_errors(self.directory / name):
                slices = {key: self.open_file(name).get_slice(key) for key in self.open_file(name).keys()}  # noqa: SIM118
                found = {key: (s.get_dtype(), s.get_shape()) for key, s in slices.items()}
            for key in found.keys() | indexed.keys():
                if found.get(key) != indexed.get(key):
                    raise CheckpointError(f"{self.directory}/{name}: {short_repr(key)} is {found.get(key)}, the index "
                                          f"says {indexed.get(key)}")

    def open_file(self, name: str) -> Any:
        if name not in self.open_files:
            if len(self.open_files) == MAX_OPEN_FILES:  # of a run of many processes; each takes a file descriptor
                del self.open_files[next(iter(self.open_files))]
            self.open_files[name] = safe_open(self.directory / name, "pt")
        return self.open_files[name]

    @torch.no_grad()
    def read_into(self, key: str, local: torch.Tensor, offsets: Sequence[int]) -> None:
        """Fill `local`, the chunk of the tensor at `offsets`, from all stored chunks that overlap it."""
        for chunk in self.entries[key].chunks:
            low = [max(a, b) for a, b in zip(chunk.offsets, offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in
                    zip(chunk.offsets, chunk.sizes, offsets, local.shape, strict=True)]
            if not all(a < b for a, b in zip(low, high, strict=True)):
                continue
            source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True))
            target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets, strict=True))
            with safetensors_errors(self.directory / chunk.file):
                file = self.open_file(chunk.file)
                overlap = file.get_slice(key)[source] if source else file.get_tensor(key)
            local[target].copy_(overlap)

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, on the CPU."""
        entry = self.entries[key]
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(key, whole, [0] * len(entry.shape))
        return whole


def parse_entry(value: Any) -> TensorEntry:
    """The `TensorEntry` of an object of index.json.

    Raises:
        ValueError, KeyError, TypeError: `value` is not a valid entry.
    """
    shape = parse_sizes(value["shape"])
    if type(value["dtype"]) is not str or value["dtype"] not in TORCH_DTYPES:
        raise ValueError(f"unknown dtype {short_repr(value['dtype'])}")
    if type(value["pieces"]) is not list:
        raise ValueError("pieces is not a list")
    chunks = []
    for entry in value["pieces"]:
        if type(entry["file"]) is not str or not TENSOR_FILE.fullmatch(entry["file"]):
            raise ValueError(f"invalid file {short_repr(entry['file'])}")
        chunks.append(StoredChunk(entry["file"], parse_sizes(entry["offset"], len(shape)),
                                  parse_sizes(entry["shape"], len(shape))))
    if len({chunk.file for chunk in chunks}) != len(chunks):
        raise ValueError("two pieces are in one file")
    blocks = [(chunk.offsets, chunk.sizes) for chunk in chunks]
    if not (tiles(blocks, shape) if math.prod(shape) else not blocks):
        raise ValueError(f"its pieces do not tile the shape {shape}")
    return TensorEntry(TORCH_DTYPES[value["dtype"]], shape, chunks)


def parse_sizes(value: Any, ndim: int | None = None) -> tuple[int, ...]:
    """`value`, a JSON list of `ndim` integers, as a tuple; ValueError if it is anything else."""
    if type(value) is not list or len(value) > 16 or (ndim is not None and len(value) != ndim):
        raise ValueError(f"{short_repr(value)} is not a list of {'at most 16' if ndim is None else ndim} sizes")
    if not all(type(size) is int and 0 <= size < 2**62 for size in value):
        raise ValueError(f"{short_repr(value)} is not a list of sizes")
    return tuple(value)


def tiles(blocks: Iterable[tuple[Sequence[int], Sequence[int]]], shape: Sequence[int]) -> bool:
    """Whether `blocks` [(offsets, sizes)] tile `shape` without gap or overlap, in rows along the first dimension."""
    blocks = list(blocks)
    if not shape:
        return len(blocks) == 1
    rows: dict[tuple[int, int], list[tuple[Sequence[int], Sequence[int]]]] = {}
    for offsets, sizes in blocks:
        rows.setdefault((offsets[0], sizes[0]), []).append((offsets[1:], sizes[1:]))
    end = 0
    for (start, size), row in sorted(rows.items()):
        if start != end or size == 0 or not tiles(row, shape[1:]):
            return False
        end = start + size
    return end == shape[0]


class safetensors_errors:
    """A context in which an error of the safetensors library about `path` becomes a `CheckpointError`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "safetensors_errors":
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if isinstance(error, (OSError, SafetensorError, ValueError)) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{self.path}: cannot be read: {short_repr(str(error))}") from None
