"""Questions as token ids: written and tokenised once per run folder, then reused for every step and arm.

RUN/.requests/<task>-<key>.parquet holds what a task's questions are for one protocol and one
tokenizer. It can be deleted at any time: it is then made anew.
"""

import hashlib
import importlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from sdpo_data.assets import cache_folder, model_folder
from sdpo_data.models import load_tokenizer
from sdpo_data.run import write_atomically
from sdpo_data.tables import SdpoError
from sdpo_eval.documents import BOS, Documents
from sdpo_eval.h4 import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

REQUESTS = pl.Schema(
    {  # one row per question
        "item_id": pl.String,
        "context": pl.List(pl.Int32),  # token ids of shots and question
        "answers": pl.List(pl.List(pl.Int32)),  # of each choice: the sequence is context + answer
        "lengths": pl.List(pl.Int32),  # characters of each choice: what acc_norm divides by
        "gold": pl.List(pl.Boolean),  # which choices are right
    }
)
BATCH = 512  # questions tokenised together: bounds memory
TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt")  # endings of the files that a tokenizer is read from
SLICE = 2000  # questions handed to the engine together: a whole subject of MMLU, or several

_WRITERS = {"h4-lmeval": "sdpo_eval.harness", "h4-v1": "sdpo_eval.h4_v1"}


@dataclass(frozen=True)
class Item:
    """A question as a model gets it, as text."""

    item_id: str
    context: str
    """Shots and question."""
    choices: list[str]
    """What may follow, each with its leading blank."""
    gold: list[bool]
    """Which choices are right; exactly one, but for mc2."""


@dataclass(frozen=True)
class Questions:
    """What every candidate is asked of one task."""

    task: Task
    protocol: str
    """With its fingerprint."""
    chosen: list[str]
    """Item ids."""
    documents: Documents | None
    """None: out of reach; only what was answered before is known."""

    @property
    def every(self) -> list[str]:
        """Ids of all items that the task has, subject by subject."""
        sizes = {subject: len(splits[self.task.split]) for subject, splits in (self.documents or {}).items()}
        return [f"{subject}/{row}" for subject, size in sizes.items() for row in range(size)]

    def document(self, item_id: str) -> dict[str, Any]:
        """Give the document that an item is made of."""
        assert self.documents is not None
        subject, _, row = item_id.rpartition("/")
        return self.documents[subject][self.task.split][int(row)]

    def cluster(self, item_id: str) -> str:
        """Name what an item was made from, which others may share; by default itself."""
        return str(self.document(item_id)[self.task.made_from]) if self.task.made_from else item_id

    def encode(self, item_ids: Sequence[str], tokenizer: "PreTrainedTokenizerBase", folder: Path) -> pl.DataFrame:
        """Give questions as token ids, from `folder` where they have been written out before.

        Returns:
            REQUESTS frame of these items, subject by subject.

        Raises:
            SdpoError: a special token stands where the protocol has none; see `_refuse_special_tokens`.
        """
        assert self.documents is not None
        name = self.protocol.split("@")[0]
        key = hashlib.sha256(f"{self.protocol} {tokenizer_key(tokenizer)}".encode()).hexdigest()[:12]
        path = folder / f"{self.task.name}-{key}.parquet"
        known = REQUESTS.to_frame()
        if path.exists():
            with suppress(pl.exceptions.PolarsError, OSError):  # a cache: if it cannot be read, it is made anew
                known = pl.read_parquet(path).select(list(REQUESTS))
        missing = sorted(set(item_ids) - set(known["item_id"]))
        if missing:
            started = time.monotonic()
            items = importlib.import_module(_WRITERS[name]).write_items(self.task, self.documents, missing)
            new = encode_items(items, tokenizer, BOS[name])
            _refuse_special_tokens(self.task, name, new, tokenizer)
            known = pl.concat([known, new]).sort("item_id")
            write_atomically(path, lambda temporary: known.write_parquet(temporary, compression_level=9))
            taken = time.monotonic() - started
            log.info("%s: wrote out and tokenised %d questions in %.0f s", self.task.title, len(missing), taken)
        return known.filter(pl.col("item_id").is_in(list(item_ids)))


def encode_items(items: Iterable[Item], tokenizer: "PreTrainedTokenizerBase", bos: str) -> pl.DataFrame:
    """Tokenise questions as lm-eval does: the answer's tokens are those after the context's own.

    Args:
        bos: "tokenizer": special tokens as the tokenizer adds them by default; "never": none.

    Returns:
        REQUESTS frame, in the items' order.

    Source: `_encode_pair` of lm-eval, the same in b281b09 and 0.4.13. Deviation: a context is
        tokenised once, not once per choice.
    """
    special: dict[str, Any] = {} if bos == "tokenizer" else {"add_special_tokens": False}
    frames = [REQUESTS.to_frame()]
    for batch in _batches(items):
        stems = [item.context.rstrip() for item in batch]  # blanks at its end belong to the answer
        contexts = tokenizer(stems, **special)["input_ids"]
        wholes = iter(
            tokenizer([item.context + choice for item in batch for choice in item.choices], **special)["input_ids"]
        )
        rows = [
            (item.item_id, ids, [next(wholes)[len(ids) :] for _ in item.choices],
             [len(choice) - 1 for choice in item.choices], item.gold)
            for item, ids in zip(batch, contexts, strict=True)
        ]  # fmt: skip
        frames.append(pl.DataFrame(rows, REQUESTS, orient="row"))
    return pl.concat(frames)


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def tokenizer_key(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Name a tokenizer by what it does to text: the same for the base model's and for a step's copy of it."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())  # ty: ignore
        content = {name: part for name, part in content.items() if name not in ("padding", "truncation")}
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), str(tokenizer.init_kwargs)]
    own = [content, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tokenizer_key_of(name: str | Path) -> str:
    """Name the tokenizer of a model's folder, or remember its name from the last time these very files were read.

    Args:
        name: folder, hub id, or embedded:NAME.

    Raises:
        SdpoError: there is no such model, or no tokenizer in it.
    """
    files = sorted(file for file in model_folder(str(name)).iterdir() if file.suffix in TOKENIZER_FILES)
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    stamp = json.dumps([importlib.metadata.version("transformers"), stats])
    memo = cache_folder() / "tokenizer_keys" / hashlib.sha256(stamp.encode()).hexdigest()
    if not memo.exists():
        key = tokenizer_key(load_tokenizer(name))
        write_atomically(memo, lambda temporary: temporary.write_text(key))
    return memo.read_text()


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a tokenizer puts BOS before a text by default."""
    return tokenizer.bos_token_id is not None and tokenizer("A")["input_ids"][0] == tokenizer.bos_token_id


def _refuse_special_tokens(
    task: Task, protocol: str, requests: pl.DataFrame, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Refuse another BOS than the protocol's, and the marks of a chat template, of which H4 has none."""
    ends = requests["context"].list.len().cum_sum().to_numpy()
    ids = requests["context"].explode().to_numpy()
    special = np.isin(ids, tokenizer.all_special_ids)
    first = np.zeros(len(ids), dtype=bool)
    first[[0, *ends[:-1]]] = True
    if BOS[protocol] == "never" and (special & first).any():
        raise SdpoError(
            f"{task.title}: the tokenizer begins a question with {tokenizer.decode(ids[0])!r} though told to add "
            f"nothing, but {protocol} has no BOS. Evaluate it with eval.protocol h4-lmeval."
        )
    if (special & ~first).any():
        place = int(np.flatnonzero(special & ~first)[0])
        item = requests["item_id"][int(np.searchsorted(ends, place, side="right"))]
        raise SdpoError(
            f"{task.title}, item {item}: the question holds the special token {tokenizer.decode(ids[place])!r} "
            f"after its first token. {protocol} has plain text only: no chat template, and one BOS at most."
        )
    if requests.filter(pl.col("answers").list.eval(pl.element().list.len() == 0).list.any()).height:
        raise SdpoError(
            f"{task.title}: the tokenizer leaves an answer without a token of its own; nothing can be scored."
        )


def slices(requests: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Cut questions into slices that go through the engine together, never within a subject that fits one."""
    held: list[pl.DataFrame] = []
    subject = pl.col("item_id").str.replace(r"/\d+$", "")
    for _, own in requests.group_by(subject, maintain_order=True):
        if held and sum(map(len, held)) + own.height > SLICE:
            yield pl.concat(held)
            held = []
        held += own.iter_slices(SLICE)
        while len(held) > 1 and sum(map(len, held)) > SLICE:
            yield held.pop(0)
    if held:
        yield pl.concat(held)


def sequences_of(requests: pl.DataFrame) -> list[list[tuple[list[int], int]]]:
    """Give each question's choices as (token ids, where the answer starts), as the prefix engine reads them."""
    return [
        [(context + answer, len(context)) for answer in answers]
        for context, answers in requests.select("context", "answers").iter_rows()
    ]
