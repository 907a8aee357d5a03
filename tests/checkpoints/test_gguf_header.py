"""A GGUF file's counts and lengths are believed as far as the file is long."""

import struct

import pytest

pytest.importorskip("gguf")

from nemotron_h.checkpoints import formats
from nemotron_h.checkpoints.gguf import header

U8, U32, STRING, ARRAY = 0, 4, 8, 9


def text(value):
    return struct.pack("<Q", len(value)) + value


def key(name, kind, value):
    return text(name.encode()) + struct.pack("<I", kind) + value


def file(*keys, tensors=(), counted=None, tensors_counted=None):
    """A file with these keys and tensors, and the counts that it is said to have."""
    keys = (key("general.architecture", STRING, text(b"nemotron_h")), *keys)
    head = struct.pack("<IIQQ", 0x46554747, 3, tensors_counted or len(tensors), counted or len(keys))
    return (head + b"".join(keys) + b"".join(tensors)).ljust(4096, b"\0")


def array(kind, count, contents=b""):
    return struct.pack("<IQ", kind, count) + contents


def tensor(*dimensions, kind=0, offset=0, name=b"token_embd.weight"):
    dims = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


DAMAGED = {
    "10^12 elements": (file(key("a", ARRAY, array(U8, 10**12))), "announces 1000000000000 elements"),
    "2^63 strings": (file(key("a", ARRAY, array(STRING, 2**63))), "elements in an array"),
    "10^9 elements of the last key": (file(key("a", ARRAY, array(U32, 10**9, b"abc"))), "elements in an array"),
    "arrays 5,000 deep": (file(key("a", ARRAY, array(ARRAY, 1) * 5000)), "arrays in arrays"),
    "a string of 2^60 bytes": (file(key("a", STRING, struct.pack("<Q", 2**60))), "bytes of a value"),
    "a name of 2^40 bytes": (file(struct.pack("<Q", 2**40)), "bytes of a value"),
    "10^15 keys": (file(counted=10**15), "announces 1000000000000000 keys"),
    "10^15 tensors": (file(tensors_counted=10**15), "announces 1000000000000000 tensors"),
    "2^31 dimensions": (file(tensors=[text(b"a") + struct.pack("<I", 2**31)]), "2147483648 dimensions"),
    "dimensions beyond 64 bits": (file(tensors=[tensor(2**62, 2**62, 2**62)]), "cut short"),
    "an offset of 2^63": (file(tensors=[tensor(1, offset=2**63)]), "cut short"),
    "a kind that is none": (file(key("a", 77, b"")), "kind 77"),
    "a quantisation that is none": (file(tensors=[tensor(4, kind=999)]), "999"),
    "an alignment of 0": (file(key("general.alignment", U32, struct.pack("<I", 0))), "alignment"),
    "an alignment of 2^31": (
        file(key("general.alignment", U32, struct.pack("<I", 2**31)), tensors=[tensor(4)]),
        "cut short",
    ),
    "the same key twice": (file(key("a", U8, b"\1"), key("a", U8, b"\2")), "a already in list"),
    "four bytes": (b"GGUF", "cannot be read"),
    "10^9 layers": (
        file(key("nemotron_h.block_count", U32, struct.pack("<I", 10**9))),
        "is 1000000000; give a number of layers",
    ),
    "a config that is a number": (file(key("huggingface.config", U32, b"\1\0\0\0")), "JSON object must be str"),
    "a config 100,000 deep": (file(key("huggingface.config", STRING, text(b"[" * 100_000))), "recursion"),
    "an architecture that is a list": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("general.architecture", ARRAY, array(U32, 1, b"\1\0\0\0")),
        r"\[1\]",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_what_a_header_says_is_no_more_than_the_file_has(what, tmp_path):
    contents, words = DAMAGED[what]
    (tmp_path / "model.gguf").write_bytes(contents)
    with pytest.raises(ValueError, match=rf"^[^\n]*model\.gguf[^\n]*{words}[^\n]*$"):
        formats.conversion(tmp_path / "model.gguf", "huggingface")


def test_a_sound_header_passes(tmp_path):
    keys = [
        key("a", ARRAY, array(STRING, 3, text(b"x") + text(b"") + text(b"yz"))),
        key("b", ARRAY, array(U32, 1, b"\1\0\0\0")),
        key("c", ARRAY, array(U8, 0)),
    ]
    (tmp_path / "model.gguf").write_bytes(file(*keys, tensors=[tensor(2, 2)]))
    header.check_header(tmp_path / "model.gguf")


def test_the_other_part_of_a_split_file_is_a_file(tmp_path):
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(file())
    (tmp_path / "m-00002-of-00002.gguf").mkdir()
    with pytest.raises(ValueError, match=r"00002-of-00002\.gguf is no plain file"):
        formats.conversion(tmp_path / "m-00001-of-00002.gguf", "huggingface")
