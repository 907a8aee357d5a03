"""States at chosen points of texts, kept so that a prompt goes on from the longest one that it begins with.

A recurrent state is that of one exact prefix: it can be gone on from, and not cut. So a `PromptCache` keeps snapshots
where texts are likely to part: at the end of a prompt, after what was generated, at the positions it is told, and where
a new prompt is seen to part from a kept one.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..cache.files import header, read, saved_ids, write
from ..cache.fingerprint import Origin, essentials, known_digest, origin
from ..cache.hybrid import NemotronHCache
from ..cache.snapshot import Snapshot

logger = logging.get_logger(__name__)

Key = tuple[str, bytes]
"""Whose state, and the token ids before it."""

_WORD = 8  # bytes of a token id in a key


@dataclass
class _Entry:
    snapshot: Snapshot
    origin: Origin  # what its file says of it, also while another model is in use


class PromptCache:
    """Snapshots of prompts under a budget of bytes; the longest one that a prompt begins with is gone on from.

        prompt_cache = PromptCache(max_bytes=2 << 30)
        model.generate(**inputs, prompt_cache=prompt_cache)

    When the budget is spent, the least recently used go first. Entries are told apart by the model's config and
    weights, so that one of these may serve several models. Each has keys and values of its own: below some thousands of
    tokens they are the smaller part of a state. Safe to use from several threads.

    Args:
        max_bytes: of all entries in memory. One that is larger than that alone is not kept, which is said once.
        folder: where entries that no longer fit are written, and found again, by later processes too; `flush` writes
            all. Files that are damaged, of another format version or of several rows are passed over.
        folder_bytes: of all files in the folder, ten times `max_bytes` unless given; the oldest go first.
        every: also keep a snapshot at each multiple of so many tokens of a prompt.
        shortest: a point where a prompt parts from a kept one is kept itself, if it is so many tokens beyond what is
            there already.
    """

    def __init__(
        self,
        max_bytes: int = 2 << 30,
        folder: str | Path | None = None,
        *,
        folder_bytes: int | None = None,
        every: int | None = None,
        shortest: int = 32,
    ):
        if max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}: give a number of bytes, 0 for none in memory.")
        if every is not None and every < 1:
            raise ValueError(f"every is {every}: give a number of tokens, at least 1, or None.")
        self.max_bytes, self.every, self.shortest = max_bytes, every, shortest
        self.folder = None if folder is None else Path(folder)
        self.folder_bytes = 10 * max_bytes if folder_bytes is None else folder_bytes
        self.hits = self.misses = 0
        self.tokens_reused = self.tokens_computed = 0
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._files: OrderedDict[Key, Path] = OrderedDict()
        self._lock = threading.RLock()
        self._said = False
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._scan()

    # ---- looking up and keeping

    def resume(self, cache: NemotronHCache, token_ids: Any, model: Any, owner: str | None = None) -> int:
        """Restore the longest kept prefix of `token_ids` into `cache`; returns its length, 0 where there is none.

        `cache` is one of the model's, whatever it holds; with 0 it is left alone. Ids are one row. `owner`, here and
        below, is `owner_of(model)` where it is known already.
        """
        owner, ids = owner or owner_of(model), _bytes(token_ids)
        with self._lock:
            while (key := self._longest(owner, ids)) is not None:
                snapshot = self._get(key, model)
                if snapshot is None:  # its file is gone or cannot be read: the next best
                    continue
                cache.restore(snapshot)
                self.hits += 1
                self.tokens_reused += snapshot.length
                return snapshot.length
            self.misses += 1
            return 0

    def store(self, cache: NemotronHCache, token_ids: Any, model: Any, owner: str | None = None) -> None:
        """Keep what `cache` holds as the state after `token_ids`, one row of as many ids as it has seen.

        Raises:
            ValueError: another number of ids than the cache has seen, or several rows.
        """
        ids = _bytes(token_ids)
        length = int(cache.get_seq_length())
        if len(ids) != length * _WORD:
            raise ValueError(f"The cache has seen {length} tokens and token_ids has {len(ids) // _WORD}: pass those.")
        if length == 0:
            return
        if cache.batch_size != 1:
            raise ValueError(f"A PromptCache keeps single rows and the cache has {cache.batch_size}: split it first.")
        key = owner or owner_of(model), ids
        entry = _Entry(cache.snapshot().apart(), _origin(key, model))
        with self._lock:
            self._entries.pop(key, None)
            self._entries[key] = entry
            self._fit()

    def boundaries(
        self, token_ids: Any, model: Any, start: int, wanted: Iterable[int] = (), owner: str | None = None
    ) -> list[int]:
        """Lengths, ascending and beyond `start`, at which a snapshot of this prompt is worth keeping.

        They are those `wanted`, multiples of `every`, the longest beginning that a kept text has in common with it, and
        all of it but the last token, which is needed to go on.
        """
        ids = _bytes(token_ids)
        end = len(ids) // _WORD - 1
        found = {*wanted, end}
        if self.every is not None:
            found.update(range(self.every, end, self.every))
        owner = owner or owner_of(model)
        with self._lock:
            parting = max((_common(key[1], ids) for key in self._keys() if key[0] == owner), default=0)
        if parting - start >= self.shortest:
            found.add(parting)
        return sorted(length for length in found if start < length <= end)

    # ---- what is there

    def __len__(self) -> int:
        """Entries in memory."""
        return len(self._entries)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each entry in memory, the least recently used first."""
        return [entry.snapshot.length for entry in self._entries.values()]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        with self._lock:
            return sum(entry.snapshot.nbytes for entry in self._entries.values())

    def clear(self) -> None:
        """Forget the entries in memory; files stay."""
        with self._lock:
            self._entries.clear()

    def flush(self, model: Any) -> None:
        """Write the model's entries in memory to the folder, so that another process finds them.

        Raises:
            ValueError: there is no folder.
        """
        if self.folder is None:
            raise ValueError("This PromptCache has no folder to write to: make it with PromptCache(folder=...).")
        owner = owner_of(model)
        with self._lock:
            for key, entry in self._entries.items():
                if key[0] == owner:
                    self._write(key, entry)

    # ---- inside

    def _keys(self) -> list[Key]:
        return [*self._entries, *(key for key in self._files if key not in self._entries)]

    def _longest(self, owner: str, ids: bytes) -> Key | None:
        fitting = (key for key in self._keys() if key[0] == owner and ids.startswith(key[1]))
        return max(fitting, key=lambda key: len(key[1]), default=None)

    def _get(self, key: Key, model: Any) -> Snapshot | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
            return entry.snapshot
        path = self._files[key]
        try:
            snapshot = read(path, model, digest=_weights(key))
            with suppress(OSError):  # somebody else's folder, to be read alone
                path.touch()
        except Exception as error:  # whatever is wrong with the file, the prompt can be computed
            logger.warning(f"A prompt's state is computed again: {_in_words(error)}")
            del self._files[key]
            return None
        self._files.move_to_end(key)
        self._entries[key] = _Entry(snapshot, _origin(key, model))
        self._fit()
        return snapshot

    def _fit(self) -> None:
        while self._entries and self.nbytes > self.max_bytes:
            key, entry = self._entries.popitem(last=False)
            alone = not self._entries
            if self.folder is not None:
                self._try_to_write(key, entry)
            elif alone and not self._said:
                self._said = True
                logger.warning(
                    f"A state of {entry.snapshot.nbytes:,} bytes after {entry.snapshot.length:,} tokens does not fit "
                    f"PromptCache(max_bytes={self.max_bytes:,}), so it is not kept: give it more."
                )

    def _try_to_write(self, key: Key, entry: _Entry) -> None:
        try:
            self._write(key, entry)
        except OSError as error:  # as without a folder: whoever is generating goes on
            logger.warning(f"A prompt's state is not kept: {_in_words(error)}")

    def _write(self, key: Key, entry: _Entry) -> None:
        assert self.folder is not None
        if key in self._files and self._files[key].exists():
            return
        path = self.folder / f"{hashlib.sha256(key[0].encode() + key[1]).hexdigest()[:40]}.safetensors"
        ids = torch.from_numpy(_numbers(key[1]).copy())
        write(entry.snapshot, path, origin=entry.origin, token_ids=ids, keep_ids=True)
        self._files.pop(key, None)
        self._files[key] = path
        sizes = {each: each.stat().st_size for each in self._files.values() if each.exists()}
        while len(self._files) > 1 and sum(sizes.values()) > self.folder_bytes:
            _, oldest = self._files.popitem(last=False)
            sizes.pop(oldest, None)
            oldest.unlink(missing_ok=True)

    def _scan(self) -> None:
        assert self.folder is not None
        for path in sorted(self.folder.glob("*.safetensors"), key=_modified):
            try:
                found, ids = header(path), saved_ids(path)
                if ids is not None and len(ids) == 1 and found["weights"]:
                    owner = _owner(json.loads(found["config"]), found["weights"], found["dtype"])
                    self._files[owner, _bytes(ids)] = path
            except Exception as error:  # a folder may hold anything, and nobody asked for this very file
                logger.debug(f"Passed over in {self.folder}: {_in_words(error)}")


def _in_words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process took it away
        return 0.0


def owner_of(model: Any) -> str:
    """Whose a state is: a digest of the config and dtype, and one of the weights."""
    return _owner(essentials(model.config), known_digest(model), str(model.dtype).removeprefix("torch."))


def _owner(config: dict[str, Any], weights: str, dtype: str) -> str:
    return hashlib.sha256((json.dumps(config, sort_keys=True) + dtype).encode()).hexdigest() + "-" + weights


def _weights(key: Key) -> str:
    return key[0].split("-")[1]


def _origin(key: Key, model: Any) -> Origin:
    return origin(model, _weights(key))


def _bytes(token_ids: Any) -> bytes:
    ids = torch.as_tensor(token_ids, dtype=torch.int64)
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"A PromptCache keeps single rows and the ids are {tuple(ids.shape)}: pass one row at a time.")
    return ids.cpu().numpy().tobytes()


def _numbers(ids: bytes) -> Any:
    return np.frombuffer(ids, dtype=np.int64)


def _common(a: bytes, b: bytes) -> int:
    """Tokens that both begin with."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(_numbers(a[:size]) != _numbers(b[:size]))
    return int(differ[0]) if len(differ) else size // _WORD


__all__ = ["PromptCache", "owner_of"]
