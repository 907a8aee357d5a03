"""From a GGUF file to the published folder."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...configuration import NemotronHConfig
from .. import huggingface, published
from ..foreign import plain, shown
from ..tensors import Entry, Plan, Spec, Tensors, narrowed
from ..writing import SHARD_BYTES, Conversion, into_folder
from . import tokenizer
from .header import check_header
from .names import COMPANIONS, CONFIG, DTYPES, ELEMENTS, PLAIN, Row, halves_interleaved, package, table
from .settings import config_from


class GGUFFile:
    """The tensors and the metadata of a GGUF file, or of all parts of a split one.

    Raises:
        ValueError: it is cut short (names the first tensor that is gone with it), of another architecture or byte
            order, or no GGUF file; a part of it is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._gguf = package()
        self.files = self._parts()
        self.specs: dict[str, Spec] = {}
        self._where: dict[str, tuple[Path, Any]] = {}
        self.metadata: dict[str, Any] = {}
        for file in self.files:
            reader = self._open(file)
            for tensor in reader.tensors:
                shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
                dtype = PLAIN.get(tensor.tensor_type.name, torch.float32)
                self.specs[tensor.name] = Spec(shape, dtype)
                # The reader's own view of the data would keep the file mapped, and every page that was read.
                self._where[tensor.name] = (file, tensor._replace(data=None, field=None))
            self.metadata = {name: field.contents() for name, field in reader.fields.items()} | self.metadata
        architecture = self.metadata.get("general.architecture")
        if architecture not in ("nemotron_h", "nemotron_h_moe"):
            raise ValueError(
                f"{self.path} is a {architecture!r} model; this package knows nemotron_h and nemotron_h_moe."
            )

    def _parts(self) -> list[Path]:
        match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", self.path.name)
        if not match:
            return [self.path]
        parts = [self.path.with_name(f"{match[1]}-{i + 1:05d}-of-{match[2]}.gguf") for i in range(int(match[2]))]
        for part in parts:
            plain(part)
        if missing := [part.name for part in parts if not part.exists()]:
            raise ValueError(
                f"{self.path} is one of {len(parts)} parts, and {missing[0]} is not there: fetch it again."
            )
        return parts

    def _open(self, file: Path) -> Any:
        gguf = self._gguf

        class Reader(gguf.GGUFReader):  # type: ignore[misc, name-defined]
            # The library notices a file that is cut short, and does not say where.
            def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
                for field in fields:
                    _, name, _, dims, kind, offset = field.parts
                    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
                    if start_offs + int(offset[0]) + math.prod(dims.tolist()) // block * size > len(self.data):
                        raise _Cut(bytes(name).decode())
                super()._build_tensors(start_offs, fields)

        try:
            check_header(file)
            reader = Reader(file)
        except _Cut as cut:
            raise ValueError(f"{file} is cut short, from the tensor {cut} on: fetch or write it again.") from None
        except (ValueError, IndexError, KeyError, OSError, struct.error, RecursionError, TypeError) as error:
            raise ValueError(f"{file} cannot be read ({shown(str(error), 200)}): fetch or write it again.") from error
        if reader.byte_order != "I":
            raise ValueError(f"{file} has the byte order of another machine; convert it with gguf-convert-endian.")
        return reader

    def is_quantised(self, name: str) -> bool:
        return self._where[name][1].tensor_type.name not in PLAIN

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or only its `index`-th part along the first dimension; float32 where it was quantised."""
        file, tensor = self._where[name]
        shape, count, offset = self.specs[name].shape, tensor.n_bytes, tensor.data_offset
        if index is not None:
            shape, count = shape[1:], count // shape[0]
            offset += index * count
        kind = tensor.tensor_type
        if kind.name in PLAIN:
            data = np.fromfile(file, np.uint8, count, offset=offset)
            return torch.from_numpy(data).view(PLAIN[kind.name]).reshape(shape)
        value = torch.empty(math.prod(shape[:-1]), shape[-1])
        width, some = count // len(value), max(1, ELEMENTS // shape[-1])
        for start in range(0, len(value), some):
            rows = min(some, len(value) - start)
            data = np.fromfile(file, np.uint8, rows * width, offset=offset + start * width).reshape(rows, width)
            value[start : start + rows] = torch.from_numpy(self._gguf.quants.dequantize(data, kind))
        return value.reshape(shape)


class _Cut(Exception):
    pass


@dataclass(frozen=True)
class _Published(Entry):
    """A published tensor out of a row: an expert of a stack is read alone."""

    index: int | None = None
    heads: int = 0

    def read(self, source: Tensors) -> Tensor:
        assert isinstance(source, GGUFFile)
        (name,) = self.sources
        value = source.read(name, self.index)
        if name.endswith(".ssm_a"):
            value = _a_log(value)
        if self.heads:
            value = halves_interleaved(value, self.heads, back=True)
        return narrowed(value.reshape(self.spec.shape), self.spec.dtype, self.name).contiguous()


def _a_log(a: Tensor) -> Tensor:
    """float32 A_log of A = -exp(A_log), in bfloat16's steps where A was made of such."""
    exact = (-a.double()).log()
    rounded = exact.bfloat16().double()
    step = 2.0**-22 * a.double().abs()  # of float32; other exporters exponentiate in float32
    return (rounded if bool((rounded.exp() + a.double()).abs().le(step).all()) else exact).float()


def to_huggingface(path: str | Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> Conversion:
    """The published folder of a GGUF file, ours or llama.cpp's, whole or split; memory holds its largest tensor.

    The tokenizer comes back where the file has it whole (ours do) or names a way of splitting text that is known here.

    Raises:
        ValueError: see `GGUFFile`; an unknown dtype; a key is missing that the config needs.
        ImportError: the package gguf is not there.
    """
    wanted = huggingface.target(dtype)
    source = GGUFFile(path)
    remarks = []
    if CONFIG in source.metadata:
        config = NemotronHConfig.from_dict(json.loads(source.metadata[CONFIG]))
    else:
        config = config_from(source.metadata, source.specs, source.path)
        remarks.append(
            "The file has no huggingface.config: chunk_size and what only training needs are this package's defaults."
        )
    mtp = any(".nextn." in name for name in source.specs)
    if config.has_mtp and not mtp:
        config.num_nextn_predict_layers = 0
        remarks.append("The file has no multi-token prediction: the folder does without it.")
    rows = table(config, mtp)
    was = json.loads(source.metadata.get(DTYPES, "{}"))
    entries: list[Entry] = []
    quantised = 0
    for row in rows:
        if row.name in source.specs:
            stored = _original(source, row, was)
            quantised += source.is_quantised(row.name)
        else:
            stored = torch.float32  # missing: Plan.check says so
        for index, (name, shape) in enumerate(row.published.items()):
            spec = Spec(shape, huggingface.target_dtype(name, stored, wanted))
            part = index if len(row.published) > 1 or "_exps." in row.name else None
            entries.append(_Published(name, spec, {row.name: row.shape}, index=part, heads=row.heads))
    unused = {row.name: "zeros, for a model without that bias" for row in rows if not row.published}
    order = {name: i for i, name in enumerate(published.tensors(config))}
    entries.sort(key=lambda entry: order[entry.name])
    if quantised:
        into = dtype or "float32"
        remarks.append(
            f"{quantised} tensors were quantised: {into} holds what they stand for, not what they were made of."
        )
    head = next(entry for entry in entries if entry.name == "backbone.embeddings.weight")
    save = published.saver(config, wanted or head.spec.dtype)
    files, said = tokenizer.files(source.metadata, config)
    for key, file in COMPANIONS.items():
        if key in source.metadata:
            files[file] = source.metadata[key]
    remarks += said
    return into_folder(Plan(source, entries, unused), save, shard_bytes, [dtype], files=files, remarks=remarks)


def _original(source: GGUFFile, row: Row, was: Mapping[str, str]) -> torch.dtype:
    """What a row's tensors come back in: as stored, or where that is wider than what it was made of, as that."""
    stored = source.specs[row.name].dtype
    before = getattr(torch, was.get(row.name, ""), None)
    if stored == torch.float32 and before in (torch.bfloat16, torch.float16) and not source.is_quantised(row.name):
        return before
    return stored
