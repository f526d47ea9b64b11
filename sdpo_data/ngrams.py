"""Texts as numbered words, and the hashes of every few words in a row: what matching texts is made of.

A word is a run of letters and digits, whatever its case; a Chinese or Japanese character is a word.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

Numbers = np.ndarray  # of the dtype said beside it

CHUNK = 4 * 2**20  # bytes read at once: the arrays of one chunk stay near the processor
LOWERED = bytes(byte if byte >= 128 else ord(chr(byte).lower()) * chr(byte).isalnum() for byte in range(256))
ENDS_A_SENTENCE = bytes(chr(byte) in "\n.?!:;" for byte in range(256))
IDEOGRAM = r"[\p{Han}\p{Hiragana}\p{Katakana}]"
# Accents apart, ligatures, full width, capitals and Chinese: rare, and costly to unify.
NEEDS_WORK = r"[\p{M}\x{FB00}-\x{FB06}\x{FF01}-\x{FF5E}\p{Han}\p{Hiragana}\p{Katakana}[\p{Lu}&&[^A-Z]]]"
MASKS = np.array([2 ** (8 * length) - 1 for length in range(9)], dtype=np.uint64)  # of the first bytes of a word
MIXERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], dtype=np.uint64)
BASE = 0x9FB21C651E98DF25  # odd: of the polynomial that hashes words in a row, modulo 2 ** 64


@dataclass(frozen=True)
class Words:
    """All words of some texts, one after the other; every array has one entry a word."""

    codes: Numbers
    """uint64, equal for equal words. Words over 24 bytes are known by their first 16, last 8 and length."""
    text: Numbers
    """int64, the row of the text the word is in."""
    start: Numbers
    """int64, first byte of the word in `content`."""
    end: Numbers
    opens: Numbers
    """bool, whether the word is the first of a sentence or line."""
    closes: Numbers
    content: bytes

    def show(self, first: int, last: int) -> str:
        """Give the words from `first` to `last` as they stand in the text."""
        return self.content[self.start[first] : self.end[last]].decode(errors="replace")


def read_words(texts: pl.Series) -> Words:
    """Split texts into words.

    Args:
        texts: String, without nulls; no row may contain what its neighbour should match.
    """
    texts = _plain(texts)
    content: bytes = texts.str.join("\n").cast(pl.Binary).item() + b"\n"
    lowered = np.frombuffer(content.translate(LOWERED) + bytes(8), np.uint8)
    in_word = lowered > 0
    edges = np.flatnonzero(in_word[1:] != in_word[:-1]) + 1
    edges = np.concatenate([[0], edges]) if in_word[0] else edges
    start, end = edges[::2], edges[1::2]
    lengths = texts.str.len_bytes().to_numpy().astype(np.int64) + 1
    of_text = np.diff(np.searchsorted(start, np.concatenate([[0], np.cumsum(lengths)])))
    enders = np.flatnonzero(np.frombuffer(content.translate(ENDS_A_SENTENCE), np.bool_))
    opening = np.searchsorted(start, enders)  # the word after each
    opens, closes = np.zeros(len(start) + 1, bool), np.zeros(len(start) + 1, bool)
    opens[opening], closes[opening - 1] = True, True
    opens[0] = True
    return Words(
        _codes(lowered, start, end),
        np.repeat(np.arange(len(of_text)), of_text),
        start,
        end,
        opens[:-1],
        closes[:-1],
        content,
    )


def hash_grams(codes: Numbers, size: int, known: dict[int, Numbers] | None = None) -> Numbers:
    """Hash every `size` words in a row.

    Args:
        codes: (words,), uint64.
        size: words in a row, at least 1.
        known: results for the same codes by size, used and added to.

    Returns:
        (words - size + 1,), uint64: the polynomial of the codes at BASE. Two different runs of
        words share one with probability 2 ** -64 or so.
    """
    known = {} if known is None else known
    if size == 1:
        return codes
    if size not in known:
        left = 1 << (size - 1).bit_length() - 1  # the largest power of two below
        right, count = size - left, max(len(codes) - size + 1, 0)
        first = hash_grams(codes, left, known)[:count] * np.uint64(pow(BASE, right, 2**64))
        known[size] = first + hash_grams(codes, right, known)[left : left + count]
    return known[size]


def hash_at(codes: Numbers, places: Numbers, size: int) -> Numbers:
    """Hash the `size` words that begin at each of `places`, as hash_grams does."""
    total = np.zeros(len(places), np.uint64)
    for offset in range(size):
        total = total * np.uint64(BASE) + codes[places + offset]
    return total


def cut_chunks(bytes_of_rows: Numbers) -> Iterator[slice]:
    """Cut rows into slices of about CHUNK bytes, each of at least one row."""
    ends = np.cumsum(bytes_of_rows)
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + CHUNK, side="right")))
        yield slice(first, last)
        first = last


def _plain(texts: pl.Series) -> pl.Series:
    """Unify what is not ASCII, and make blanks of its punctuation; ASCII is treated byte by byte later."""
    texts = texts.rename("text").rechunk()
    return _replaced(texts, texts.str.len_bytes() != texts.str.len_chars(), _plain_unicode)


def _plain_unicode(texts: pl.Series) -> pl.Series:
    texts = _replaced(
        texts,
        texts.str.contains(NEEDS_WORK),
        lambda some: (
            some.str.normalize("NFKC")
            .str.to_lowercase()
            .str.replace_all(r"[。！？]", ".")
            .str.replace_all(f"({IDEOGRAM})", " $1 ")
        ),
    )
    return texts.str.replace_all(r"[^\p{L}\p{N}\p{M}\x00-\x7F]+", " ")


def _replaced(texts: pl.Series, where: pl.Series, change: Callable[[pl.Series], pl.Series]) -> pl.Series:
    """Change some of the texts."""
    if not where.any():
        return texts
    numbered = texts.to_frame().with_row_index("row")
    changed = numbered.filter(where).with_columns(change(texts.filter(where)))
    return pl.concat([numbered.filter(~where), changed]).sort("row")["text"].rechunk()


def _codes(lowered: Numbers, start: Numbers, end: Numbers) -> Numbers:
    """Hash every word: exactly its bytes up to 24, the first 16, last 8 and the length beyond."""
    eight = np.ndarray(len(lowered) - 7, np.uint64, lowered, strides=(1,))  # the 8 bytes from every place on
    length = end - start
    codes = (eight[start] & MASKS[np.minimum(length, 8)]) * MIXERS[0]
    for begin, mixer in ((8, MIXERS[1]), (16, MIXERS[2])):
        longer = np.flatnonzero(length > begin)
        rest = np.minimum(length[longer] - begin, 8)
        place = start[longer] + begin if begin == 8 else end[longer] - rest
        codes[longer] ^= (eight[place] & MASKS[rest]) * mixer
    codes ^= codes >> np.uint64(29)
    codes += length.astype(np.uint64) * MIXERS[3]
    codes ^= codes >> np.uint64(32)
    return codes * MIXERS[0]
