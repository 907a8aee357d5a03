"""Files of `torch.save`, read without running anything that is in them.

`torch.load` has more doors than one: it hands a TorchScript archive to `torch.jit.load`, which runs the archive's code,
and reads two older formats, one of them a tar file that is unpacked first. Here only the zip file of tensors that torch
writes since 1.6 is opened, and of the objects in it none is made but those that hold a model's numbers and arguments.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any, ClassVar

import torch

from .foreign import plain, shown

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

    Raises `ValueError` where it cannot be read.
    """
    plain(path)
    try:
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=PickleModule, mmap=mmap)
    except Exception as error:  # of a damaged pickle anything comes
        names = names_of_cut(path)
        if isinstance(error, ValueError) and str(path) in str(error) and not names:
            raise
        lost = f", and with it {names[0]} and {len(names) - 1} other tensors" if names else ""
        raise ValueError(f"{path} cannot be read{lost}: fetch or write it again.") from error


_PICKLE_BYTES = 64 << 20  # more than the names and arguments of any model


class _NamesAlone(Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("argparse", "collections"):
            return super().find_class(module, name)
        return type(name, (_Unknown,), {"__module__": module})

    def persistent_load(self, pid: Any) -> None:
        return None


def names_of_cut(path: Path) -> list[str]:
    """The tensors of "model" in a file of `torch.save` that is cut short: its pickle comes first."""
    try:
        with open(path, "rb") as file:
            header = file.read(30)
            file.seek(30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"))
            model = _NamesAlone(io.BytesIO(file.read(_PICKLE_BYTES))).load()["model"]
            return [name for name, value in model.items() if isinstance(value, _Unknown)]
    except Exception:  # whatever a damaged file makes of the pickle: there is just no name to tell
        return []
