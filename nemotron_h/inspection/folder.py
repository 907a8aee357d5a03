"""A Hugging Face folder of this family as its readers find it, and whether it agrees with itself: nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoints import published
from ..checkpoints.foreign import read_json
from ..checkpoints.tensors import SafetensorsFolder, Shape, Spec
from ..configuration import NemotronHConfig, parse_layers

CONVERT = "`nemotron-h convert FOLDER NEW --to huggingface` writes it for all readers"


@dataclass(frozen=True)
class Finding:
    """What a reader stumbles on: the key, value or tensor, and what to do. A remark does not keep it from reading."""

    what: str
    remedy: str
    remark: bool = False


class Folder:
    """A folder as its readers find it: the raw config, and the tensors under the names that its files have.

    Raises:
        ValueError: no config.json, or another model type.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.fields = published.read_fields(self.path / "config.json")
        self.config: NemotronHConfig | None = None
        self.stored: dict[str, Spec] = {}
        self.config_error = self.files_error = ""
        try:
            self.config = NemotronHConfig.from_dict(dict(self.fields))
        except (ValueError, TypeError) as error:
            self.config_error = " ".join(str(error).split())
        try:
            self.stored = SafetensorsFolder(self.path).specs
        except ValueError as error:
            self.files_error = str(error)

    def json(self, name: str) -> Any:
        """A JSON file of the folder; None where it is not there. Raises `ValueError` where it is no JSON."""
        file = self.path / name
        return read_json(file) if file.exists() else None

    @property
    def pattern(self) -> str | None:
        return self.fields.get("hybrid_override_pattern")

    @property
    def listed(self) -> list[str] | None:
        return self.fields.get("layers_block_type")

    @cached_property
    def kinds(self) -> set[str]:
        """The kinds of layer of the model, in old names; empty where its config does not say them."""
        layers = self.pattern.partition("/")[0] if isinstance(self.pattern, str) else self.listed
        try:
            return set(parse_layers(layers or ""))
        except ValueError:
            return set()

    @property
    def quantized(self) -> str | None:
        """The method of its quantized weights."""
        stored = self.fields.get("quantization_config")
        return str(stored.get("quant_method", "unknown")) if isinstance(stored, dict) else None

    @cached_property
    def expected(self) -> dict[str, Shape]:
        """Every tensor of its config; none where the config cannot be read."""
        return published.tensors(self.config) if self.config else {}


def stacked(name: str, spec: Spec) -> bool:
    """Whether a tensor is all experts of a layer in one, as in memory."""
    return len(spec.shape) == 3 and name.endswith(("mixer.experts.up_proj", "mixer.experts.down_proj"))


def itself(folder: Folder) -> Iterator[Finding]:
    """Where its files do not fit together, whoever reads them."""
    if folder.files_error:
        problem, _, remedy = folder.files_error.rpartition(": ")
        yield Finding(problem or folder.files_error, remedy.rstrip(".") if problem else "fetch or write it again")
    else:
        yield from _tensor_set(folder)
        yield from _index(folder)
    yield from _tokenizer(folder)


def _tensor_set(folder: Folder) -> Iterator[Finding]:
    if folder.config is None:
        return
    fetch = "correct config.json, or fetch or write the checkpoint again"
    stored: dict[str, Shape] = {}
    for name, spec in folder.stored.items():
        stored |= {part: each.shape for part, (each, _) in published.parts(name, spec).items()}
    expected = folder.expected
    missing = [name for name in expected if name not in stored]
    if folder.config.has_mtp and not any(name.startswith("mtp.") for name in stored):
        missing = [name for name in missing if not name.startswith("mtp.")]
        depths = folder.config.num_nextn_predict_layers
        yield Finding(
            f"there are no mtp.* tensors although num_nextn_predict_layers is {depths}",
            "take them from the checkpoint that it was made from, or write num_nextn_predict_layers 0",
            remark=True,
        )
    if missing:
        yield Finding(f"the tensor {missing[0]}{others(missing)} is missing", fetch)
    extra = [name for name in stored if name not in expected]
    if folder.config.tie_word_embeddings:
        extra = [name for name in extra if name != "lm_head.weight"]
    if folder.quantized:
        # Scales and packed weights have the names of their weights, and shapes that are the method's affair.
        extra = [name for name in extra if not _belongs(name, expected)]
    else:
        for name, shape in expected.items():
            if name in stored and stored[name] != shape:
                yield Finding(f"{name} has shape {list(stored[name])} where its config asks for {list(shape)}", fetch)
    if extra:
        yield Finding(f"no layer of its config has the tensor {extra[0]}{others(extra)}", fetch)


def _belongs(name: str, expected: dict[str, Shape]) -> bool:
    module = name.rpartition(".")[0]
    return name.rpartition("_scale")[0] in expected or f"{module}.weight" in expected or "_scale" in name


def others(names: list[str]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""


def _index(folder: Folder) -> Iterator[Finding]:
    index = folder.json("model.safetensors.index.json")
    if index is None:
        return
    rewrite = "write the index again: `nemotron-h convert FOLDER NEW --to huggingface`"
    weight_map = index["weight_map"]
    for name, file in weight_map.items():
        if name not in folder.stored:
            yield Finding(f"the index has {name} in {file}, which does not have it", rewrite)
            return
    if unnamed := [name for name in folder.stored if name not in weight_map]:
        yield Finding(f"the index does not name the tensor {unnamed[0]}{others(unnamed)}", rewrite)
    total = (index.get("metadata") or {}).get("total_size")
    actual = sum(spec.nbytes for spec in folder.stored.values())
    if total is not None and total != actual:
        yield Finding(f"the index has total_size {total} and the tensors have {actual} bytes", rewrite, remark=True)


def _tokenizer(folder: Folder) -> Iterator[Finding]:
    settings, tokenizer = folder.json("tokenizer_config.json") or {}, folder.json("tokenizer.json")
    if tokenizer is None:
        yield Finding("there is no tokenizer.json", "save the tokenizer into the folder as well", remark=True)
        return
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    ids = {**vocabulary, **ids} if isinstance(vocabulary, dict) else ids
    rows = folder.fields.get("vocab_size")
    if ids and isinstance(rows, int) and (largest := max(ids, key=lambda token: ids[token])) and ids[largest] >= rows:
        yield Finding(
            f"the tokenizer has {largest!r} with id {ids[largest]} and vocab_size is {rows}",
            "resize the embeddings, or take the tokenizer of this checkpoint",
        )
    if not (folder.path / "chat_template.jinja").exists() and not settings.get("chat_template"):
        yield Finding(
            "there is no chat template (base models have none)",
            "save the tokenizer with its chat_template",
            remark=True,
        )
    generation = folder.json("generation_config.json")
    stops = (folder.fields if generation is None else generation).get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    where = "config.json" if generation is None else "generation_config.json"
    eos = settings.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if stops == [None]:
        yield Finding(f"{where} has no eos_token_id: generation does not stop by itself", _stop(eos, ids), remark=True)
    elif eos in ids and ids[eos] not in stops:
        yield Finding(
            f"{where} has eos_token_id {stops}, and the tokenizer ends texts with {eos!r}, id {ids[eos]}",
            _stop(eos, ids),
            remark=True,
        )


def _stop(eos: Any, ids: dict[str, int]) -> str:
    return f"add {ids.get(eos, 'its id')} to eos_token_id in generation_config.json"
