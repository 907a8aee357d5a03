"""From a published folder, or a model in memory, to a GGUF file."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...configuration import NemotronHConfig
from .. import published
from ..tensors import Entry, Plan, Spec, Tensors
from ..writing import Conversion, Done, convert, tensor_bytes, write_text
from . import tokenizer
from .names import COMPANIONS, CONFIG, DTYPES, ELEMENTS, MTP_LAYERS, PLAIN, Row, halves_interleaved, package, table
from .settings import architecture, check, keys

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
OUTTYPES = tuple(_FILE_TYPES)


@dataclass(frozen=True)
class _Stored(Entry):
    """A row as it is stored: a part's rows put in order, then a few at a time turned into their dtype in the file."""

    encode: Callable[[Tensor], Tensor] = lambda part: part
    heads: int = 0

    def pieces(self, source: Tensors) -> Iterator[Tensor]:
        """The value from its first row to its last, one expert at a time, and of that a few rows."""
        if not self.sources:
            yield torch.zeros(self.spec.shape, dtype=self.spec.dtype)
        for name in self.sources:
            part = source.read(name)
            if self.heads:
                part = halves_interleaved(part, self.heads)
            part = part.reshape(-1, part.shape[-1])
            for some in part.split(max(1, ELEMENTS // part.shape[-1])):
                yield self.encode(some)

    def read(self, source: Tensors) -> Tensor:
        return torch.cat([piece.flatten() for piece in self.pieces(source)]).reshape(self.spec.shape)


def from_huggingface(path: str | Path, outtype: str = "bf16", pre: str | None = None, mtp: bool = True) -> Conversion:
    """One GGUF file of the Hugging Face folder at `path`; memory holds its largest tensor.

    With `outtype="q8_0"`, matrices whose rows are no multiple of 32 are stored in f16, as llama.cpp's converter does.

    Raises:
        ValueError: no such folder; an unknown outtype; a model that llama.cpp does not compute; a tokenizer that is not
            byte-level BPE, or splits text in a way that has no name in `tokenizer.SPLITS` (say it with `pre`).
        ImportError: the package gguf is not there.
    """
    source = published.PublishedFolder(path)
    return _to_file(source, source.config, source.path, outtype, pre, mtp)


def export(
    model: Any,
    tokenizer: Any,
    dest: str | Path,
    outtype: str = "bf16",
    pre: str | None = None,
    done: Done = lambda nbytes: None,
) -> list[str]:
    """A model in memory, a fine-tune say, as a GGUF file with its tokenizer. Returns the conversion's remarks.

    Args:
        model: a `NemotronHForCausalLM`, without adapters (`merge_and_unload` first).
        tokenizer: as `AutoTokenizer` gives it; None writes a file without a vocabulary.
        dest: the file, absent until it is whole.

    Raises:
        ValueError: as `from_huggingface`; `dest` is there already; the model is wrapped or quantised.
    """
    with tempfile.TemporaryDirectory() as companions:
        if tokenizer is not None:
            tokenizer.save_pretrained(companions)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(companions)
        source = _Model(model)
        conversion = _to_file(source, model.config, Path(companions), outtype, pre, True)
        convert(conversion, dest, done)
    return conversion.remarks


class _Model:
    """A model in memory as `Tensors`, in published names. Files of it are written anew, not gone on with."""

    def __init__(self, model: Any) -> None:
        self.path, self.files = Path("the model"), ()
        config = getattr(model, "config", None)
        if not isinstance(config, NemotronHConfig) or not hasattr(model, "lm_head"):
            raise ValueError(
                f"{type(model).__name__} is no NemotronHForCausalLM; give the causal language model itself."
            )
        if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError("The model has adapters beside its weights; give model.merge_and_unload().")
        self._tensors: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            parts = published.parts(name, Spec(tuple(value.shape), value.dtype))
            self._tensors |= {part: value if i is None else value[i] for part, (_, i) in parts.items()}
        if config.tie_word_embeddings:
            self._tensors.pop("lm_head.weight", None)
        self.specs = {name: Spec(tuple(value.shape), value.dtype) for name, value in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu()


def _to_file(
    source: Tensors, config: NemotronHConfig, companions: Path, outtype: str, pre: str | None, mtp: bool
) -> Conversion:
    if outtype not in OUTTYPES:
        raise ValueError(f"There is no outtype {outtype!r}; write one of {', '.join(OUTTYPES)}.")
    gguf = package()
    check(config, source.path)
    published.check_full_precision(config, source.path)
    remarks = []
    if not {"mamba", "attention"} <= set(config.layers_block_type):
        remarks.append("llama.cpp (0c1e5709) loads no model of this family without both Mamba and attention layers.")
    kept, reason = _mtp(source, config, mtp)
    if reason:
        remarks.append(f"Multi-token prediction is left out: {reason}.")
    unused = {name: reason for name in source.specs if name.startswith("mtp.") and not kept}
    vocabulary = tokenizer.Vocabulary.of(companions, config, pre)
    remarks += vocabulary.remarks

    rows = table(config, kept)
    types = {row.name: _type(row, outtype) for row in rows}
    if halves := [row.name for row in rows if row.is_matrix and types[row.name] != outtype.upper()]:
        remarks.append(
            f"{len(halves)} tensors are stored in f16, {halves[0]} first: q8_0 takes rows of a multiple of 32."
        )
    plan = Plan(source, [_entry(row, types[row.name]) for row in rows], unused)

    def write(folder: Path, done: Done) -> None:
        header = folder / "header.gguf"
        writer = gguf.GGUFWriter(header, architecture(config))
        _add_config(writer, config, kept, outtype)
        vocabulary.add(writer)
        _add_whole(writer, config, companions, rows, source)
        for row in rows:
            kind = gguf.GGMLQuantizationType[types[row.name]]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            nbytes = math.prod(row.shape) // block * size
            writer.add_tensor_info(row.name, row.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        _write_data(plan, header.read_bytes(), folder / "model.gguf", writer.data_alignment, done)

    options = (outtype, pre, kept, json.dumps(config.to_dict(), default=str))
    return Conversion("gguf", plan, write, options, file="model.gguf", remarks=remarks)


def _mtp(source: Tensors, config: NemotronHConfig, wanted: bool) -> tuple[bool, str]:
    """Whether the file has the MTP layers, and where it does not although the model does, why."""
    if not config.has_mtp or not any(name.startswith("mtp.") for name in source.specs):
        return False, ""
    if not wanted:
        return False, "mtp=False"
    depths, layers = config.num_nextn_predict_layers, config.mtp_layers_block_type
    if depths != 1 or layers != MTP_LAYERS or "moe" not in config.layers_block_type:
        return False, f"llama.cpp knows it in MoE models, one depth of '*E', and this has {depths} of {layers}"
    return True, ""


def _add_config(writer: Any, config: NemotronHConfig, mtp: bool, outtype: str) -> None:
    gguf = package()
    writer.add_type(gguf.GGUFType.MODEL)
    if name := Path(config.name_or_path or "").name:
        writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[outtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in keys(config, mtp).items():
        # By type, not by the writer's methods of these names, which older versions of the package do not have all of.
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](f"{writer.arch}.{key}", value)


def _add_whole(writer: Any, config: NemotronHConfig, companions: Path, rows: Iterable[Row], source: Tensors) -> None:
    """What the way back needs, in keys that llama.cpp passes over."""
    writer.add_string(CONFIG, json.dumps(config.to_dict()))
    for key, file in COMPANIONS.items():
        if (companions / file).exists():
            writer.add_string(key, (companions / file).read_text(encoding="utf-8"))
    dtypes = {row.name: str(source.specs[next(iter(row.published))].dtype) for row in rows if row.published}
    writer.add_string(DTYPES, json.dumps({name: dtype.removeprefix("torch.") for name, dtype in dtypes.items()}))


def _type(row: Row, outtype: str) -> str:
    if not row.is_matrix:
        return "F32"
    return "F16" if outtype == "q8_0" and row.shape[-1] % 32 else outtype.upper()


def _entry(row: Row, kind: str) -> _Stored:
    def encode(part: Tensor) -> Tensor:
        if row.is_a:
            return -part.double().exp().float()  # rounded once
        if kind == "Q8_0":
            gguf = package()
            return torch.from_numpy(gguf.quants.quantize(part.float().numpy(), gguf.GGMLQuantizationType.Q8_0))
        stored = part.to(PLAIN[kind])
        if kind == "F16" and bool((stored.isinf() & part.isfinite()).any()):
            raise ValueError(f"{row.name} has values that f16 cannot hold; write outtype bf16 or f32.")
        return stored

    if kind == "Q8_0":
        spec = Spec((*row.shape[:-1], row.shape[-1] // 32 * 34), torch.uint8)
    else:
        spec = Spec(row.shape, PLAIN[kind])
    return _Stored(row.name, spec, row.published, encode=encode, heads=row.heads)


_SAFE_BYTES = 1 << 30  # so much is written between two marks that an interrupted run goes on from


def _write_data(plan: Plan, header: bytes, path: Path, alignment: int, done: Done) -> None:
    """The file, tensor by tensor. A run that was cut off goes on behind the last tensor that is surely on the disk."""
    part, mark = path.with_name("unfinished"), path.with_name("written")
    head = header + bytes(-len(header) % alignment)
    ends = [len(head)]
    for entry in plan.entries:
        ends.append(ends[-1] + entry.spec.nbytes + -entry.spec.nbytes % alignment)
    first = 0
    if part.exists() and mark.exists():
        with open(part, "rb") as file:
            same = file.read(len(head)) == head
        if same and (safe := int(mark.read_text())) in ends and part.stat().st_size >= safe:
            first = ends.index(safe)
    with open(part, "r+b" if first else "wb") as file:
        file.truncate(ends[first] if first else 0)
        file.seek(0, os.SEEK_END)
        if not first:
            file.write(head)
        else:
            done(sum(entry.spec.nbytes for entry in plan.entries[:first]))
        safe = ends[first]
        for index, entry in enumerate(plan.entries[first:], first):
            assert isinstance(entry, _Stored)
            for piece in entry.pieces(plan.source):
                file.write(tensor_bytes(piece.contiguous()))
                done(piece.nbytes)
            file.write(bytes(ends[index + 1] - file.tell()))
            if ends[index + 1] - safe >= _SAFE_BYTES:
                file.flush()
                os.fsync(file.fileno())
                safe = ends[index + 1]
                write_text(mark, str(safe))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
