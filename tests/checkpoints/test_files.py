"""Tensor files as the safetensors library reads them, chunks that tile a tensor, and who writes which chunk."""

import hashlib
import itertools
import multiprocessing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from blockgpt import files
from blockgpt.checkpoints import files as checkpoint_files
from blockgpt.checkpoints.files import (
    SAFETENSORS_DTYPES,
    TORCH_DTYPES,
    Index,
    TensorFile,
    assign_owners,
    has_tensors,
    local_chunk,
    tiles,
)

keys = st.text(max_size=20) | st.text("abc./_\\\"'\0é🐎", max_size=9)
keys = keys.filter(lambda name: name != "__metadata__" and name.isprintable())
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def random_bytes(dtype, shape, seed):
    """A tensor of random bytes; of zeros and ones where it is bool."""
    n = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(2 if dtype == torch.bool else 256, (n,), dtype=torch.uint8,
                        generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


# ---- writing

@settings(max_examples=150)
@given(layout=st.dictionaries(keys, st.tuples(st.sampled_from(list(SAFETENSORS_DTYPES)), shapes), max_size=6))
def test_the_library_reads_what_is_written_bit_for_bit(tmp_path_factory, layout):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.unlink(missing_ok=True)
    tensors = {key: random_bytes(dtype, shape, i) for i, (key, (dtype, shape)) in enumerate(layout.items())}
    with TensorFile(path, layout) as file:
        entry = file.write_tensors(tensors.__getitem__)
    data = path.read_bytes()
    assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert has_tensors(path, layout, tensors.__getitem__)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype and read[key].shape == tensor.shape
        assert torch.equal(read[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_large_tensor_that_is_not_contiguous_is_written_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    tensor = torch.randn(300, 70).t()
    with TensorFile(tmp_path / "f", {"a": (torch.float32, (70, 300))}) as file:
        file.write_tensors(lambda key: tensor)
    assert torch.equal(load_file(tmp_path / "f")["a"], tensor)


def test_a_file_that_differs_in_one_byte_or_in_length_does_not_have_the_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "CHUNK_BYTES", 100)
    path, layout = tmp_path / "f", {"a": (torch.float32, (7, 5)), "b": (torch.uint8, (9,))}
    tensors = {key: random_bytes(*entry, 1) for key, entry in layout.items()}
    with TensorFile(path, layout) as file:
        file.write_tensors(tensors.__getitem__)
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1:])
        assert not has_tensors(path, layout, tensors.__getitem__), i
    for other in (data[:-1], data + b"\0", b""):
        path.write_bytes(other)
        assert not has_tensors(path, layout, tensors.__getitem__)
    path.write_bytes(data)
    assert has_tensors(path, layout, tensors.__getitem__)


# ---- the index

@st.composite
def split(draw, shape, depth=3):
    """Chunks [(offsets, sizes)] that tile the shape, as meshes shard: along one dimension, and again within."""
    dims = [d for d, n in enumerate(shape) if n > 1]
    if not depth or not dims:
        return [((0,) * len(shape), tuple(shape))]
    dim = min(dims) if depth == 3 else draw(st.sampled_from(dims))
    at = draw(st.integers(1, shape[dim] - 1))
    chunks = []
    for start, length in ((0, at), (at, shape[dim] - at)):
        half = [*shape[:dim], length, *shape[dim + 1:]]
        chunks += [(tuple(o + start * (d == dim) for d, o in enumerate(offsets)), sizes)
                   for offsets, sizes in draw(split(half, 0 if depth == 3 else depth - 1))]
    return chunks


@given(data=st.data(), shape=st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_chunks_tile_their_shape_and_no_longer_with_a_gap_or_an_overlap(data, shape):
    chunks = data.draw(split(shape))
    assert tiles(chunks, tuple(shape))
    i = data.draw(st.integers(0, len(chunks) - 1))
    assert not tiles(chunks[:i] + chunks[i + 1:], tuple(shape))
    assert not tiles([*chunks, chunks[i]], tuple(shape))
    assert not tiles(chunks, (shape[0] + 1, *shape[1:]))


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple), data=st.data())
def test_whatever_tiles_accepts_covers_each_element_once(shape, data):
    dims = [st.tuples(st.integers(0, n), st.integers(0, n)) for n in shape]
    chunks = [tuple(zip(*chunk, strict=True)) for chunk in data.draw(st.lists(st.tuples(*dims), max_size=4))]
    counts = dict.fromkeys(itertools.product(*map(range, shape)), 0)
    for offsets, sizes in chunks:
        for element in itertools.product(*(range(o, o + n) for o, n in zip(offsets, sizes, strict=True))):
            counts[element] = counts.get(element, 0) + 1
    assert not tiles(chunks, shape) or (set(counts.values()) == {1} and len(counts) == torch.Size(shape).numel())


@settings(max_examples=100)
@given(data=st.data(), dtype=st.sampled_from(list(TORCH_DTYPES)))
def test_any_chunk_is_read_from_any_stored_chunks(tmp_path_factory, data, dtype):
    shape = data.draw(st.lists(st.integers(1, 6), max_size=3))
    tensor = random_bytes(TORCH_DTYPES[dtype], shape, 0)
    chunks = data.draw(split(shape)) if shape else [((), ())]
    folder = tmp_path_factory.mktemp("chunks")
    entries = []
    for i, (offsets, sizes) in enumerate(chunks):
        name = f"model-{i:05d}.safetensors"
        chunk = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        with TensorFile(folder / name, {"a": (tensor.dtype, sizes)}) as file:
            file.write_tensors(lambda key, chunk=chunk: chunk)
        entries.append({"file": name, "offset": list(offsets), "shape": list(sizes)})
    index = Index(folder, {"a": {"dtype": dtype, "shape": shape, "pieces": entries}})
    index.check({entry["file"] for entry in entries})
    offsets = [data.draw(st.integers(0, n)) for n in shape]
    sizes = [data.draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True)]
    local = torch.zeros(sizes, dtype=tensor.dtype)
    index.read_into("a", local, offsets)
    expected = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
    for found, wanted in ((local, expected), (index.read("a"), tensor)):
        found, wanted = (t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (found, wanted))
        assert torch.equal(found, wanted)


# ---- who writes what

@given(sizes=st.dictionaries(st.text(max_size=3), st.integers(0, 100), max_size=20), n=st.integers(1, 5))
def test_owners_have_equal_loads_and_are_the_same_on_all_ranks(sizes, n):
    owners = assign_owners(sizes, n)
    assert owners == assign_owners(dict(reversed(sizes.items())), n) and owners.keys() == sizes.keys()
    loads = [sum(sizes[name] for name in sizes if owners[name] == i) for i in range(n)]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


def fsdp_over_tensor_parallelism(rank, lengths):
    """[(offsets, values, whole shape)] of the chunk on one rank of 3 x 2, of a column 0, 1, 2, … of each length."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def shard(name, module, mesh):
        whole = torch.arange(module.out_features).float()[:, None]
        module.weight = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=6)
    mesh, chunks = init_device_mesh("cpu", (3, 2), mesh_dim_names=("shard", "tensor")), []
    for n in lengths:
        model = torch.nn.Linear(1, n, bias=False)
        distribute_module(model, mesh["tensor"], shard)
        fully_shard(model, mesh=mesh["shard"])
        shape, offsets, data = local_chunk(model.weight)
        chunks.append((list(offsets), data[:, 0].int().tolist(), tuple(shape)))
    return chunks


@pytest.mark.slow
def test_the_chunks_of_fsdp_over_tensor_parallelism_are_where_fully_shard_puts_them():
    import torch.distributed.fsdp
    import torch.testing._internal.distributed.fake_pg  # noqa: F401 (before the forks)

    rows = (13, 14, 5, 49)  # torch's compute_local_shape_and_global_offset is wrong for 13 and 49
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # torch remembers the rank
        ranks = pool.starmap(fsdp_over_tensor_parallelism, [(rank, rows) for rank in range(6)], chunksize=1)
    for n, answers in zip(rows, zip(*ranks, strict=True), strict=True):
        for offsets, values, shape in answers:
            assert shape == (n, 1) and values == list(range(offsets[0], offsets[0] + len(values)))
        assert tiles([(offsets, [len(values), 1]) for offsets, values, _ in answers if values], (n, 1))
