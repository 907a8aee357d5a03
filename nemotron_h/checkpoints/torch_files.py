"""Files of `torch.save`: read without running anything that is in them, and written with one tensor in memory.

`torch.load` has more doors than one: it hands a TorchScript archive to `torch.jit.load`, which runs the archive's code,
and reads two older formats, one of them a tar file that is unpacked first. Here only the zip file of tensors that torch
writes since 1.6 is opened, and of the objects in it none is made but those that hold a model's numbers and arguments.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from ..files import atomic_write
from .foreign import plain, shown
from .tensors import Entry, Spec, Tensors
from .writing import Done, tensor_bytes

_PROGRAM = ("constants.pkl", "code")
"""What a TorchScript archive has and a file of tensors has not."""


def check_archive(path: Path) -> None:
    """Raises `ValueError` where a file is no zip file of tensors, as torch writes it: a program, an older format, or
    one whose parts are packed, which may come out at any size."""
    with open(plain(path), "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError(
                f"{path} cannot be read (it is no zip file, as torch.save writes since 1.6): fetch it, or save it "
                "again with a newer torch where it comes from."
            )
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
        names = [record.filename.partition("/")[2].partition("/")[0] for record in records]
        # As torch itself will find them, should the two not read the list of records alike.
        names += [name.partition("/")[0] for name in torch._C.PyTorchFileReader(os.fspath(path)).get_all_records()]
    except (zipfile.BadZipFile, RuntimeError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({shown(str(error))}): fetch or write it again.") from error
    if any(name in _PROGRAM for name in names):
        raise ValueError(
            f"{path} is a TorchScript archive, a program, and only tensors are read: save the model's state_dict() "
            "with torch.save."
        )
    size = path.stat().st_size
    if packed := [record for record in records if record.compress_type or record.file_size > size]:
        raise ValueError(
            f"{path} has the part {shown(packed[0].filename)} packed, of {packed[0].file_size} bytes: write it with "
            "torch.save."
        )


class _Unknown:
    """Stands for whatever object of somebody's own classes a file holds; nothing of it is run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> _Unknown:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


class _Untyped(_Unknown):
    """In place of `UntypedStorage`, which would take as many bytes as a file asks for."""

    dtype = torch.uint8


def _bytes(value: Any = b"", *encoding: str) -> bytes:
    """`bytes`, but not of a length alone."""
    return bytes(value, *encoding) if isinstance(value, str) else bytes(memoryview(value))


def _bytearray(value: Any = b"", *encoding: str) -> bytearray:
    return bytearray(_bytes(value, *encoding))


def _text(value: Any = "") -> str:
    """`str` of what is one: that of a list holding itself often over has no end."""
    if not isinstance(value, str):
        raise pickle.UnpicklingError(f"it asks for the text of a {type(value).__name__}")
    return value


def _encoded(value: str, how: str = "latin1") -> bytes:
    """`codecs.encode` as bytes are pickled by it; other codecs make more of less."""
    if how != "latin1":
        raise pickle.UnpicklingError(f"it encodes by {how!r}")
    return value.encode(how)


def _listed(items: Any = ()) -> list[Any]:
    """In place of a set: to look up what holds itself often over has no end."""
    return list(items)


_KNOWN = (
    {("builtins", name) for name in "bool int float complex list tuple dict object".split()}
    | {
        ("argparse", "Namespace"),
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("copyreg", "_reconstructor"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
        ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    }
    | {
        ("torch.distributed.checkpoint." + module, name)
        for module, names in {
            "metadata": "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
            "TensorProperties StorageMeta _MEM_FORMAT_ENCODING",
            "filesystem": "_StorageInfo",
        }.items()
        for name in names.split()
    }
)
_IN_PLACE: dict[tuple[str, str], Any] = {
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "str"): _text,
    ("builtins", "set"): _listed,
    ("builtins", "frozenset"): _listed,
    ("_codecs", "encode"): _encoded,
    ("torch", "UntypedStorage"): _Untyped,
    ("torch.storage", "UntypedStorage"): _Untyped,
}


class Unpickler(pickle._Unpickler):
    """Reads what Megatron pickles without Megatron, and without running anything that a file names.

    `torch.load(weights_only=True)` refuses a whole file for one enum of Megatron's among its arguments. The reader
    written in Python, because C's believes a file that asks for more room than its own bytes fill.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _IN_PLACE:
            return _IN_PLACE[module, name]
        if (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        return type(name, (_Unknown,), {"__module__": module})

    def _build(self: Any) -> None:
        """State is for what a file made, never for a class or function of this process."""
        changed, _ = self.stack[-2:]
        if isinstance(changed, type | FunctionType | BuiltinFunctionType):
            raise pickle.UnpicklingError(f"it changes {changed.__name__}")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)

    def _reduce(self: Any) -> None:
        """Arguments that are to be looked up in a dictionary are names and numbers."""
        called, given = self.stack[-2:]
        if (
            isinstance(called, type)
            and issubclass(called, dict)
            and any(isinstance(each, list | dict) for each in given)
        ):
            raise pickle.UnpicklingError("it makes a dictionary of a list")
        pickle._Unpickler.dispatch[pickle.REDUCE[0]](self)

    def _set_items(self: Any) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        pickle._Unpickler.dispatch[pickle.SETITEMS[0]](self)

    def _set_item(self: Any) -> None:
        _check_key(self.stack[-2])
        pickle._Unpickler.dispatch[pickle.SETITEM[0]](self)

    def _dict(self: Any) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        pickle._Unpickler.dispatch[pickle.DICT[0]](self)

    def _no_set(self: Any) -> None:
        raise pickle.UnpicklingError("it has a set")

    dispatch: ClassVar = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: _build,
        pickle.REDUCE[0]: _reduce,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _dict,
        pickle.EMPTY_SET[0]: _no_set,
        pickle.FROZENSET[0]: _no_set,
    }


def _check_key(key: Any) -> None:
    """A key is a name, a number, or what torch.distributed.checkpoint keeps such under: looked up at once."""
    parts = [key]
    for part in parts:
        if isinstance(part, tuple):
            parts += part
        elif type(part).__name__ == "MetadataIndex":
            parts += vars(part).values()
        if len(parts) > _KEY_PARTS:
            raise pickle.UnpicklingError("it has a key of very many parts")


_KEY_PARTS = 100


class PickleModule:
    """What `torch.load` takes for `pickle_module`."""

    Unpickler = Unpickler

    @staticmethod
    def load(file: io.BufferedIOBase, **kwargs: Any) -> Any:
        return Unpickler(file, **kwargs).load()


def load(path: Path, mmap: bool = False) -> Any:
    """A file that `torch.save` wrote, its tensors mapped rather than read where `mmap` is set.

    Raises `ValueError` where it cannot be read; it names the first tensor that is gone with a file that is cut short.
    """
    plain(path)
    try:
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=PickleModule, mmap=mmap)
    except Exception as error:  # of a damaged pickle anything comes
        lost = first_cut(path)
        if isinstance(error, ValueError) and str(path) in str(error) and not lost:
            raise
        lost = f", from the tensor {lost} on" if lost else ""
        reason = shown(re.split(r"\n|\. | \(", str(error))[0].removesuffix("."), 200)
        raise ValueError(f"{path} cannot be read{lost} ({reason}): fetch or write it again.") from error


class TorchFile:
    """The tensors of a `pytorch_model.bin`, mapped into memory and read one at a time.

    Raises:
        ValueError: the file cannot be read (see `load`), or holds something other than tensors by name.
    """

    _MAPPED = 64 << 20  # as in SafetensorsFolder: mapped anew after so many bytes, and the pages leave memory

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        self._open: Mapping[str, Tensor] = load(path, mmap=True)
        self._read_bytes = 0
        if not isinstance(self._open, dict):
            raise ValueError(f"{path} holds a {type(self._open).__name__}; save the model's state_dict() in it.")
        for name, value in self._open.items():
            if not isinstance(value, Tensor) or not isinstance(name, str):
                raise ValueError(f"{path} has {shown(name)}, which is no tensor; save the model's state_dict() alone.")
        self.specs = {name: Spec(tuple(value.shape), value.dtype) for name, value in self._open.items()}

    def read(self, name: str) -> Tensor:
        if self._read_bytes > self._MAPPED:
            self._open, self._read_bytes = load(self.path, mmap=True), 0
        self._read_bytes += self.specs[name].nbytes
        return self._open[name]


# -- what is gone with a file that is cut short ----------------------------------------------------------------------

_PICKLE_BYTES = 64 << 20  # more than the names and arguments of any model
_RECORD = b"PK\x03\x04"
_ELEMENT = {
    **dict.fromkeys(("DoubleStorage", "LongStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
}
"""Bytes of an element; storages of other names count bytes."""


class _Listing(Unpickler):
    """Reads what is stored under which name without making a tensor: one is the tuple that it would be made of."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, tuple[Any, ...]] = {}  # by number, in the order of the file

    def find_class(self, module: str, name: str) -> Any:
        if name.endswith("Storage"):
            return name
        if name.startswith("_rebuild_"):
            return lambda *parts: parts
        if module in ("argparse", "collections"):
            return super().find_class(module, name)
        return type(name, (_Unknown,), {"__module__": module})

    def persistent_load(self, pid: Any) -> Any:
        self.storages.setdefault(pid[2], pid)
        return pid  # ("storage", class, number, device, elements)


def first_cut(path: Path) -> str | None:
    """The first tensor whose bytes are past the end of a file of torch.save, where its first record can be read.

    The zip file's list of records is at its end, and gone with it; the pickle with the names comes first.
    """
    try:
        with open(path, "rb") as file:
            size, header = path.stat().st_size, file.read(30)
            if header[:4] != _RECORD:
                return None
            file.seek(sum(struct.unpack("<HH", header[26:])), 1)
            begins, pickled = file.tell(), io.BytesIO(file.read(_PICKLE_BYTES))
            listing = _Listing(pickled)
            contents = listing.load()
            names = _names(contents.get("model", contents))
            file.seek(begins + pickled.tell())
            cut = False
            for number, (_, kind, _, _, elements) in listing.storages.items():
                starts = None if cut else _find_record(file, f"/data/{number}")
                cut = starts is None or starts + elements * _ELEMENT.get(kind, 1) > size
                if cut and number in names:
                    return names[number]
                if starts is not None:
                    file.seek(starts + elements * _ELEMENT.get(kind, 1))
    except Exception:  # it is cut in the names as well, or is nothing that torch wrote
        pass
    return None


def _names(contents: Mapping[str, Any]) -> dict[str, str]:
    """The first tensor of each storage, by its number, among what `_Listing` reads."""
    names: dict[str, str] = {}
    for name, value in contents.items():
        while isinstance(value, tuple) and value and value[0] != "storage":
            value = value[0]
        if isinstance(value, tuple) and value:
            names.setdefault(value[2], name)
    return names


def _find_record(file: IO[bytes], name: str) -> int | None:
    """Where the bytes of a record begin that is near."""
    here = file.tell()
    near = file.read(4096)
    at = -1
    while (at := near.find(_RECORD, at + 1)) >= 0:
        header = near[at : at + 30]
        if len(header) == 30:
            name_size, extra_size = struct.unpack("<HH", header[26:])
            if near[at + 30 : at + 30 + name_size].decode(errors="replace").endswith(name):
                return here + at + 30 + name_size + extra_size
    return None


# -- writing ---------------------------------------------------------------------------------------------------------


def write(
    source: Tensors, entries: Sequence[Entry], path: Path, done: Done, contents: Callable[[dict[str, Tensor]], object]
) -> None:
    """What `torch.save` would write of `contents(tensors by the names of the entries)`, one tensor in memory.

    The file is laid out with nothing in it, and the bytes are then put where they belong.
    """
    if path.exists():
        done(sum(entry.spec.nbytes for entry in entries))
        return
    # These are heavy, and nothing else here needs them.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.serialization import skip_data

    with FakeTensorMode():
        tensors = {entry.name: torch.empty(entry.spec.shape, dtype=entry.spec.dtype) for entry in entries}
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as opened, skip_data(materialize_fake_tensors=True):
            torch.save(contents(tensors), opened)
        with zipfile.ZipFile(temporary) as archive:
            records = [record for record in archive.infolist() if "/data/" in record.filename]
            directory = archive.start_dir
        records.sort(key=lambda record: int(record.filename.rpartition("/")[2]))
        sums: dict[str, int] = {}
        with open(temporary, "r+b") as file:
            for record, entry in zip(records, entries, strict=True):
                file.seek(record.header_offset + 26)
                names = sum(struct.unpack("<HH", file.read(4)))
                value = tensor_bytes(entry.read(source))
                assert len(value) == record.file_size, entry.name
                file.seek(names, 1)
                file.write(value)
                sums[record.filename] = zlib.crc32(value)
                after = file.tell()
                assert file.read(4) == b"PK\x07\x08", "torch.save puts the checksum after the bytes"
                file.seek(after + 4)
                file.write(struct.pack("<I", sums[record.filename]))
                done(entry.spec.nbytes)
            _correct_directory(file, directory, sums)


def _correct_directory(file: IO[bytes], start: int, sums: Mapping[str, int]) -> None:
    """Put the checksums of the records into a zip file's list of them; torch does not look, other readers do."""
    file.seek(start)
    while (header := file.read(46))[:4] == b"PK\x01\x02":
        name_size, extra_size, comment_size = struct.unpack("<HHH", header[28:34])
        name = file.read(name_size).decode()
        after = file.tell() + extra_size + comment_size
        if name in sums:
            file.seek(after - extra_size - comment_size - name_size - 46 + 16)
            file.write(struct.pack("<I", sums[name]))
        file.seek(after)
