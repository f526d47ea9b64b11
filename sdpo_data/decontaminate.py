"""Find the pairs that hold what the model will be evaluated on, and the items they touch.

RUN/pairs.parquet is matched against RUN/documents.parquet (python -m sdpo_eval RUN --documents makes it), or
against a text file. Three rules, on words alone: `question`, the document stands whole in the pair; `8-gram`,
half of its runs of 8 words do; `13-gram`, one run of 13 words does. A document of fewer than 8 words counts as
`question` only where it is a whole sentence or line of the prompt; below 3 words it cannot be told from chance.

Examples:
    python -m sdpo_data.decontaminate runs/a                              # writes contamination.parquet
    python -m sdpo_data.decontaminate runs/a --action drop                # and takes the pairs out
    python -m sdpo_data.decontaminate runs/a --documents my_test_set.txt --action keep    # only shows
"""

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
import pydantic

from sdpo_data.config import Settings, read_command
from sdpo_data.console import command, print_table, progress, say
from sdpo_data.messages import plain_texts
from sdpo_data.ngrams import Numbers, Words, cut_chunks, hash_at, hash_grams, read_words
from sdpo_data.run import Run, sha256
from sdpo_data.tables import CONTAMINATION, DOCUMENTS, DROPPED, PAIRS, SdpoError, check

log = logging.getLogger(__name__)

Rule = Literal["question", "8-gram", "13-gram"]
GRAM, LONG_GRAM = 8, 13  # words
FEWEST_WORDS = 3
STAGE = "decontaminate"


class DecontaminateConfig(Settings):
    documents: str | None = None
    """What to match against in place of RUN/documents.parquet: a .parquet of the same columns, or a text
    file with a document on each line."""
    action: Literal["keep", "flag", "drop"] = "flag"
    """keep: show what is found and write nothing; flag: write contamination.parquet; drop: also take
    the pairs out of pairs.parquet. A later --force with another action brings them back."""
    rules: list[Rule] = pydantic.Field(["question", "8-gram"], min_length=1)
    """What counts as contaminated. contamination.parquet holds what every rule found."""
    coverage: float = pydantic.Field(0.5, gt=0, le=1)
    """Share of a document's distinct runs of 8 words that must stand in the pair, for the rule 8-gram."""


@dataclass(frozen=True)
class Decontaminated:
    """Pairs that were kept, what was found, and pairs that were dropped for it."""

    pairs: pl.DataFrame
    contamination: pl.DataFrame
    dropped: pl.DataFrame


def decontaminate_pairs(
    pairs: pl.DataFrame, documents: pl.DataFrame, config: DecontaminateConfig | None = None
) -> Decontaminated:
    """Match pairs against evaluation documents; with action "drop", take the contaminated ones out.

    Args:
        pairs: PAIRS frame.
        documents: DOCUMENTS frame.
    """
    config = config or DecontaminateConfig()
    pairs = check(pairs, PAIRS, "pairs")
    contamination = find_contamination(pairs, documents, config.coverage)
    if config.action != "drop":
        return Decontaminated(pairs, contamination, DROPPED.to_frame())
    reasons = (
        contamination.filter(pl.col("rule").is_in(config.rules))
        .group_by("pair_id")
        .agg(reason="holds " + pl.col("task").unique().sort().str.join(", "))
    )
    marked = pairs.join(reasons, on="pair_id", how="left", maintain_order="left")
    dropped = marked.filter(pl.col("reason").is_not_null()).select(
        stage=pl.lit(STAGE), source="source", row=pl.lit(None, pl.Int64), pair_id="pair_id", reason="reason",
        content=pl.struct(list(PAIRS)).struct.json_encode(),
    )  # fmt: skip
    kept = marked.filter(pl.col("reason").is_null()).select(list(PAIRS))
    return Decontaminated(kept, contamination, dropped.select(list(DROPPED)))


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


def touched_items(contamination: pl.DataFrame, pairs: pl.DataFrame, rules: list[Rule] | None = None) -> pl.DataFrame:
    """Turn the table round: the evaluation items that stand in `pairs`, for results on clean items alone.

    Args:
        contamination: CONTAMINATION frame; pairs that are no longer in `pairs` do not count.
        pairs: PAIRS frame.
        rules: what counts; as in DecontaminateConfig if not given.
    """
    return (
        contamination.filter(pl.col("rule").is_in(rules or DecontaminateConfig().rules))
        .join(pairs.select("pair_id", "source"), on="pair_id")
        .group_by("task", "item_id", maintain_order=True)
        .agg(
            pairs=pl.col("pair_id").n_unique(),
            sources=pl.col("source").unique().sort().str.join(", "),
            pair_id=pl.first("pair_id"),
            matched=pl.first("matched"),
        )
    )


def count_contamination(contamination: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """Count, for each source and task, the pairs each rule finds and the items they touch."""
    by_rule = {"question": "question", "8-gram": "gram_8", "13-gram": "gram_13"}
    counts = {name: pl.col("pair_id").filter(pl.col("rule") == rule).n_unique() for rule, name in by_rule.items()}
    total = pairs.group_by("source").agg(pairs=pl.len())
    return (
        contamination.join(pairs.select("pair_id", "source"), on="pair_id")
        .group_by("source", "task")
        .agg(**counts, items=pl.col("item_id").n_unique())
        .join(total, on="source")
        .sort("source", "task")
    )


def main() -> None:
    """Match RUN/pairs.parquet against what is evaluated."""
    call = read_command(
        "python -m sdpo_data.decontaminate", __doc__, "decontaminate", {"decontaminate": DecontaminateConfig}
    )
    config, run = call.settings["decontaminate"], call.run
    assert isinstance(config, DecontaminateConfig)
    documents, path = read_documents(run, config)
    if config.action == "keep":
        show(decontaminate_pairs(run.pairs, documents, config), run.pairs, config)
        call.save()
        return
    recipe = config.model_dump() | {"documents": sha256(path)}
    with run.stage("contamination", recipe, ["pairs"], force=call.force) as stage:
        if stage.current:
            call.save()
            say(f"up to date: {run.path / 'contamination.parquet'}")
            return
        pairs = pl.concat([run.pairs, _dropped_before(run)]).unique("pair_id", keep="first", maintain_order=True)
        result = decontaminate_pairs(pairs, documents, config)
        if result.pairs.is_empty():
            raise SdpoError(f"All {pairs.height} pairs are contaminated: decontaminate.action drop would leave none.")
        run.replace_dropped(STAGE, result.dropped)  # first: killed in between, no pair is in neither table
        if not result.pairs.equals(run.pairs):
            stage.write("pairs", result.pairs)
        stage.write("contamination", result.contamination)
    call.save()
    show(result, pairs, config)


def read_documents(run: Run, config: DecontaminateConfig) -> tuple[pl.DataFrame, Path]:
    """Read the DOCUMENTS to match against, and say which file they are in.

    Raises:
        SdpoError: it is not there, cannot be read, or is empty.
    """
    path = Path(config.documents) if config.documents else run.path / "documents.parquet"
    if not path.is_file():
        remedy = f"Make it with: python -m sdpo_eval {run.path} --documents; or name a text file with --documents."
        raise SdpoError(f"{path} does not exist. {remedy}")
    try:
        if path.suffix == ".parquet":
            documents = check(pl.read_parquet(path), DOCUMENTS, str(path))
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = [("text", path.stem, str(number), line) for number, line in enumerate(lines, 1) if line.strip()]
            documents = pl.DataFrame(rows, DOCUMENTS, orient="row")
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise SdpoError(f"{path} can be read neither as Parquet nor as UTF-8 text ({error}).") from None
    if documents.is_empty():
        raise SdpoError(f"{path} holds no document.")
    return documents, path


def show(result: Decontaminated, pairs: pl.DataFrame, config: DecontaminateConfig) -> None:
    """Print what was found: by source and task, and one match of each."""
    found = result.contamination
    if found.is_empty():
        say(f"no document stands in any of {pairs.height:,} pairs.")
        return
    print_table(count_contamination(found, pairs), "pairs found by each rule, by source and task")
    counted = found.filter(pl.col("rule").is_in(config.rules)).join(pairs.select("pair_id", "source"), on="pair_id")
    examples = counted.group_by("source", "task", maintain_order=True).first()
    if examples.height:
        print_table(examples.with_columns(pl.col("matched").str.head(200)), "one match of each")
    items = touched_items(found, pairs, config.rules).group_by("task").agg(items=pl.len()).sort("task")
    touched = ", ".join(f"{items:,} of {task}" for task, items in items.rows()) or "none"
    say(f"contaminated by {' or '.join(config.rules)}: {counted['pair_id'].n_unique():,} of {pairs.height:,} pairs; "
        f"items touched: {touched}; dropped: {result.dropped.height:,}.")  # fmt: skip


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
    seen: Numbers  # bool by the hash's first bits: what is not seen is in no document
    shift: np.uint64

    @staticmethod
    def of(hashes: Numbers, documents: Numbers) -> "_Grams":
        both = pl.DataFrame({"hash": hashes, "document": documents}).unique().sort("hash", "document")
        unique, first = np.unique(both["hash"].to_numpy(), return_index=True)
        bits = min(max((len(unique) * 32).bit_length(), 8), 26)
        shift, seen = np.uint64(64 - bits), np.zeros(1 << bits, bool)
        seen[unique >> shift] = True
        return _Grams(unique, np.append(first, both.height), both["document"].to_numpy(), seen, shift)

    def find(self, hashes: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Look hashes up: for every match its place in `hashes`, the number of the gram, and a document."""
        places = np.flatnonzero(self.seen[hashes >> self.shift])
        grams = np.searchsorted(self.hashes, hashes[places])
        equal = np.append(self.hashes, np.uint64(0))[grams] == hashes[places]
        places, grams = places[equal], grams[equal]
        counts = self.first[grams + 1] - self.first[grams]
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return (
            np.repeat(places, counts),
            np.repeat(grams, counts),
            self.documents[np.repeat(self.first[grams], counts) + offsets],
        )


@dataclass(frozen=True)
class _Index:
    words: Words
    first: Numbers  # (documents + 1,): the words of document d are first[d] to first[d + 1]
    distinct: Numbers  # (documents,): how many different 8-grams
    grams: dict[int, _Grams]  # of 8 and 13 words
    short: dict[int, _Grams]  # whole documents, by their words


def _index(documents: pl.DataFrame) -> _Index:
    words = read_words(documents["text"])
    first = np.searchsorted(words.text, np.arange(documents.height + 1))
    lengths = np.diff(first)
    if too_short := int((lengths < FEWEST_WORDS).sum()):
        log.warning("%d of %d documents have under %d words: not matched", too_short, len(lengths), FEWEST_WORDS)
    grams = {}
    for size in (GRAM, LONG_GRAM):
        inside = words.text[: max(len(words.text) - size + 1, 0)] == words.text[size - 1 :]
        grams[size] = _Grams.of(hash_grams(words.codes, size)[inside], words.text[: len(inside)][inside])
    short = {}
    for size in range(FEWEST_WORDS, GRAM):
        rows = np.flatnonzero(lengths == size)
        short[size] = _Grams.of(hash_at(words.codes, first[rows], size), rows)
    return _Index(words, first, np.bincount(grams[GRAM].documents, minlength=len(lengths)), grams, short)


def _hits(pairs: pl.DataFrame, index: _Index, coverage: float) -> list[_Hit]:
    """Match some pairs against all documents."""
    prompt, chosen, rejected = (plain_texts(pairs, side) for side in ("prompt", "chosen", "rejected"))
    words = read_words(pl.concat([pairs["system"].fill_null("") + "\n" + prompt, chosen, rejected]))
    hits = list(_short_hits(words, index, pairs.height))
    known: dict[int, Numbers] = {}
    for size in (GRAM, LONG_GRAM):
        places, grams, documents = index.grams[size].find(hash_grams(words.codes, size, known))
        inside = words.text[places] == words.text[places + size - 1]
        places, grams, documents = places[inside], grams[inside], documents[inside]
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
    for place in places:
        last = place + len(wanted) - 1
        if np.array_equal(words.codes[place : last + 1], wanted) and words.text[place] == words.text[last]:
            return place, last
    return None


def _bytes_of(pairs: pl.DataFrame) -> Numbers:
    sides = [pl.col(side).str.len_bytes() for side in ("prompt", "chosen", "rejected")]
    return pairs.select(pl.sum_horizontal(sides)).to_series().to_numpy()


def _dropped_before(run: Run) -> pl.DataFrame:
    """Read back the pairs an earlier call took out."""
    rows = run.dropped.filter(pl.col("stage") == STAGE)["content"]
    return pl.DataFrame([json.loads(row) for row in rows], PAIRS)


if __name__ == "__main__":
    command(main)
