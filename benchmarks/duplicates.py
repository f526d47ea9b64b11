"""Near-duplicates: ours against plain Python sets of word runs with an inverted index, on the same pairs.

Pairs are real ones with their words in another order; every 100th is an earlier one with its last word changed. The
plain loop is exact: what ours misses is said. It runs on fewer pairs, and times per pair are compared.

    python benchmarks/duplicates.py --folder ../shared/data --pairs 100000 1000000 --loop 3000
"""

import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated

import polars as pl
import tyro
from decontaminate import REAL, SIDES, gibibytes, make_pairs, read_documents
from machine import describe_machine

import sdpo_data as data
from sdpo_data.console import print_table
from sdpo_data.duplicates import RUN, SIMILAR, find_near_duplicates

WORD = re.compile(r"[^\W_]+")


def main(
    folder: Annotated[Path, tyro.conf.arg(help="Holds benchmarks/ and prefs/.")],
    pairs: Annotated[list[int], tyro.conf.arg(help="How many pairs to measure.")],
    loop: Annotated[int, tyro.conf.arg(help="How many of them the plain loop gets.")] = 3000,
) -> None:
    real = data.read_pairs([folder / "prefs" / f"{name}.jsonl.gz" for name in REAL])
    frame = make_pairs(real, read_documents(folder / "benchmarks")["text"], max(pairs), shuffled=True)
    texts = frame.select(pl.concat_str(SIDES, separator="\n")).to_series()
    earlier = texts.gather(pl.Series(range(len(texts))) // 2).str.replace(r"\S+$", "another")
    texts = pl.select(pl.when(pl.int_range(len(texts)) % 100 == 99).then(earlier).otherwise(texts)).to_series()
    started = time.perf_counter()
    expected = find_plainly(texts[:loop].to_list())
    slow = (time.perf_counter() - started) / loop
    rows: list[dict] = [{"way": "plain Python sets", "pairs": loop, "seconds": slow * loop}]
    for count in [loop, *pairs]:
        started = time.perf_counter()
        found = find_near_duplicates(texts[:count], frame["prompt_id"][:count])
        rows.append({"way": "sdpo_data", "pairs": count, "seconds": time.perf_counter() - started})
        print(f"{count:,} pairs: {found.sum():,} near-duplicates; memory so far {gibibytes():.1f} GiB")
        if count == loop:
            missed, false = (expected & ~found).sum(), (found & ~expected).sum()
            print(f"of the plain loop's {expected.sum():,} ours missed {missed} and added {false}")
    for row in rows:
        row |= {"us/pair": row["seconds"] / row["pairs"] * 1e6, "times faster": slow / (row["seconds"] / row["pairs"])}
    print_table(pl.DataFrame(rows), "near-duplicates among pairs")
    print(describe_machine("polars"))


def find_plainly(texts: list[str]) -> pl.Series:
    """Compare each text with every earlier one that it shares a run of words with."""
    holders, runs = defaultdict(list), []
    found = [False] * len(texts)
    for row, text in enumerate(texts):
        words = WORD.findall(text.lower())
        own = {tuple(words[at : at + RUN]) for at in range(len(words) - RUN + 1)}
        shared = Counter(other for run in own for other in holders[run])
        for other, count in shared.items():
            if count >= SIMILAR * (len(own) + len(runs[other]) - count):
                found[row] = found[other] = True
        for run in own:
            holders[run].append(row)
        runs.append(own)
    return pl.Series(found).to_numpy()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
