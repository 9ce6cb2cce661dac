"""A teacher's k likeliest tokens at every taught position, scored once, kept in a folder, used by any number of runs.

    rows --missing?--> teacher --append--> shard-<hash>.safetensors ... --read(batch.rows)--> FromTopK

A row is known by its content (tokens, and which of them are taught), so neither the order of the data, nor the hold-out, nor
rows added later make a store useless: only what is missing is scored. Each shard is written whole or not at all.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from kitae.algos.distillation import Divergence
from kitae.errors import ConfigError, KitaeError, PlanError
from kitae.models.divergence import FromTopK, compared
from kitae.models.files import header
from kitae.models.policy import Policy
from kitae.train.files import disk_errors, free_bytes, human, read_json, write_atomic, write_json
from kitae.types import Batch, Row, TokenOutputs

FORMAT = 1
MANIFEST = "manifest.json"
HEADROOM = 1.05
"""Of the disk space that is asked for: file systems count in blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """What every number in a store depends on besides its row; a None is not known, and fits anything."""

    teacher: str | None
    revision: str | None
    teacher_fingerprint: str | None
    tokenizer_fingerprint: str
    temperature: float
    top_k: int
    dtype: str


class Missing(NamedTuple):
    """What a store has not got yet."""

    items: list[int]
    num_rows: int
    num_taught: int


NAMES = {
    "teacher": "teacher.name_or_path",
    "revision": "teacher.revision",
    "teacher_fingerprint": "the teacher's weights (by their fingerprint)",
    "tokenizer_fingerprint": "the tokenizer (by its fingerprint)",
    "temperature": "distill.temperature",
    "top_k": "distill.top_k",
    "dtype": "distill.store_dtype",
}
"""How a user knows each fact."""


class TeacherStore:
    """A folder of shards and its manifest. Every rank opens it, and each writes shards of its own rows."""

    def __init__(self, folder: str | Path, facts: StoreFacts) -> None:
        """Open what is there, if anything; one that was made from something else is refused."""
        self.folder = Path(folder).expanduser()
        self._manifest: dict[str, Any] | None = None
        self._shards: list[tuple[Path, np.ndarray]] = []  # path, offsets of its rows
        self._index: dict[int, tuple[int, int]] = {}  # row key -> shard, row in it
        self.refresh()
        if self._manifest is None and self.folder.is_dir() and any(self.folder.iterdir()):
            raise ConfigError(
                f"distill.store is {self.folder}, a folder with other things in it and no {MANIFEST}; name a new one"
            )
        self.require(facts)

    @property
    def num_columns(self) -> int:
        """Token ids below this are those the teacher was asked about; 0 before the store is made."""
        return int(self._manifest["num_columns"]) if self._manifest else 0

    @property
    def teacher_fingerprint(self) -> str | None:
        """Of the teacher that filled the store."""
        found: str | None = (self._manifest or {}).get("teacher_fingerprint")
        return found

    def __len__(self) -> int:
        return len(self._index)

    def refresh(self) -> None:
        """Take in what has come to the folder."""
        self._manifest = self._manifest or read_json(self.folder / MANIFEST)
        known = {path for path, _ in self._shards}
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            if path not in known:
                self._take_in(path)

    def require(self, facts: StoreFacts) -> None:
        """Refuse a store that was made from something else; what is written from now on is made from `facts`."""
        self.facts = facts
        if self._manifest is not None:
            self._compare(self._manifest)

    def missing(self, items: Sequence[Sequence[Row]]) -> Missing:
        """Items with a row that is not in the store."""
        wanting, taught_of = list[int](), dict[int, int]()
        for i in range(len(items)):
            keyed = {row_key(row): row.num_taught for row in items[i]}
            new = {
                key: taught
                for key, taught in keyed.items()
                if key not in self._index and key not in taught_of
            }
            if new:
                wanting.append(i)
                taught_of |= new
        return Missing(wanting, len(taught_of), sum(taught_of.values()))

    def require_space(self, missing: Sequence[Missing]) -> int:
        """Bytes that these rows will take; refused where the disk has not that much."""
        rows, taught = sum(part.num_rows for part in missing), sum(part.num_taught for part in missing)
        k, width = self.facts.top_k, np.dtype(self.facts.dtype).itemsize
        needed = int(HEADROOM * (taught * (4 * k + width * (k + 1)) + 16 * rows))
        free = free_bytes(self.folder)
        if free is not None and needed > free:
            raise PlanError(
                f"distill.store: {rows} rows with {taught} taught tokens need {human(needed)} in {self.folder}, and "
                f"{human(free)} are free; lower distill.top_k (here {k}), set distill.store_dtype = float16, or choose "
                "another disk"
            )
        return needed

    def create(self, *, num_columns: int) -> None:
        """Write the manifest of a new store, which makes it one; one that exists keeps its own."""
        if self._manifest is not None:
            return
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            facts = {"format": FORMAT, **asdict(self.facts), "num_columns": num_columns}
            write_json(self.folder / MANIFEST, facts)

    def append(self, rows: Sequence[Row], ids_NK: Tensor, logp_NB: Tensor) -> None:
        """Write one shard with the numbers of these rows' taught tokens, in their order."""
        counts = [row.num_taught for row in rows]
        assert sum(counts) == len(ids_NK) == len(logp_NB), (sum(counts), len(ids_NK), len(logp_NB))
        keys = np.array([row_key(row) for row in rows], dtype=np.uint64)
        tensors: dict[str, np.ndarray] = {
            "keys": keys,
            "offsets": np.array([0, *np.cumsum(counts)], dtype=np.int64),
            "ids": ids_NK.cpu().numpy().astype(np.uint32),
            "logprobs": logp_NB.cpu().numpy().astype(self.facts.dtype),
        }
        path = self.folder / f"shard-{xxhash.xxh3_64_hexdigest(keys.tobytes())}.safetensors"
        data = save(tensors)
        with disk_errors(path, needed=len(data)):
            write_atomic(path, data)

    def read(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Ids [N, k] and log-probs [N, k + 1] of the rows' taught tokens; the last is of all other tokens together."""
        ids, logprobs = [], []
        for row in rows:
            shard, number = self._index[row_key(row)]
            path, offsets = self._shards[shard]
            span = slice(int(offsets[number]), int(offsets[number + 1]))
            assert span.stop - span.start == row.num_taught, (path, number)
            with safe_open(path, framework="np") as file:
                ids.append(file.get_slice("ids")[span])
                logprobs.append(file.get_slice("logprobs")[span])
        found = torch.from_numpy(np.concatenate(logprobs).astype(np.float32))
        if self.facts.dtype == "float16":
            found = found.log_softmax(-1)  # rounding has left a sum beside 1
        return torch.from_numpy(np.concatenate(ids).astype(np.int64)), found

    def _take_in(self, path: Path) -> None:
        try:
            header(path)
            with safe_open(path, framework="np") as file:
                keys, offsets = file.get_tensor("keys"), file.get_tensor("offsets")
        except (KitaeError, OSError) as error:
            raise ConfigError(
                f"distill.store: {path} is damaged ({error}); remove that file, and its rows are scored again"
            ) from error
        self._shards.append((path, offsets))
        for number, key in enumerate(keys.tolist()):
            self._index.setdefault(key, (len(self._shards) - 1, number))

    def _compare(self, manifest: dict[str, Any]) -> None:
        if manifest.get("format") != FORMAT:
            raise ConfigError(
                f"distill.store {self.folder} has format {manifest.get('format')}, and this kitae reads {FORMAT}; name "
                "another folder"
            )
        same_weights = self.facts.teacher_fingerprint in (None, manifest["teacher_fingerprint"])
        is_checked = same_weights and self.facts.teacher_fingerprint is not None
        for name, now in asdict(self.facts).items():
            if now is None or (is_checked and name in ("teacher", "revision")):  # the same weights elsewhere
                continue
            if manifest[name] != now:
                raise ConfigError(
                    f"distill.store {self.folder} was made with another {NAMES[name]}: {json.dumps(manifest[name])} then, "
                    f"{json.dumps(now)} now; name another folder, or set it back"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTeacher:
    """A teacher that is known from a store alone; see types.Teacher."""

    store: TeacherStore
    how: Divergence
    ce_coef: float | None = None
    """As LiveTeacher's."""

    def compare(self, student: Policy, batch: Batch, hidden_NH: Tensor) -> TokenOutputs:
        ids_NK, logp_NB = self.store.read(batch.rows)
        device = hidden_NH.device
        soft = FromTopK(
            ids_NK=ids_NK.to(device), logp_NB=logp_NB.to(device), num_columns=self.store.num_columns
        )
        return compared(student, batch, hidden_NH, soft=soft, how=self.how, ce_coef=self.ce_coef)


def row_key(row: Row) -> int:
    """64-bit hash of a row's tokens and of which are taught."""
    content = array("q", row.token_ids).tobytes() + bytes(row.loss_mask)
    return xxhash.xxh3_64_intdigest(content)
