"""Where the documents of an evaluation stand in pairs: the three rules of decontaminate.py, on hashed words."""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import polars as pl

from sdpo_data.console import progress
from sdpo_data.messages import plain_texts
from sdpo_data.ngrams import Numbers, Words, cut_chunks, hash_at, hash_grams, read_words
from sdpo_data.tables import CONTAMINATION, DOCUMENTS, check

log = logging.getLogger(__name__)

Rule = Literal["question", "8-gram", "13-gram"]
GRAM, LONG_GRAM = 8, 13  # words
FEWEST_WORDS = 3
MOST_ITEMS = 10  # that may share a run of words: what more of them share is boilerplate and does not count


def find_contamination(pairs: pl.DataFrame, documents: pl.DataFrame, coverage: float = 0.5) -> pl.DataFrame:
    """Find every document that stands in a pair, by each of the three rules.

    Args:
        pairs: PAIRS frame.
        documents: DOCUMENTS frame; an item may have several.
        coverage: least share of a document's distinct 8-grams, for the rule 8-gram.

    Returns:
        CONTAMINATION frame in the order of `pairs`: a row for every pair, item and rule, with the
        words of the pair that match.

    Source: GPT-3's 13-grams (arXiv 2005.14165, appendix C); the other rules because questions
        such as TruthfulQA's are mostly shorter than that.
    """
    index = _index(check(documents, DOCUMENTS, "documents"))
    chunks = list(cut_chunks(_bytes_of(pairs)))
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress("decontaminate", pairs.height, "pairs") as advance:
        found = []
        for chunk, hits in zip(chunks, pool.map(lambda one: _hits(pairs[one], index, coverage), chunks), strict=True):
            found += [(hit.pair + chunk.start, *hit[1:]) for hit in hits]
            advance(chunk.stop - chunk.start)
    schema = {"pair": pl.Int64, "document": pl.Int64, "rule": pl.String, "matched": pl.String}
    hits = pl.DataFrame(found, schema, orient="row")
    return (
        hits.with_columns(
            pairs["pair_id"][hits["pair"]],
            *(documents[column][hits["document"]] for column in ("task", "item_id")),
        )
        .unique(["pair", "task", "item_id", "rule"], keep="first", maintain_order=True)
        .sort("pair", "document", maintain_order=True)
        .select(list(CONTAMINATION))
    )


class _Hit(NamedTuple):
    pair: int
    document: int
    rule: Rule
    matched: str


@dataclass(frozen=True)
class _Grams:
    """The distinct runs of some number of words that documents hold, found by their hash."""

    hashes: Numbers  # uint64, sorted
    first: Numbers  # of hash number h, the documents are documents[first[h]:first[h + 1]]
    documents: Numbers

    @staticmethod
    def of(hashes: Numbers, documents: Numbers, items: Numbers) -> "_Grams":
        """Index runs by hash, but for boilerplate, which names no item: 895 of MMLU's questions begin alike."""
        both = pl.DataFrame({"hash": hashes, "document": documents}).unique().sort("hash", "document")
        _, counts = np.unique(both["hash"].to_numpy(), return_counts=True)
        many = both.filter(np.repeat(counts > MOST_ITEMS, counts))  # of one item there may be many documents
        many = many.with_columns(item=items[many["document"].to_numpy()])
        boilerplate = many.group_by("hash").agg(pl.col("item").n_unique()).filter(pl.col("item") > MOST_ITEMS)
        both = both.filter(~pl.col("hash").is_in(boilerplate["hash"].implode()))
        unique, first = np.unique(both["hash"].to_numpy(), return_index=True)
        return _Grams(unique, np.append(first, both.height), both["document"].to_numpy())

    def find(self, hashes: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Look hashes up: for every match its place in `hashes`, the number of the gram, and a document."""
        grams = np.searchsorted(self.hashes, hashes)
        places = np.flatnonzero(np.append(self.hashes, np.uint64(0))[grams] == hashes)
        grams = grams[places]
        counts = self.first[grams + 1] - self.first[grams]
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return (
            np.repeat(places, counts),
            np.repeat(grams, counts),
            self.documents[np.repeat(self.first[grams], counts) + offsets],
        )


@dataclass(frozen=True)
class _Filter:
    """Which runs of 8 words stand in any document, by the first bits of their hash: fast, and wrong for some."""

    seen: Numbers  # bool
    shift: np.uint64

    @staticmethod
    def of(hashes: Numbers) -> "_Filter":
        bits = min(max((len(hashes) * 32).bit_length(), 8), 26)
        shift, seen = np.uint64(64 - bits), np.zeros(1 << bits, bool)
        seen[hashes >> shift] = True
        return _Filter(seen, shift)

    def places(self, hashes: Numbers) -> Numbers:
        return np.flatnonzero(self.seen[hashes >> self.shift])


@dataclass(frozen=True)
class _Index:
    words: Words
    first: Numbers  # (documents + 1,): the words of document d are first[d] to first[d + 1]
    distinct: Numbers  # (documents,): how many different 8-grams that count
    filter: _Filter
    grams: dict[int, _Grams]  # of 8 and 13 words
    short: dict[int, _Grams]  # whole documents, by their words


def _index(documents: pl.DataFrame) -> _Index:
    words = read_words(documents["text"])
    first = np.searchsorted(words.text, np.arange(documents.height + 1))
    lengths = np.diff(first)
    items = documents.select(pl.struct("task", "item_id").rank("dense")).to_series().to_numpy()
    grams = {}
    for size in (GRAM, LONG_GRAM):
        inside = words.text[: max(len(words.text) - size + 1, 0)] == words.text[size - 1 :]
        grams[size] = _Grams.of(hash_grams(words.codes, size)[inside], words.text[: len(inside)][inside], items)
    short = {}
    for size in range(FEWEST_WORDS, GRAM):
        rows = np.flatnonzero(lengths == size)
        short[size] = _Grams.of(hash_at(words.codes, first[rows], size), rows, items)
    distinct = np.bincount(grams[GRAM].documents, minlength=len(lengths))
    lost = {
        f"have under {FEWEST_WORDS} words": (lengths < FEWEST_WORDS).sum(),
        f"share all their words with over {MOST_ITEMS} others": ((lengths >= GRAM) & (distinct == 0)).sum()
        + sum((lengths == size).sum() - len(found.documents) for size, found in short.items()),
    }
    for why, count in lost.items():
        if count:
            log.warning("%d of %d documents %s: not matched", count, len(lengths), why)
    return _Index(words, first, distinct, _Filter.of(hash_grams(words.codes, GRAM)), grams, short)


def _hits(pairs: pl.DataFrame, index: _Index, coverage: float) -> list[_Hit]:
    """Match some pairs against all documents."""
    prompt, chosen, rejected = (plain_texts(pairs, side) for side in ("prompt", "chosen", "rejected"))
    words = read_words(pl.concat([pairs["system"].fill_null("") + "\n" + prompt, chosen, rejected]))
    hits = list(_short_hits(words, index, pairs.height))
    eights = hash_grams(words.codes, GRAM)
    maybe = index.filter.places(eights)  # a run of 13 words begins with one of 8
    for size in (GRAM, LONG_GRAM):
        places = maybe[maybe + size <= len(words.codes)]
        places = places[words.text[places] == words.text[places + size - 1]]
        at, grams, documents = index.grams[size].find(hash_at(words.codes, places, size))
        places = places[at]
        found = {"pair": words.text[places] % pairs.height, "document": documents, "gram": grams, "place": places}
        matches = pl.DataFrame(found).group_by("pair", "document").agg(pl.col("gram").n_unique(), pl.col("place"))
        for pair, document, distinct, at in matches.iter_rows():
            shown = words.show(*_longest_run(at, size))
            if size == LONG_GRAM:
                hits.append(_Hit(pair, document, "13-gram", shown))
                continue
            if distinct >= coverage * index.distinct[document]:
                hits.append(_Hit(pair, document, "8-gram", shown))
            if distinct == index.distinct[document] and (whole := _whole(words, index, document, at)):
                hits.append(_Hit(pair, document, "question", words.show(*whole)))
    return hits


def _short_hits(words: Words, index: _Index, prompts: int) -> Iterator[_Hit]:
    """Find documents of a few words that are a whole sentence or line of a prompt: of one of the first texts."""
    opening = np.flatnonzero(words.opens & (words.text < prompts))
    for size, grams in index.short.items():
        places = opening[opening + size <= len(words.codes)]
        last = places + size - 1
        places = places[words.closes[last] & (words.text[places] == words.text[last])]
        at, _, documents = grams.find(hash_at(words.codes, places, size))
        for place, document in zip(places[at].tolist(), documents.tolist(), strict=True):
            yield _Hit(int(words.text[place]), document, "question", words.show(place, place + size - 1))


def _longest_run(places: list[int], size: int) -> tuple[int, int]:
    """Give the first and last word of the longest stretch that runs of `size` words at `places` cover."""
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    longest = max(runs, key=len)
    return int(longest[0]), int(longest[-1]) + size - 1


def _whole(words: Words, index: _Index, document: int, places: list[int]) -> tuple[int, int] | None:
    """Find where the document stands word for word, given where runs of it begin."""
    wanted = index.words.codes[index.first[document] : index.first[document + 1]]
    own, met = hash_grams(wanted, GRAM), hash_at(words.codes, np.array(places), GRAM)
    for place, gram in zip(places, met, strict=True):
        for offset in np.flatnonzero(own == gram).tolist():
            first, last = place - offset, place - offset + len(wanted) - 1
            inside = first >= 0 and last < len(words.codes) and words.text[first] == words.text[last]
            if inside and np.array_equal(words.codes[first : last + 1], wanted):
                return first, last
    return None


def _bytes_of(pairs: pl.DataFrame) -> Numbers:
    sides = [pl.col(side).str.len_bytes() for side in ("prompt", "chosen", "rejected")]
    return pairs.select(pl.sum_horizontal(sides)).to_series().to_numpy()
