"""Packed weights: round trips, one canonical form, and no harm from hostile files."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medhive import packing
from medhive.errors import MedHiveError, NoSpace, NotFound
from medhive.leftovers import disk_errors
from medhive.packing import (
    CorruptWeights,
    FlatWriter,
    Layout,
    NotPackable,
    WeightsFile,
    WrongLayout,
    open_flat,
    overwrite_weights,
    parse_header,
    read_weights,
    sha256_file,
    write_flat,
    write_weights,
)

ANY_SPEED = settings(deadline=None)
"""A busy machine must not fail a test that is right."""

MODEL = {
    "stem.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "head.bias": np.array([1.5], np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "scale": np.array(2.0, np.float32),
}

arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
models = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__"),
    arrays,
    min_size=1,
    max_size=6,
).filter(lambda model: any(array.size for array in model.values()))


def packed(text: bytes | str, data: bytes = b"", pad: bool = True) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    raw += b" " * (-len(raw) % 8 if pad else 0)
    return len(raw).to_bytes(8, "little") + raw + data


def header_of(**tensors: Any) -> str:
    return json.dumps(tensors)


def tensor(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_weights(tmp_path / "m", MODEL, {"round": "3"})
    back = read_weights(tmp_path / "m")
    assert list(back) == sorted(MODEL)
    for name, array in MODEL.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].shape == array.shape
    assert WeightsFile.at(tmp_path / "m").metadata == {"round": "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("before", [None, b"short", b"long" * 1000])
def test_writing_over_a_file_leaves_nothing_of_it(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "over"
    if before is not None:
        path.write_bytes(before)
    overwrite_weights(path, MODEL)
    write_weights(tmp_path / "new", MODEL)
    assert path.read_bytes() == (tmp_path / "new").read_bytes()
    with pytest.raises(NotPackable, match="convert it to float32"):
        overwrite_weights(path, {"a": np.zeros(2)})


@ANY_SPEED
@given(model=models, metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_round_trip_of_any_model(
    tmp_path_factory: pytest.TempPathFactory, model: dict[str, Any], metadata: Any
) -> None:
    path = tmp_path_factory.mktemp("any") / "m"
    try:
        digest = write_weights(path, model, metadata)
    except NotPackable:
        texts = [*model, *metadata, *metadata.values()]
        assert any(not packing._is_text(text) for text in texts)
        return
    back = read_weights(path)
    assert all(back[name].tobytes() == array.tobytes() for name, array in model.items())
    assert dict(WeightsFile.at(path).metadata) == metadata
    assert digest == sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert Layout.from_header(path) == Layout.of_arrays(model)


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    write_weights(tmp_path / "m", MODEL, {"b": "1", "a": "ü"})
    loaded = safetensors.numpy.load_file(tmp_path / "m")
    assert loaded.keys() == MODEL.keys()
    assert all(np.array_equal(loaded[name], MODEL[name]) for name in MODEL)
    with safetensors.safe_open(tmp_path / "m", "np") as opened:
        assert opened.metadata() == {"a": "ü", "b": "1"}


def test_what_the_safetensors_library_writes_is_accepted(tmp_path: Path) -> None:
    safetensors.numpy.save_file(MODEL, tmp_path / "m")
    assert Layout.from_header(tmp_path / "m") == Layout.of_arrays(MODEL)


def test_bytes_depend_on_content_alone(tmp_path: Path) -> None:
    one = write_weights(tmp_path / "one", MODEL, {"a": "1", "b": "2"})
    backwards = dict(reversed(MODEL.items()))
    backwards["stem.weight"] = np.asfortranarray(backwards["stem.weight"])
    assert write_weights(tmp_path / "two", backwards, {"b": "2", "a": "1"}) == one


def test_flat_vector_is_the_tensors_in_order_of_names(tmp_path: Path) -> None:
    write_weights(tmp_path / "m", MODEL)
    flat = open_flat(tmp_path / "m")
    np.testing.assert_array_equal(flat, [1.5, 2.0, 0, 1, 2, 3, 4, 5])
    assert not flat.flags.writeable
    layout = Layout.from_header(tmp_path / "m")
    assert (layout.size, layout.size_bytes) == (8, 32)
    assert [layout.name_at(place) for place in (0, 1, 2, 7)] == ["head.bias", "scale", "stem.weight", "stem.weight"]
    np.testing.assert_array_equal(WeightsFile.at(tmp_path / "m").read(1, 4), [2, 0, 1])
    np.testing.assert_array_equal(layout.unflatten(flat)["stem.weight"], MODEL["stem.weight"])


def test_writing_whole_or_in_blocks_gives_the_same_file(tmp_path: Path) -> None:
    layout = Layout.of_arrays(MODEL)
    flat = np.arange(8, dtype=np.float32)
    whole = write_flat(tmp_path / "whole", layout, flat)
    assert write_flat(tmp_path / "blocks", layout, [flat[:3], flat[3:3], flat[3:]]) == whole


def test_layout_digest_tells_architectures_apart() -> None:
    layout = Layout.of({"a": (2, 3), "b": (1,)})
    assert layout.digest() == Layout.of({"b": (1,), "a": (2, 3)}).digest()
    others: list[dict[str, tuple[int, ...]]]
    others = [
        {"a": (3, 2), "b": (1,)},
        {"a": (2, 3)},
        {"a": (2, 3), "c": (1,)},
        {"a": (6,), "b": (1,)},
    ]
    assert len({layout.digest(), *(Layout.of(shapes).digest() for shapes in others)}) == 5


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"b": (1,)}, "'a' is missing"),
        ({"a": (2,), "aa": (2,), "b": (1,)}, "'aa' is unexpected"),
        ({"a": (3,), "b": (1,)}, r"'a' has shape \(3,\) instead of \(2,\)"),
    ],
)
def test_wrong_layout_names_the_first_difference(other: Any, words: str) -> None:
    with pytest.raises(WrongLayout, match=words):
        Layout.of({"a": (2,), "b": (1,)}).require(Layout.of(other), "the update of st_mary")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({}, "0 tensors"),
        ({"a": np.zeros(0, np.float32)}, "0 numbers"),
        ({"a": np.zeros(2, np.float64)}, "float64"),
        ({"a": np.zeros(2, np.int64)}, "int64"),
        ({"__metadata__": np.zeros(2, np.float32)}, "name"),
        ({"\ud800": np.zeros(2, np.float32)}, "name"),
        ({"a" * 2000: np.zeros(2, np.float32)}, "name"),
        ({"a": np.zeros((1,) * 20, np.float32)}, "shape"),
    ],
)
def test_what_cannot_be_packed_is_refused(tmp_path: Path, model: Any, words: str) -> None:
    with pytest.raises(NotPackable, match=words):
        write_weights(tmp_path / "m", model)
    assert not list(tmp_path.iterdir())


def test_metadata_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    for metadata in ({"a": 1}, {"a": "\ud800"}, {"a": "x" * packing.MAX_HEADER_BYTES}):
        with pytest.raises(NotPackable):
            write_weights(tmp_path / "m", MODEL, metadata)  # type: ignore[arg-type]


@pytest.mark.parametrize("blocks", [[np.zeros(7, np.float32)], [np.zeros(5, np.float32)] * 2, []])
def test_too_few_or_too_many_numbers_leave_no_file(tmp_path: Path, blocks: Any) -> None:
    with pytest.raises(WrongLayout):
        write_flat(tmp_path / "m", Layout.of_arrays(MODEL), blocks)
    assert not list(tmp_path.iterdir())


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    digest = write_weights(tmp_path / "m", MODEL)
    with pytest.raises(ZeroDivisionError), FlatWriter(tmp_path / "m", Layout.of_arrays(MODEL)) as writer:
        writer.append(np.zeros(8, np.float32))
        raise ZeroDivisionError
    assert sha256_file(tmp_path / "m") == digest
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(NoSpace, match="disk is full"),
        disk_errors(tmp_path / "m"),
    ):
        full.write(b"x")
    with pytest.raises(PermissionError), disk_errors(tmp_path / "m"):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def test_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_weights, open_flat, sha256_file, Layout.from_header):
        with pytest.raises(NotFound, match=r"gone\.safetensors"):
            read(tmp_path / "gone.safetensors")


def test_a_file_longer_or_shorter_than_announced_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_weights(path, MODEL)
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:-4], whole + b"\0", whole[:20], whole[:3], b""):
        path.write_bytes(data)
        with pytest.raises(CorruptWeights):
            WeightsFile.at(path)


def test_a_file_cut_short_after_the_check_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path / "m", MODEL)
    file = WeightsFile.at(tmp_path / "m")
    os.truncate(tmp_path / "m", file.data_start + 4)
    with pytest.raises(CorruptWeights, match="shorter"):
        file.read(0, 8)


HOSTILE = {
    "no json": packed("{nonsense"),
    "no object": packed("[1,2]"),
    "no utf-8": packed(b'{"\xff\xfe": 1}'),
    "deep": packed("[" * 100_000),
    "deep object": packed('{"a":' * 50_000),
    "long number": packed('{"a":' + "9" * 10_000 + "}"),
    "no tensors": packed("{}"),
    "huge header": (1 << 63).to_bytes(8, "little") + b"{}",
    "header over the limit": ((8 << 20) + 8).to_bytes(8, "little") + b" " * ((8 << 20) + 8),
    "unpadded": packed('{"a":1}', pad=False),
    "twice": packed('{"a":%s,"a":%s}' % ((json.dumps(tensor()),) * 2), b"\0" * 8),
    "twice inside": packed('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
    "double": packed(header_of(a=tensor([1], dtype="F64")), b"\0" * 8),
    "dtype no text": packed(header_of(a=tensor(dtype=["F32"])), b"\0" * 8),
    "hole": packed(header_of(a=tensor(), b=tensor(offsets=[12, 20])), b"\0" * 20),
    "overlap": packed(header_of(a=tensor(), b=tensor(offsets=[4, 12])), b"\0" * 12),
    "other order": packed(header_of(a=tensor(offsets=[8, 16]), b=tensor(offsets=[0, 8])), b"\0" * 16),
    "not from zero": packed(header_of(a=tensor(offsets=[4, 12])), b"\0" * 12),
    "backwards": packed(header_of(a=tensor(offsets=[8, 0])), b"\0" * 8),
    "shape against place": packed(header_of(a=tensor([3])), b"\0" * 8),
    "true for one": packed(header_of(a=tensor([True, 2])), b"\0" * 8),
    "fraction": packed(header_of(a=tensor([2.0])), b"\0" * 8),
    "negative": packed(header_of(a=tensor([-1, -2])), b"\0" * 8),
    "overflow": packed(header_of(a=tensor([2**32, 2**32, 2], [0, 0]))),
    "overflow behind a zero": packed(header_of(a=tensor(), b=tensor([0, 2**62, 2**62], [8, 8])), b"\0" * 8),
    "rank": packed(header_of(a=tensor([1] * 65, [0, 4])), b"\0" * 4),
    "extra key": packed(header_of(a=tensor() | {"x": 1}), b"\0" * 8),
    "no dtype": packed(header_of(a={"shape": [2], "data_offsets": [0, 8]}), b"\0" * 8),
    "number for a tensor": packed(header_of(a=1)),
    "surrogate": packed(json.dumps({"\ud800": tensor()}), b"\0" * 8),
    "long name": packed(header_of(**{"x" * 5000: tensor()}), b"\0" * 8),
    "metadata no texts": packed(header_of(__metadata__={"a": 1}, a=tensor()), b"\0" * 8),
    "metadata a list": packed(header_of(__metadata__=["a"], a=tensor()), b"\0" * 8),
    "many tensors": packed("{" + ",".join(f'"{n}":{json.dumps(tensor([0], [0, 0]))}' for n in range(100_001)) + "}"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "m").write_bytes(HOSTILE[name])
    with pytest.raises(CorruptWeights):
        WeightsFile.at(tmp_path / "m")
    with pytest.raises(CorruptWeights):
        parse_header(HOSTILE[name])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
near_tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64"]) | json_values,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-4, 24), max_size=3) | json_values,
    }
)
near_headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), near_tensors | json_values, max_size=3)


@ANY_SPEED
@given(data=st.binary(max_size=64) | st.builds(lambda h, d: packed(json.dumps(h), d), near_headers, st.binary()))
def test_any_bytes_are_a_model_or_a_named_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "m"
    path.write_bytes(data)
    try:
        file = WeightsFile.at(path)
    except MedHiveError:
        return
    assert file.layout.size * 4 + file.data_start == len(data)
    assert sum(array.size for array in read_weights(path).values()) == file.layout.size


@ANY_SPEED
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_one_changed_byte_is_a_model_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "m"
    write_weights(path, MODEL, {"round": "3"})
    data = bytearray(path.read_bytes())
    data[place % len(data)] = byte
    path.write_bytes(data)
    try:
        read_weights(path)
    except MedHiveError:
        return
