"""Find the pairs that hold what the model will be evaluated on, and the items they touch.

RUN/pairs.parquet is matched against RUN/documents.parquet (python -m sdpo_eval RUN --documents makes it), or
against a text file. Three rules, on words alone: `question`, the document stands whole in the pair; `8-gram`,
half of its runs of 8 words do; `13-gram`, one run of 13 words does. A document of fewer than 8 words counts as
`question` only where it is a whole sentence or line of the prompt; below 3 words it cannot be told from chance.
Runs of words that more than 10 items share, as the preamble of some, count for none of the rules.

Examples:
    python -m sdpo_data.decontaminate runs/a                              # writes contamination.parquet
    python -m sdpo_data.decontaminate runs/a --action drop                # and takes the pairs out
    python -m sdpo_data.decontaminate runs/a --documents my_test_set.txt --action keep    # only shows
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl
import pydantic

from sdpo_data.config import Settings, read_command
from sdpo_data.console import command, print_table, say
from sdpo_data.matching import Rule, find_contamination
from sdpo_data.run import Run, sha256
from sdpo_data.tables import DOCUMENTS, DROPPED, PAIRS, SdpoError, check

STAGE = "decontaminate"
ITEMS_SHOWN = 10


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
    items = touched_items(found, pairs, config.rules).sort("pairs", descending=True, maintain_order=True)
    if items.height:
        shown = items.select("task", "item_id", "pairs", "sources", pl.col("matched").str.head(100)).head(ITEMS_SHOWN)
        print_table(shown, f"the {shown.height} of {items.height:,} touched items that most pairs hold")
    by_task = items.group_by("task").len().sort("task").rows()
    touched = ", ".join(f"{n:,} of {task}" for task, n in by_task) or "none"
    say(f"contaminated by {' or '.join(config.rules)}: {counted['pair_id'].n_unique():,} of {pairs.height:,} pairs; "
        f"items touched: {touched}; dropped: {result.dropped.height:,}.")  # fmt: skip


def _dropped_before(run: Run) -> pl.DataFrame:
    """Read back the pairs an earlier call took out."""
    rows = run.dropped.filter(pl.col("stage") == STAGE)["content"]
    return pl.DataFrame([json.loads(row) for row in rows], PAIRS)


if __name__ == "__main__":
    command(main)
