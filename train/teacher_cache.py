"""A teacher's predictions on disk: the most probable next tokens after each token, and the
probability of all others together.

A cache is a folder of safetensors files and a `cache.json` that says what made it. Rows are found
by their content, a hash of their tokens and of where their documents begin. So the order of rows,
ranks, epochs and restarts do not matter, and a row of other text is never taken for one of these.

Shapes: B rows, T positions, N tokens, K tokens per prediction, V vocabulary, D hidden size.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from patching.checkpoints.fingerprint import fingerprint
from patching.files.json_files import read_object
from patching.files.outputs import write_json
from patching.recipe import Reference
from patching.running.chunks import CHUNK_LOGITS, slices
from patching.running.logits import LogitChange
from train.batches import Batch
from train.checkpoints.identity import bytes_of_text
from train.data_args import DEFAULT_SHUFFLE_BUFFER, DataArguments
from train.loss import IGNORED_LABEL
from train.vocabulary_loss import TopTokens

CACHE_FILE_NAME = "cache.json"
ROWS_READ = "rows_read"
"""Entry of that file: how many rows to train on were read, from the beginning of the text."""
TOP_K = "teacher_top_k"
"""Setting of a run that reads a cache: the tokens per prediction."""
ORIGIN = "origin_of_rows"
"""Entry of that file: what decided the rows that were read last."""
TOKENS_PER_FILE = 2**18
KEY_BYTES = 16
LEAST_LOG = -80.0
"""Logarithm of a mass too small to matter, where there are no other tokens."""


class UnusableCache(ValueError):
    """A cache lacks a row, or a row of it is damaged. Of a stream, only reading it shows that."""


@torch.no_grad()
def top_tokens(
    hidden_ND: Tensor, head: nn.Linear, change: LogitChange, top_k: int, temperature: float
) -> TopTokens:
    """Return a teacher's `top_k` most probable tokens at a temperature, for each state its head
    reads. `change` is what the teacher does to the output of its head.
    """
    parts = []
    for chunk in slices(len(hidden_ND), CHUNK_LOGITS // len(head.weight)):
        logits_NV = change.apply_(head(hidden_ND[chunk])).float() / temperature
        log_sum_N1 = logits_NV.logsumexp(-1, keepdim=True)
        top_NK, ids_NK = logits_NV.topk(top_k)
        rest_N = logits_NV.scatter_(-1, ids_NK, -torch.inf).logsumexp(-1)
        log_rest_N = (rest_N - log_sum_N1[:, 0]).clamp_min(LEAST_LOG)
        parts.append((ids_NK, top_NK - log_sum_N1, log_rest_N))
    return TopTokens(*map(torch.cat, zip(*parts)))


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text that differs for tokenizers that cut or number text differently."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab()))
    return hashlib.sha256(f"{text} {tokenizer.eos_token_id}".encode()).hexdigest()[:16]


def settings_of(
    reference: Reference,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
) -> dict[str, Any]:
    """Return what must agree between a cache and the run that reads it, apart from its rows."""
    return {
        "teacher": fingerprint(reference),
        "tokenizer": tokenizer_key(tokenizer),
        "temperature": temperature,
        "vocab_size": config.vocab_size,
    }


def origin_of_rows(data_args: DataArguments, seed: int) -> dict[str, Any]:
    """Return what decides which rows are read, and in which order those of a stream are."""
    values: dict[str, Any] = {"seed": seed} | asdict(data_args)
    del values["tokenizer_processes"]
    values["shuffle_buffer"] = data_args.shuffle_buffer or DEFAULT_SHUFFLE_BUFFER
    if os.path.exists(data_args.dataset):
        values["dataset"] = os.path.abspath(data_args.dataset)
    values["bytes_of_text"] = [bytes_of_text(source.name) for source in data_args.sources]
    return values


class CachedRow(NamedTuple):
    """Where a row's tokens are."""

    path: Path
    start: int
    stop: int


def row_key(ids: Iterable[int], document_starts: Iterable[int]) -> bytes:
    """Return the hash that a row is found by, of 16 bytes."""
    digest = hashlib.sha256(numpy.asarray(ids, dtype=numpy.int32).tobytes())
    digest.update(b"starts" + numpy.asarray(document_starts, dtype=numpy.int32).tobytes())
    return digest.digest()[:KEY_BYTES]


def key_of_row(row: dict[str, list[int]]) -> bytes:
    """Return the key of a row as `train.data` makes it."""
    starts = numpy.cumsum([0, *row.get("document_lengths", [])[:-1]])
    return row_key(row["input_ids"], starts if "document_lengths" in row else [])


def keys_of_batch(batch: Batch) -> list[tuple[bytes, int]]:
    """Return the key and length of each row of a batch. A row of padding has length 0."""
    keys = []
    ids_BT, positions_BT = batch["input_ids"].cpu(), batch.get("position_ids")
    lengths = (batch["labels"] != IGNORED_LABEL).sum(1).tolist()
    for i, length in enumerate(lengths):
        starts = []
        if positions_BT is not None:
            starts = (positions_BT[i, :length] == 0).nonzero()[:, 0].cpu()
        keys.append((row_key(ids_BT[i, :length], starts), length))
    return keys


def rows_in(path: Path, top_k: Any) -> dict[bytes, CachedRow]:
    """Return the rows in a file by their keys. Raises ValueError if it is damaged, or does not have
    the `top_k` tokens per prediction that the cache should have.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys, stops_N = file.get_tensor("keys"), file.get_tensor("stops")
            shapes = [file.get_slice(name).get_shape() for name in ("ids", "log_q", "log_rest")]
        stops = stops_N.tolist()
        if keys.dtype != torch.uint8 or keys.shape != (len(stops), KEY_BYTES):
            raise ValueError(f"its keys are {keys.dtype} of shape {tuple(keys.shape)}")
        if stops_N.dtype != torch.int64 or sorted(stops) != stops or stops[0] < 0:
            raise ValueError("the ends of its rows are no increasing numbers")
        if shapes != [[stops[-1], top_k], [stops[-1], top_k], [stops[-1]]]:
            raise ValueError(
                f"it holds {', '.join(map(str, shapes))} numbers for {stops[-1]} tokens, and "
                f"{CACHE_FILE_NAME} says that top_k is {top_k}"
            )
    except (SafetensorError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it and run train.cache_teacher again"
        ) from error
    return {
        key.numpy().tobytes(): CachedRow(path, start, stop)
        for key, start, stop in zip(keys, [0, *stops], stops)
    }


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [
        f"its {name} is {found.get(name)}, not {value}"
        for name, value in expected.items()
        if found.get(name) != value
    ]


class TeacherCache:
    """The predictions of a teacher in a folder."""

    def __init__(self, folder: str | Path, wanted: dict[str, Any] | None = None) -> None:
        """Read what the folder holds. `wanted` is what decides the rows that will be looked up, to
        say why some are missing. Raises ValueError if the folder holds no cache.
        """
        self.folder, self._wanted = Path(folder), wanted or {}
        if not (self.folder / CACHE_FILE_NAME).is_file():
            raise ValueError(
                f"teacher_cache={folder}: no {CACHE_FILE_NAME} there, write one with "
                "python -m train.cache_teacher"
            )
        self.made_by = read_object(self.folder / CACHE_FILE_NAME)
        self.rows: dict[bytes, CachedRow] = {}
        self._opened: dict[Path, Any] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self.rows |= rows_in(path, self.made_by.get("top_k"))

    def check(self, expected: dict[str, Any]) -> None:
        """Raise ValueError, naming every difference, if the cache was made by something else."""
        if problems := _differences(self.made_by, expected):
            raise ValueError(
                f"teacher_cache={self.folder}: {'; '.join(problems)}: use the flags it was made "
                "with, or make another"
            )

    def check_holds(self, rows: Iterable[dict[str, list[int]]]) -> None:
        """Raise UnusableCache unless all these rows are in the cache."""
        num_rows = num_missing = 0
        for row in rows.with_format("numpy") if isinstance(rows, Dataset) else rows:
            num_rows += 1
            num_missing += key_of_row(row) not in self.rows
        if num_missing:
            found = self.made_by.get(ORIGIN)
            known = found if isinstance(found, dict) else {}
            wanted = {name: value for name, value in self._wanted.items() if name in known}
            others = ", ".join(_differences(known, wanted))
            raise UnusableCache(
                f"teacher_cache={self.folder}: {num_missing} of {num_rows} rows are not in it"
                f"{others and f' ({others})'}; run train.cache_teacher with the same --dataset, "
                "--max_length, --packing, --seed, --heldout_documents, --measure_order, "
                "--shuffle_buffer and other flags of the text"
            )

    def check_has_rows(self, num_rows: int) -> None:
        """Raise ValueError if the cache stopped before the end of its text, after fewer rows.

        A row that the text repeats, as each pass over it may, is kept once and counts each time.
        """
        num_read = self.made_by.get(ROWS_READ, len(self.rows))
        if not self.made_by["complete"] and num_read < num_rows:
            raise ValueError(
                f"teacher_cache={self.folder}: it has the first {num_read} rows of its text and "
                f"this run reads {num_rows}; run train.cache_teacher again with more --max_rows"
            )

    def add_to(self, batch: Batch) -> Batch:
        """Return the batch with `teacher_top`, the packed predictions at each of its positions.

        Raises UnusableCache for a row that is not in it, or has tokens that do not exist.
        """
        (num_rows, num_positions), top_k = batch["input_ids"].shape, self.made_by["top_k"]
        ids_BTK = torch.zeros(num_rows, num_positions, top_k, dtype=torch.int32)
        log_q_BTK = torch.zeros(num_rows, num_positions, top_k, dtype=torch.float16)
        log_rest_BT = torch.zeros(num_rows, num_positions)
        for i, (key, length) in enumerate(keys_of_batch(batch)):
            if not length:
                continue
            if key not in self.rows:
                raise UnusableCache(f"teacher_cache={self.folder}: a row of the text is not in it")
            path, start, stop = self.rows[key]
            file = self._file(path)
            ids_BTK[i, :length] = file.get_slice("ids")[start:stop].to(torch.int32)
            if not 0 <= ids_BTK[i].min() <= ids_BTK[i].max() < self.made_by["vocab_size"]:
                raise UnusableCache(
                    f"{path} is damaged (a token that the vocabulary lacks): remove it and run "
                    "train.cache_teacher again"
                )
            log_q_BTK[i, :length] = file.get_slice("log_q")[start:stop]
            log_rest_BT[i, :length] = file.get_slice("log_rest")[start:stop]
        return batch | {"teacher_top": TopTokens(ids_BTK, log_q_BTK, log_rest_BT).packed()}

    def _file(self, path: Path) -> Any:
        if path not in self._opened:
            self._opened[path] = safe_open(path, framework="pt").__enter__()
        return self._opened[path]


class CacheWriter:
    """Writes rows into a folder, in files that appear when they are complete.

    A folder that was begun with the same settings is continued: `rows` holds what it has. `begin`
    comes before the first row.
    """

    def __init__(
        self, folder: Path, made_by: dict[str, Any], origin: dict[str, Any] | None = None
    ) -> None:
        """`origin` is what decides the rows, which may be others than those that the folder has.
        Raises ValueError if the folder holds a cache that was made by something else.
        """
        self.folder, self.made_by = folder, made_by
        self._written = made_by | {ORIGIN: origin or {}}
        self.rows: set[bytes] = set()
        if (folder / CACHE_FILE_NAME).exists():
            begun = TeacherCache(folder)
            begun.check(made_by)
            self.rows = set(begun.rows)
        self._file_idx = 0
        self._keys: list[bytes] = []
        self._parts: list[TopTokens] = []

    def begin(self) -> None:
        """Make the folder, once nothing can be wrong any more with what the user gave."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / CACHE_FILE_NAME).exists():
            write_json(self.folder / CACHE_FILE_NAME, self._written | {"complete": False})

    def add(self, key: bytes, top: TopTokens) -> None:
        """Add a row's predictions, one for each of its tokens."""
        self.rows.add(key)
        self._keys.append(key)
        self._parts.append(top)
        if sum(len(part.log_rest) for part in self._parts) >= TOKENS_PER_FILE:
            self._write()

    def finish(self, num_rows: int | None) -> None:
        """Write what is left. `num_rows` rows to train on have been read, None if that was all of
        the text.
        """
        self._write()
        before = TeacherCache(self.folder).made_by
        read = {} if num_rows is None else {ROWS_READ: max(num_rows, before.get(ROWS_READ, 0))}
        write_json(
            self.folder / CACHE_FILE_NAME, self._written | {"complete": num_rows is None} | read
        )

    def _write(self) -> None:
        if not self._keys:
            return
        ids, log_q, log_rest = (torch.cat(parts).cpu() for parts in zip(*self._parts))
        is_small = self.made_by["vocab_size"] <= 2**16
        tensors = {
            "keys": torch.tensor([list(key) for key in self._keys], dtype=torch.uint8),
            "stops": torch.tensor([len(part.log_rest) for part in self._parts]).cumsum(0),
            "ids": ids.to(torch.uint16 if is_small else torch.int32),
            "log_q": log_q.to(torch.float16),
            "log_rest": log_rest,
        }
        while (path := self.folder / f"rows-{self._file_idx:05}.safetensors").exists():
            self._file_idx += 1  # a damaged file may have been removed, so they are not counted
        incomplete = path.with_suffix(".incomplete")
        save_file(tensors, incomplete)
        incomplete.rename(path)
        self._keys, self._parts = [], []
