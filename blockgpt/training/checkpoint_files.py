"""Tensors in safetensors files, whole or in pieces: who holds which part, writing, the checked index, reading.

A piece is a box of a tensor: `offset` where it begins, `shape` how far it goes, in elements of each dimension. The
index says in which file each piece stands:

    {"blocks.0.attn.q_proj.weight": {"dtype": "F32", "shape": [64, 64], "pieces": [
        {"file": "model-00000.safetensors", "offset": [0, 0], "shape": [32, 64]}, …]}, …}

Files are written by `TensorFile`, which reserves their room first and digests while it writes; they are read through
the safetensors library.
"""

import json
import math
import re
import struct
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from blockgpt.errors import CheckpointError, short_repr
from blockgpt.files import PreallocatedFile

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
          torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
TORCH = {name: dtype for dtype, name in DTYPES.items()}
SHARD = re.compile(r"(model|optimizer)-\d{5,9}\.safetensors")


# ---- who holds what

def is_dtensor(tensor):
    """Whether it is a DTensor, of which this process holds a part; torch's class takes a second to import."""
    return hasattr(tensor, "placements")


def local_chunk(tensor):
    """(offset, local tensor): which box of `tensor` this process holds; of a plain tensor the whole.

    A dimension that two mesh dimensions split is FSDP's over tensor parallelism: the later mesh dimension splits
    first (torch then says _StridedShard), each as torch.chunk does.
    """
    offset, shape = [0] * tensor.dim(), list(tensor.shape)
    if not is_dtensor(tensor):
        return offset, tensor.detach()
    mesh = tensor.device_mesh
    split = list(zip(tensor.placements, mesh.shape, mesh.get_coordinate(), strict=True))
    if any(type(placement).__name__ == "_StridedShard" for placement in tensor.placements):
        split.reverse()
    for placement, parts, mine in split:
        if hasattr(placement, "dim"):
            chunk = -(-shape[placement.dim] // parts)
            start = min(mine * chunk, shape[placement.dim])
            offset[placement.dim] += start
            shape[placement.dim] = min(chunk, shape[placement.dim] - start)
        else:
            assert placement.is_replicate(), placement
    local = tensor.detach().to_local()
    assert list(local.shape) == shape, (tensor.placements, tuple(mesh.shape), local.shape, shape)
    return offset, local


def is_owner(tensor):
    """Whether this process, of all that hold the same box of a DTensor, is the one to write it.

    A mesh without rank 0 stands beside an equal one with it: that of another part of the data, or of the tensors.
    """
    mesh = tensor.device_mesh
    first = all(mine == 0 for placement, mine in zip(tensor.placements, mesh.get_coordinate(), strict=True)
                if not hasattr(placement, "dim"))
    return first and 0 in mesh.mesh


def assign_owners(sizes, n):
    """{name: which of n takes it} for `sizes` {name: bytes}: the largest first, each to who has least."""
    loads, taker = [0] * n, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        taker[name] = loads.index(min(loads))
        loads[taker[name]] += sizes[name]
    return taker


def local_optimizer(optimizer):
    """The AdamW that holds this rank's state: inside a ZeroRedundancyOptimizer its own."""
    return getattr(optimizer, "optim", optimizer)


def reshard_parameters(model):
    """Let FSDP put away what it gathered for a forward pass, so that parameters are the sharded ones."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def own_chunks(model, optimizer, runtime):
    """{key: (dtype, whole shape, offset, local tensor)} of the pieces of parameters and moments that are this rank's.

    Together the ranks write every box of every tensor once. What all hold alike is shared out by size.
    """
    reshard_parameters(model)
    own = local_optimizer(optimizer)
    parameters = dict(model.named_parameters())
    taker = assign_owners({name: p.nbytes for name, p in parameters.items() if not is_dtensor(p)},
                      runtime.world_size)
    pieces = {}

    def add(key, tensor):
        offset, local = local_chunk(tensor)
        if local.numel():
            pieces[key] = (local.dtype, list(tensor.shape), offset, local)

    for name, p in parameters.items():
        mine = is_owner(p) if is_dtensor(p) else taker[name] == runtime.rank
        if mine:
            add(name, p)
        for moment, value in own.state.get(p, {}).items():
            if is_dtensor(value):
                mine_too = is_owner(value)
            elif is_dtensor(p):  # a step count: the same wherever a part is
                mine_too = runtime.rank == 0
            else:
                mine_too = mine or own is not optimizer  # under ZeRO-1 only its owner has it
            if mine_too:
                add(f"{moment}/{name}", value)
    return pieces


# ---- writing

class TensorFile(PreallocatedFile):
    """A new safetensors file of `layout` {key: (dtype, shape)}, its room taken. OSError where the disk refuses."""

    def __init__(self, path, layout):
        # The widest first, so that every tensor is aligned to its elements.
        self.layout = dict(sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])))
        header, end = {}, 0
        for key, (dtype, shape) in self.layout.items():
            start, end = end, end + dtype.itemsize * math.prod(shape)
            header[key] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        super().__init__(path, 8 + len(text) + end)
        self.header = struct.pack("<Q", len(text)) + text

    def fill(self, read):
        """Write the tensors, `read(key)` each, and force them to the disk; {"size", "sha256"}."""
        self.write(self.header)
        for key, (dtype, shape) in self.layout.items():
            tensor = read(key)
            assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape), key
            flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))  # one element: any stride
            self.write(flat.view(torch.uint8).numpy())
        return self.finish()


def write_chunks(directory, rank, pieces):
    """Write this rank's files: {"files": {name: size and sha256}, "pieces": {key: [file, dtype, shape, offset, …]}}."""
    kinds, files, said = {"model": {}, "optimizer": {}}, {}, {}
    for key, (dtype, shape, offset, local) in pieces.items():
        name = "optimizer" if "/" in key else "model"
        kinds[name][key] = (dtype, tuple(local.shape))
        said[key] = [f"{name}-{rank:05d}.safetensors", DTYPES[dtype], shape, offset, list(local.shape)]
    opened = {}
    try:
        for kind, layout in kinds.items():  # the room for all before the first byte
            if layout:
                opened[kind] = TensorFile(directory / f"{kind}-{rank:05d}.safetensors", layout)
        for kind, file in opened.items():
            files[f"{kind}-{rank:05d}.safetensors"] = file.fill(lambda key: pieces[key][3])
    finally:
        for file in opened.values():
            file.file.close()
    return {"files": files, "pieces": said}


# ---- the index

@dataclass
class TensorEntry:
    """A tensor of a checkpoint; pieces: [(file, offset, shape)]."""

    dtype: torch.dtype
    shape: tuple
    pieces: list


class Index:
    """The tensors of a checkpoint's directory, by key. `CheckpointError` if `value`, its index.json, is none."""

    def __init__(self, directory, value):
        self.directory, self.entries, self.open_files = directory, {}, {}
        for key, said in value.items():
            try:
                self.entries[key] = parse_entry(said)
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{directory}/index.json: {short_repr(key)} cannot be read ({error})") from None

    def keys(self, kind):
        """The keys of parameters (kind "model") or of their moments ("optimizer")."""
        return [key for key in self.entries if ("/" in key) == (kind == "optimizer")]

    def check(self, names):
        """`CheckpointError` unless the safetensors files `names` hold just what the index says."""
        expected = {name: {} for name in names}
        for key, entry in self.entries.items():
            for file, _, shape in entry.pieces:
                if file not in expected:
                    raise CheckpointError(f"{self.directory}/index.json: names {file}, which is not in the manifest")
                expected[file][key] = (DTYPES[entry.dtype], list(shape))
        for name, keys in expected.items():
            with safetensors_errors(self.directory / name):
                f = self.file(name)
                found = {key: (f.get_slice(key).get_dtype(), f.get_slice(key).get_shape()) for key in f.keys()}  # noqa: SIM118
            for key in found.keys() | keys.keys():
                if found.get(key) != keys.get(key):
                    raise CheckpointError(f"{self.directory}/{name}: {short_repr(key)} is {found.get(key)}, the index says "
                                          f"{keys.get(key)}")

    def file(self, name):
        """The opened file."""
        if name not in self.open_files:
            self.open_files[name] = safe_open(self.directory / name, "pt")
        return self.open_files[name]

    @torch.no_grad()
    def read_into(self, key, local, offset):
        """Fill `local`, the box of the tensor from `offset` on, with what of the pieces falls into it."""
        for file, at, shape in self.entries[key].pieces:
            low = [max(a, b) for a, b in zip(at, offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(at, shape, offset, local.shape, strict=True)]
            if not all(a < b for a, b in zip(low, high, strict=True)):
                continue
            with safetensors_errors(self.directory / file):
                here = tuple(slice(a - b, c - b) for a, b, c in zip(low, at, high, strict=True))
                part = self.file(file).get_slice(key)[here] if here else self.file(file).get_tensor(key)
            local[tuple(slice(a - b, c - b) for a, b, c in zip(low, offset, high, strict=True))].copy_(part)

    def read(self, key):
        """The whole tensor, on the CPU."""
        entry = self.entries[key]
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(key, whole, [0] * len(entry.shape))
        return whole


def parse_entry(said):
    """The `TensorEntry` that an object of index.json says; ValueError, KeyError or TypeError if it cannot be one."""
    shape = sizes(said["shape"])
    if type(said["dtype"]) is not str or said["dtype"] not in TORCH:
        raise ValueError(f"dtype {short_repr(said['dtype'])}")
    if type(said["pieces"]) is not list:
        raise ValueError("pieces is no list")
    pieces = []
    for piece in said["pieces"]:
        if type(piece["file"]) is not str or not SHARD.fullmatch(piece["file"]):
            raise ValueError(f"file {short_repr(piece['file'])}")
        pieces.append((piece["file"], sizes(piece["offset"], len(shape)), sizes(piece["shape"], len(shape))))
    if len({file for file, _, _ in pieces}) != len(pieces):
        raise ValueError("two pieces in one file")
    boxes = [(offset, box) for _, offset, box in pieces]
    if not (tiles(boxes, shape) if math.prod(shape) else not boxes):
        raise ValueError(f"its pieces do not make up the shape {shape}")
    return TensorEntry(TORCH[said["dtype"]], shape, pieces)


def sizes(value, n=None):
    """A tuple of `value`, a list of n whole numbers; ValueError if it is none."""
    if type(value) is not list or len(value) > 16 or (n is not None and len(value) != n):
        raise ValueError(f"{short_repr(value)} is no shape here")
    if not all(type(number) is int and 0 <= number < 2**62 for number in value):
        raise ValueError(f"{short_repr(value)} is no shape")
    return tuple(value)


def tiles(boxes, shape):
    """Whether boxes [(offset, shape)] fill `shape` without a gap or an overlap, in rows along the first dimension."""
    if not shape:
        return len(boxes) == 1
    rows, end = {}, 0
    for offset, box in boxes:
        rows.setdefault((offset[0], box[0]), []).append((offset[1:], box[1:]))
    for (start, length), row in sorted(rows.items()):
        if start != end or length == 0 or not tiles(row, shape[1:]):
            return False
        end = start + length
    return end == shape[0]


class safetensors_errors:
    """A context in which what safetensors says of a file it cannot read becomes a `CheckpointError`."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, (OSError, SafetensorError, ValueError)) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{self.path}: cannot be read: {short_repr(str(error))}") from None
