"""Safetensors files as the library reads them, boxes that make up a tensor, room taken before writing."""

import errno
import hashlib
import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from blockgpt import files
from blockgpt.files import PreallocatedFile, preallocate
from blockgpt.training.checkpoint_files import DTYPES, TORCH, Index, TensorFile, assign_owners, tiles

names = st.text(max_size=20) | st.text("abc./_\\\"'\0é🐎", max_size=9)
names = names.filter(lambda name: name != "__metadata__" and name.isprintable())
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def filled(dtype, shape, seed):
    """A tensor whose bytes are random, but where only 0 and 1 are allowed."""
    n = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(2 if dtype == torch.bool else 256, (n,), dtype=torch.uint8,
                        generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


@settings(max_examples=150)
@given(layout=st.dictionaries(names, st.tuples(st.sampled_from(list(DTYPES)), shapes), max_size=6))
def test_what_is_written_the_library_reads_bit_for_bit(tmp_path_factory, layout):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.unlink(missing_ok=True)
    tensors = {key: filled(dtype, shape, i) for i, (key, (dtype, shape)) in enumerate(layout.items())}
    with TensorFile(path, layout) as file:
        said = file.fill(tensors.__getitem__)
    data = path.read_bytes()
    assert said == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype and read[key].shape == tensor.shape
        assert torch.equal(read[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_what_is_not_contiguous_and_larger_than_a_piece_is_written_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    tensor = torch.randn(300, 70).t()
    with TensorFile(tmp_path / "f", {"a": (torch.float32, (70, 300))}) as file:
        file.fill(lambda key: tensor)
    assert torch.equal(load_file(tmp_path / "f")["a"], tensor)


@st.composite
def cut(draw, shape, depth=3):
    """Boxes [(offset, shape)] that fill the shape, cut as meshes cut: along one dimension, and again within."""
    dims = [d for d, n in enumerate(shape) if n > 1]
    if not depth or not dims:
        return [((0,) * len(shape), tuple(shape))]
    dim = min(dims) if depth == 3 else draw(st.sampled_from(dims))
    at = draw(st.integers(1, shape[dim] - 1))
    boxes = []
    for start, length in ((0, at), (at, shape[dim] - at)):
        part = [*shape[:dim], length, *shape[dim + 1:]]
        boxes += [(tuple(o + start * (d == dim) for d, o in enumerate(offset)), box)
                  for offset, box in draw(cut(part, 0 if depth == 3 else depth - 1))]
    return boxes


@given(data=st.data(), shape=st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_boxes_that_fill_a_shape_do_and_those_that_leave_a_gap_or_overlap_do_not(data, shape):
    boxes = data.draw(cut(shape))
    assert tiles(boxes, tuple(shape))
    i = data.draw(st.integers(0, len(boxes) - 1))
    assert not tiles(boxes[:i] + boxes[i + 1:], tuple(shape))
    assert not tiles([*boxes, boxes[i]], tuple(shape))
    assert not tiles(boxes, (shape[0] + 1, *shape[1:]))


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple), data=st.data())
def test_tiles_is_right_of_any_boxes_when_it_says_yes(shape, data):
    dims = [st.tuples(st.integers(0, n), st.integers(0, n)) for n in shape]
    boxes = [tuple(zip(*box, strict=True)) for box in data.draw(st.lists(st.tuples(*dims), max_size=4))]
    counts = dict.fromkeys(itertools.product(*map(range, shape)), 0)
    for offset, box in boxes:
        for cell in itertools.product(*(range(o, o + n) for o, n in zip(offset, box, strict=True))):
            counts[cell] = counts.get(cell, 0) + 1
    assert not tiles(boxes, shape) or (set(counts.values()) == {1} and len(counts) == torch.Size(shape).numel())


@settings(max_examples=100)
@given(data=st.data(), dtype=st.sampled_from(list(TORCH)))
def test_any_box_is_read_from_whatever_pieces(tmp_path_factory, data, dtype):
    shape = data.draw(st.lists(st.integers(1, 6), max_size=3))
    tensor = filled(TORCH[dtype], shape, 0)
    boxes = data.draw(cut(shape)) if shape else [((), ())]
    folder = tmp_path_factory.mktemp("pieces")
    pieces = []
    for i, (offset, box) in enumerate(boxes):
        name = f"model-{i:05d}.safetensors"
        part = tensor[tuple(slice(o, o + n) for o, n in zip(offset, box, strict=True))]
        with TensorFile(folder / name, {"a": (tensor.dtype, box)}) as file:
            file.fill(lambda key, part=part: part)
        pieces.append({"file": name, "offset": list(offset), "shape": list(box)})
    index = Index(folder, {"a": {"dtype": dtype, "shape": shape, "pieces": pieces}})
    index.check({piece["file"] for piece in pieces})
    offset = [data.draw(st.integers(0, n)) for n in shape]
    size = [data.draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True)]
    local = torch.zeros(size, dtype=tensor.dtype)
    index.read_into("a", local, offset)
    expected = tensor[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
    for found, wanted in ((local, expected), (index.read("a"), tensor)):
        found, wanted = (t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (found, wanted))
        assert torch.equal(found, wanted)


@given(sizes=st.dictionaries(st.text(max_size=3), st.integers(0, 100), max_size=20), n=st.integers(1, 5))
def test_shares_are_fair_and_the_same_for_everyone(sizes, n):
    taker = assign_owners(sizes, n)
    assert taker == assign_owners(dict(reversed(sizes.items())), n) and taker.keys() == sizes.keys()
    loads = [sum(sizes[name] for name in sizes if taker[name] == i) for i in range(n)]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


# ---- room

def test_room_is_taken_before_the_first_byte(tmp_path):
    with PreallocatedFile(tmp_path / "f", 100_000) as file:
        assert os.path.getsize(tmp_path / "f") == 100_000 and os.stat(tmp_path / "f").st_blocks * 512 >= 100_000
        with pytest.raises(AssertionError):
            file.finish()


@pytest.mark.parametrize("code, raised", [(errno.ENOSPC, True), (errno.EFBIG, True), (errno.EIO, True),
                                          (errno.EOPNOTSUPP, False), (errno.EINVAL, False), (errno.ENOSYS, False)])
def test_a_file_system_that_reserves_nothing_is_written_all_the_same(tmp_path, monkeypatch, code, raised):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    if raised:
        with pytest.raises(OSError, match=r".* for 1,234 bytes: .*f"):
            PreallocatedFile(tmp_path / "f", 1234)
        return
    with PreallocatedFile(tmp_path / "f", 3) as file:
        file.write(b"abc")
        assert file.finish()["sha256"] == hashlib.sha256(b"abc").hexdigest()


def test_where_the_system_knows_no_reserving_nothing_is_reserved(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    with open(tmp_path / "f", "wb") as f:
        preallocate(f.fileno(), 10**18)
    assert os.path.getsize(tmp_path / "f") == 0
