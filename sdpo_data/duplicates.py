"""Texts that are nearly the same: sketched by MinHash, then those that may be alike compared run by run."""

import numpy as np
import polars as pl

from sdpo_data.ngrams import Numbers, cut_chunks, hash_grams, read_words

SIMILAR = 0.8  # shared of all distinct runs of words: the Jaccard index
RUN = 5  # words; a text of fewer is like no other
BANDS, ROWS = 24, 5  # texts at SIMILAR share a band with probability 1 - (1 - 0.8 ** 5) ** 24 > 0.9999


def find_near_duplicates(texts: pl.Series, groups: pl.Series) -> Numbers:
    """Say of each text whether another one, of another group, is nearly the same.

    Args:
        texts: String, without nulls.
        groups: texts of one group are not compared.

    Returns:
        (texts,), bool: the Jaccard index over runs of RUN words is at least SIMILAR. A text is compared
        with the first of those that share a band of its sketch, so a cluster is found in linear time.
    """
    from rensa import RMinHash, RMinHashLSH  # type: ignore[missing-module-attribute]

    hashes, offsets = _runs(texts)
    sketches = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, BANDS * ROWS, 0)
    flags = np.array(RMinHashLSH(SIMILAR, BANDS * ROWS, BANDS).query_duplicate_flags_matrix_one_shot(sketches), bool)
    del sketches
    rows = np.flatnonzero(flags & (np.diff(offsets) > 0))
    runs = {row: np.unique(hashes[offsets[row] : offsets[row + 1]]) for row in rows.tolist()}
    found = np.zeros(len(texts), bool)
    for one, other in _candidates(rows, runs):
        if groups[one] != groups[other] and not found[[one, other]].all():
            shared = len(np.intersect1d(runs[one], runs[other], assume_unique=True))
            if shared >= SIMILAR * (len(runs[one]) + len(runs[other]) - shared):
                found[[one, other]] = True
    return found


def _runs(texts: pl.Series) -> tuple[Numbers, Numbers]:
    """Hash the runs of each text: uint64, and where those of each text begin (texts + 1)."""
    hashes, counts = [np.empty(0, np.uint64)], [np.zeros(1, np.int64)]
    for chunk in cut_chunks(texts.str.len_bytes().to_numpy()):
        words = read_words(texts[chunk])
        inside = words.text[: max(len(words.text) - RUN + 1, 0)] == words.text[RUN - 1 :]
        hashes.append(hash_grams(words.codes, RUN)[inside])
        counts.append(np.bincount(words.text[: len(inside)][inside], minlength=chunk.stop - chunk.start))
    return np.concatenate(hashes), np.cumsum(np.concatenate(counts)).astype(np.uint64)


def _candidates(rows: Numbers, runs: dict[int, Numbers]) -> list[tuple[int, int]]:
    """Find pairs of rows that share a band of their sketches."""
    from rensa import RMinHash  # type: ignore[missing-module-attribute]

    if not len(rows):
        return []
    offsets = np.cumsum([0, *(len(runs[row]) for row in rows.tolist())]).astype(np.uint64)
    flat = np.concatenate([runs[row] for row in rows.tolist()])
    sketches = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, BANDS * ROWS, 0).to_rows()
    bands = np.array(sketches, np.uint64).reshape(len(rows), BANDS, ROWS)
    frame = pl.DataFrame({"row": np.repeat(rows, BANDS), "band": np.tile(np.arange(BANDS), len(rows))}).with_columns(
        pl.DataFrame(bands.reshape(-1, ROWS), [f"value_{place}" for place in range(ROWS)])
    )
    same = ["band", *(f"value_{place}" for place in range(ROWS))]
    both = frame.select(one=pl.col("row").first().over(same), other="row")
    return both.filter(pl.col("one") != pl.col("other")).unique().sort("one", "other").rows()
