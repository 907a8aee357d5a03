"""Tokenizers and chat templates in GGUF files: byte-level BPE, which every model of this family has.

| Hugging Face | GGUF |
|---|---|
| `tokenizer.json`: vocab, added tokens | `tokenizer.ggml.tokens` and `.token_type`, one per row of the embeddings |
| merges | `tokenizer.ggml.merges` |
| how text is split before merging | `tokenizer.ggml.pre`, one of llama.cpp's names (`SPLITS`) |
| `bos_token` ..., the config's and generation's ids | `tokenizer.ggml.*_token_id`; further ends: `eot`, `eom` |
| what the post-processor adds | `tokenizer.ggml.add_bos_token`, `.add_eos_token` |
| `chat_template.jinja` | `tokenizer.chat_template`, `{% generation %}` as comments: not all know it |
| `tokenizer.json`, `tokenizer_config.json`, whole | `tokenizer.huggingface.json`, `huggingface.tokenizer_config` |
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...configuration import NemotronHConfig
from ..foreign import read_json

_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _END
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_CASED}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _END
)
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Of the bundled model. llama.cpp has no such rule, but "bloom" cuts nowhere where this one does not (only at white
# space and around punctuation), and no token of such a vocabulary reaches over a cut: the merges come out the same.
_SINGLE = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"

SPLITS = {_LLAMA3: "pixtral", _TEKKEN: "tekken", _GPT2: "gpt-2", _SINGLE: "bloom"}
"""The pattern of a `Split` -> llama.cpp's name of it. "pixtral" (llama-3's) is what the family's files have."""
_WHOLE_WORDS = ("pixtral", "llama-bpe", "tekken")  # take a word that is a token without merging, as `ignore_merges`
_REBUILT = {"pixtral": _LLAMA3, "llama-bpe": _LLAMA3, "tekken": _TEKKEN}

_JSON, _CONFIG = "tokenizer.huggingface.json", "huggingface.tokenizer_config"
_TEMPLATE = "tokenizer.chat_template"
_GENERATION = re.compile(r"\{%(-?)\s*(generation|endgeneration)\s*(-?)%\}")
_HIDDEN = re.compile(r"\{#(-?) (generation|endgeneration) (-?)#\}")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType


@dataclass
class Vocabulary:
    """What a file says of its tokens. Without `tokens` it says that there are none, and takes ids alone."""

    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = ""
    ids: dict[str, int] = field(default_factory=dict)  # bos, eos, unk, pad, eot, eom
    adds: dict[str, bool] = field(default_factory=dict)  # bos, eos
    template: str | list[dict[str, str]] | None = None  # several have names
    texts: dict[str, str] = field(default_factory=dict)  # keys with whole files
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, config: NemotronHConfig, pre: str | None = None) -> Vocabulary:
        """Of a folder's `tokenizer.json` and what lies beside it.

        Raises:
            ValueError: another kind than byte-level BPE, more tokens than the embeddings have rows, or a way of
                splitting text that is not in `SPLITS` where `pre` does not name it.
        """
        file = folder / "tokenizer.json"
        if not file.exists():
            return cls(remarks=["There is no tokenizer.json: the file has no vocabulary, and takes ids alone."])
        text, fields = file.read_text(encoding="utf-8"), read_json(file)
        self = cls(pre=pre or _split(fields, file), texts={_JSON: text})
        self._read_tokens(fields, config.vocab_size, file)
        self._read_special(folder, text, config)
        if (settings := folder / "tokenizer_config.json").exists():
            self.texts[_CONFIG] = settings.read_text(encoding="utf-8")
        whole_words = bool(fields["model"].get("ignore_merges"))
        if pre is None and whole_words != (self.pre in _WHOLE_WORDS):
            self.remarks.append(
                f"tokenizer.json says ignore_merges={whole_words}, llama.cpp does the opposite for {self.pre!r}: words "
                "that are a token which no merges lead to may come out otherwise."
            )
        return self

    def _read_tokens(self, fields: Mapping[str, Any], rows: int, file: Path) -> None:
        added = {token["id"]: token for token in fields.get("added_tokens", ())}
        names = {index: token for token, index in fields["model"]["vocab"].items()}
        names |= {index: token["content"] for index, token in added.items()}
        if (last := max(names)) >= rows:
            raise ValueError(
                f"{file} has the token {names[last]!r} with id {last}, but vocab_size is {rows}; resize the embeddings."
            )
        for index in range(rows):
            if index not in names:
                self.tokens.append(f"[PAD{index}]")
                self.types.append(_UNUSED)
            else:
                self.tokens.append(names[index])
                special = added[index].get("special") if index in added else None
                self.types.append(_NORMAL if index not in added else _CONTROL if special else _USER_DEFINED)

    def _read_special(self, folder: Path, text: str, config: NemotronHConfig) -> None:
        import gguf
        from tokenizers import Tokenizer

        known = gguf.SpecialVocab(folder, load_merges=True, n_vocab=config.vocab_size)
        self.merges = known.merges
        kinds = ("bos", "eos", "unk", "pad")
        self.ids = {kind: index for kind, index in known.special_token_ids.items() if kind in kinds}
        for kind in kinds:
            index = getattr(config, f"{kind}_token_id", None)
            if isinstance(index, int):
                self.ids.setdefault(kind, index)
        ends = _ids(config.eos_token_id)
        if (generation := folder / "generation_config.json").exists():
            ends += _ids(read_json(generation).get("eos_token_id"))
        ends = [index for index in dict.fromkeys(ends) if index != self.ids.get("eos")]
        self.ids |= dict(zip(("eot", "eom"), ends, strict=False))
        if len(ends) > 2:
            self.remarks.append(f"A GGUF file names three tokens that end a reply; {ends[2:]} are left out.")
        around = Tokenizer.from_str(text).encode("").ids
        self.adds = {
            "bos": around[:1] == [self.ids.get("bos")],
            "eos": around[-1:] == [self.ids.get("eos")],
        }
        if isinstance(template := known.chat_template, str):
            self.template = _hide(template)
        elif template:
            self.template = [{**each, "template": _hide(each["template"])} for each in template]

    def add(self, writer: Any) -> None:
        """Write it into a `gguf.GGUFWriter`."""
        if not self.tokens:
            writer.add_tokenizer_model("none")
            return
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for kind, index in self.ids.items():
            getattr(writer, f"add_{kind}_token_id")(index)
        for kind, value in self.adds.items():
            getattr(writer, f"add_add_{kind}_token")(value)
        if self.template:
            writer.add_chat_template(self.template)
        for key, text in self.texts.items():
            writer.add_string(key, text)


def _hide(template: str) -> str:
    return _GENERATION.sub(r"{#\1 \2 \3#}", template)


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _split(fields: Mapping[str, Any], file: Path) -> str:
    """llama.cpp's name of how a tokenizer splits text."""
    kind, before = fields["model"]["type"], fields.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    byte_level = bool(steps) and steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space")
    if kind != "BPE" or not byte_level or fields.get("normalizer"):
        raise ValueError(
            f"{file} is {kind} with the steps {[step.get('type') for step in steps]}, and GGUF files are written of "
            "byte-level BPE; take tokenizer.json out of the folder for a file without a vocabulary."
        )
    patterns = [step.get("pattern", {}).get("Regex") for step in steps[:-1] if step.get("type") == "Split"]
    if len(steps) == 1 and steps[0].get("use_regex", True):
        return "gpt-2"
    if len(steps) == 2 and patterns and patterns[0] in SPLITS and not steps[-1].get("use_regex", True):
        return SPLITS[patterns[0]]
    raise ValueError(
        f"{file} splits text by {patterns}, for which no name of llama.cpp's is known here; give one as pre, such as "
        "pre='pixtral'."
    )


def files(metadata: Mapping[str, Any], config: NemotronHConfig) -> tuple[dict[str, str], list[str]]:
    """The tokenizer's files of a Hugging Face folder, by name, from a GGUF file's metadata, and remarks."""
    made: dict[str, str] = {}
    remarks: list[str] = []
    if metadata.get("tokenizer.ggml.model", "none") == "none" and _JSON not in metadata:
        return made, ["The file has no vocabulary: the folder has no tokenizer."]
    if _JSON in metadata:
        made["tokenizer.json"] = metadata[_JSON]
    elif (rebuilt := _rebuild(metadata)) is not None:
        made["tokenizer.json"] = json.dumps(rebuilt, ensure_ascii=False)
        remarks.append("The tokenizer is rebuilt from llama.cpp's keys; compare it with the one of the original model.")
    else:
        name = f"{metadata.get('tokenizer.ggml.model')}/{metadata.get('tokenizer.ggml.pre')}"
        return made, [f"The tokenizer cannot be rebuilt from {name}: copy it from the original model's folder."]
    if isinstance(template := metadata.get(_TEMPLATE), str):
        made["chat_template.jinja"] = _HIDDEN.sub(r"{%\1 \2 \3%}", template)
    made["tokenizer_config.json"] = metadata.get(_CONFIG) or json.dumps(_settings(metadata), indent=2) + "\n"
    return made, remarks


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {kind: metadata.get(f"tokenizer.ggml.{key}_token_id") for kind, key in keys.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **{f"{kind}_token": tokens[index] for kind, index in found.items() if index is not None},
    }


def _rebuild(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """A `tokenizer.json` of llama.cpp's keys; None where `pre` is not known here."""
    pre = metadata.get("tokenizer.ggml.pre")
    splits = _REBUILT | {name: pattern for pattern, name in SPLITS.items()}
    if metadata.get("tokenizer.ggml.model") != "gpt2" or pre not in splits:
        return None
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    own = [(index, token) for index, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED]
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[index] == _CONTROL,
        }
        for index, token in own
        if types[index] in (_CONTROL, _USER_DEFINED)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": splits[pre]}, "behavior": "Isolated", "invert": False}
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    begins = bos is not None and metadata.get("tokenizer.ggml.add_bos_token", pre in _WHOLE_WORDS)
    special = {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]} if begins else {}
    first = [{"SpecialToken": {"id": tokens[bos], "type_id": 0}}] if begins else []
    sequences = [{"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*first, sequences[0]],
            "pair": [*first, *sequences],
            "special_tokens": {special["id"]: special} if begins else {},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _WHOLE_WORDS,
            "vocab": {token: index for index, token in own},
            "merges": [merge.split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges", ())],
        },
    }
