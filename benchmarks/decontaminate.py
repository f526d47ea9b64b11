"""Decontamination: ours against a plain Python n-gram loop, synthetic pairs against the four benchmarks.

A pair is a real one with its texts cut in two and put together the other way round, so lengths and words are
real; every 200th prompt ends with a benchmark's question. Both ways must find the same. The loop runs on fewer
pairs, and times per pair are compared.

    python benchmarks/decontaminate.py --folder ../shared/data --pairs 10000 100000 --loop 2000
"""

import gzip
import json
import re
import resource
import time
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import tyro
from machine import describe_machine

import sdpo_data as data
from sdpo_data.console import print_table
from sdpo_data.matching import MOST_ITEMS, find_contamination
from sdpo_data.messages import plain_texts
from sdpo_data.tables import DOCUMENTS, PAIRS, TEXT

BENCHMARKS = {
    "truthfulqa_mc": "question",
    "ARC-Challenge-test": "question",
    "mmlu_test": "question",
    "hellaswag_val": "ctx",
}
REAL = ("ultrafeedback_sample/train", "orca_dpo_sample/validation", "hh_rlhf_test/helpful")
SIDES = ("prompt", "chosen", "rejected")
WORD_OR_END = re.compile(r"[^\W_]+|[\n.?!:;]")


def main(
    folder: Annotated[Path, tyro.conf.arg(help="Holds benchmarks/ and prefs/.")],
    pairs: Annotated[list[int], tyro.conf.arg(help="How many pairs to measure.")],
    loop: Annotated[int, tyro.conf.arg(help="How many of them the plain loop gets.")] = 2000,
) -> None:
    documents = read_documents(folder / "benchmarks")
    real = data.read_pairs([folder / "prefs" / f"{name}.jsonl.gz" for name in REAL])
    frame = make_pairs(real, documents["text"], max(pairs))
    print(f"{frame.height:,} pairs made, {frame.estimated_size('gb'):.1f} GiB; process {gibibytes():.1f} GiB")
    index = index_plainly(documents)
    started = time.perf_counter()
    expected = loop_plainly(frame[:loop], index, documents)
    slow = (time.perf_counter() - started) / loop
    rows: list[dict] = [{"way": "plain Python loop, its index ready", "pairs": loop, "seconds": slow * loop}]
    for count in [loop, *pairs]:
        started = time.perf_counter()
        found = find_contamination(frame[:count], documents)
        seconds = time.perf_counter() - started
        rows.append({"way": "sdpo_data, index and all", "pairs": count, "seconds": seconds})
        if count == loop:
            assert set(found.drop("matched").rows()) == expected
    for row in rows:
        row |= {"us/pair": row["seconds"] / row["pairs"] * 1e6, "times faster": slow / (row["seconds"] / row["pairs"])}
    size = frame.select(pl.sum_horizontal(pl.col(SIDES).str.len_bytes()).mean()).item()
    print_table(pl.DataFrame(rows), f"pairs of {size:,.0f} bytes against {documents.height:,} documents")
    print(f"both found the same {len(expected):,} rows in {loop:,} pairs; peak memory, pairs included: "
          f"{gibibytes():.1f} GiB")  # fmt: skip
    print(describe_machine("polars"))


def read_documents(folder: Path) -> pl.DataFrame:
    rows = []
    for name, column in BENCHMARKS.items():
        lines = gzip.decompress((folder / f"{name}.jsonl.gz").read_bytes()).splitlines()
        rows += [("h4", name, str(number), json.loads(line)[column]) for number, line in enumerate(lines)]
    return pl.DataFrame(rows, DOCUMENTS, orient="row")


def make_pairs(real: pl.DataFrame, questions: pl.Series, count: int, *, shuffled: bool = False) -> pl.DataFrame:
    """Cut each text in two and turn it round; shuffled, put its words into another order."""
    rng, frames = np.random.default_rng(0), []
    texts = [[text.split(" ") for text in plain_texts(real, side)] for side in SIDES]
    for first in range(0, count, 20_000):
        numbers = range(first, min(first + 20_000, count))
        columns: dict[str, list[str]] = {side: [] for side in SIDES}
        for number in numbers:
            for side, words in zip(SIDES, texts, strict=True):
                text = words[number % real.height]
                cut = int(rng.integers(len(text) + 1))
                turned = [text[at] for at in rng.permutation(len(text))] if shuffled else [*text[cut:], *text[:cut]]
                columns[side].append(" ".join(turned))
            if number % 200 == 0:
                columns["prompt"][-1] += "\n" + questions[int(rng.integers(len(questions)))]
        ids = [str(number) for number in numbers]
        given = columns | {"pair_id": ids, "prompt_id": ids, "source": ["s"] * len(ids), "format": [TEXT] * len(ids)}
        frames.append(pl.DataFrame(given | dict.fromkeys(PAIRS.keys() - given.keys()), PAIRS))
    return pl.concat(frames)


def split_plainly(text: str) -> tuple[list[str], set[int], set[int]]:
    """Give the words of a text, and which of them open and close a sentence."""
    text = text if text.isascii() else unicodedata.normalize("NFKC", text).lower()
    words: list[str] = []
    opens, closes = {0}, set()
    for word in WORD_OR_END.findall(text.lower()):
        if word in "\n.?!:;":
            opens.add(len(words))
            closes.add(len(words) - 1)
        else:
            words.append(word)
    return words, opens, closes | {len(words) - 1}


def index_plainly(documents: pl.DataFrame) -> tuple[list[list[str]], dict, dict, dict]:
    words = [split_plainly(text)[0] for text in documents["text"]]
    eights, thirteens, short = defaultdict(set), defaultdict(set), defaultdict(set)
    for number, document in enumerate(words):
        for grams, size in ((eights, 8), (thirteens, 13)):
            for at in range(len(document) - size + 1):
                grams[tuple(document[at : at + size])].add(number)
        if 3 <= len(document) < 8:
            short[tuple(document)].add(number)
    few = [{gram: held for gram, held in one.items() if len(held) <= MOST_ITEMS} for one in (eights, thirteens, short)]
    return words, *few


def loop_plainly(pairs: pl.DataFrame, index: tuple, documents: pl.DataFrame) -> set[tuple]:
    """Find what the three rules find, one n-gram after the other."""
    wanted, eights, thirteens, short = index
    items, found = documents.select("task", "item_id").rows(), set()
    distinct = Counter(number for held in eights.values() for number in held)
    for pair_id, *texts in pairs.select("pair_id", *SIDES).iter_rows():
        held, whole = defaultdict(set), set()
        for side, text in enumerate(texts):
            words, opens, closes = split_plainly(text)
            for at in range(len(words) - 7):
                gram = tuple(words[at : at + 8])
                for number in eights.get(gram, ()):
                    held[number].add(gram)
                    whole.add((side, number))
                for number in thirteens.get(tuple(words[at : at + 13]), ()):
                    found.add((pair_id, *items[number], "13-gram"))
            for at in opens if side == 0 else ():
                for size in range(3, 8):
                    if at + size - 1 in closes:
                        for number in short.get(tuple(words[at : at + size]), ()):
                            found.add((pair_id, *items[number], "question"))
            for number in {number for where, number in whole if where == side}:
                size = len(wanted[number])
                if any(words[at : at + size] == wanted[number] for at in range(len(words) - size + 1)):
                    found.add((pair_id, *items[number], "question"))
        found |= {
            (pair_id, *items[number], "8-gram")
            for number, grams in held.items()
            if len(grams) >= 0.5 * distinct[number]
        }
    return found


def gibibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
