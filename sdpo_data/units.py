"""What stays whole when pairs are cut, and what is known of each: pairs with their measures, units in their rank.

A unit is a pair, a prompt with all its pairs, a source, or what a column of PAIRS or SCORES says.
"""

from typing import TYPE_CHECKING

import polars as pl

from sdpo_data.difficulty import Difficulty, difficulty_named
from sdpo_data.orders import sort_by_difficulty
from sdpo_data.tables import LOGP_MARGIN, MARGIN_PER_TOKEN, SCORES, TOKEN_DIFFERENCE, SdpoError

if TYPE_CHECKING:
    from sdpo_data.partition import PartitionConfig

UNITS = {"pair": "pair_id", "prompt": "prompt_id"}
TOKENS = 2 * pl.col("prompt_tokens") + pl.col("chosen_tokens") + pl.col("rejected_tokens")


def difficulties_of(config: "PartitionConfig") -> list[Difficulty]:
    """Give the difficulty that ranks, then those that only kmeans looks at."""
    found = [difficulty_named(name) for name in (config.difficulty, *config.cluster_on)]
    for difficulty in found:
        if config.by == "pair" and not difficulty.single_pairs:
            raise SdpoError(
                f"partition.difficulty {difficulty.name!r} is a share over many pairs and cannot rank single ones. "
                "Set partition.by to 'source', or partition.difficulty to 'margin_per_token'."
            )
    return found


def unit_column(config: "PartitionConfig", pairs: pl.DataFrame | None) -> str:
    """Name the column whose values are the units; of SCORES, or else of PAIRS."""
    column = UNITS.get(config.by, config.by)
    if column not in SCORES and (pairs is None or column not in pairs.columns):
        has = [*UNITS, *dict.fromkeys([*SCORES, *(pairs.columns if pairs is not None else [])])]
        also = "" if pairs is not None else "; of a column of PAIRS give the pairs too"
        raise SdpoError(f"partition.by {config.by!r} is no unit. There are: {', '.join(has)}{also}.")
    return column


def measure_pairs(scores: pl.DataFrame, config: "PartitionConfig", pairs: pl.DataFrame | None) -> pl.DataFrame:
    """Give every pair its unit and its measures."""
    good = LOGP_MARGIN.is_finite() & (pl.min_horizontal("chosen_tokens", "rejected_tokens") > 0)
    if not scores.select(good.all()).item():
        bad = scores.filter(~good)["pair_id"]
        raise SdpoError(
            f"{bad.len()} of {scores.height} pairs have a non-finite log-probability or an answer of 0 tokens, e.g. "
            f"pair_id {bad[0]!r}. Score again in float32, or drop them."
        )
    difficulties, column = difficulties_of(config), unit_column(config, pairs)
    measures: dict[str, pl.Expr] = {}
    if config.cut == "tokens":
        measures["tokens"] = TOKENS
    if config.order == "token_difference":
        measures["length"] = TOKEN_DIFFERENCE
    if config.drop_suspect is not None:
        measures["per_token"] = MARGIN_PER_TOKEN
    keep = ["pair_id", "source", *(["prompt_id"] if config.hold_out else [])]
    needed = set(keep)
    needed |= {name for d in difficulties for name in d.columns}
    needed |= {name for measure in measures.values() for name in measure.meta.root_names()}
    if any(name.startswith("against_") for name in needed):
        needed |= {"against_key", "model_key"}
    if column in SCORES:
        needed.add(column)
    rows = scores.select(sorted(needed))  # of ten million rows, only what is looked at
    if config.by != "pair" or not all(d.row_by_row for d in difficulties):
        rows = rows.sort("pair_id")  # for sums to the last bit, and expressions that look at neighbouring rows
    if column not in SCORES:
        assert pairs is not None
        own = pairs.select("pair_id", column).unique()
        if (repeated := own.filter(pl.col("pair_id").is_duplicated())["pair_id"].sort()).len():
            raise SdpoError(f"pairs has several values of {column!r} for pair_id {repeated[0]!r}. Give each pair one.")
        rows = rows.join(own, on="pair_id", how="left", maintain_order="left")
    without = rows.filter(pl.col(column).is_null())["pair_id"]
    if without.len():
        raise SdpoError(
            f"partition.by {config.by!r} has no value for {without.len():,} of {rows.height:,} pairs, e.g. pair_id "
            f"{without[0]!r}. Fill it in, or choose another unit."
        )
    values = [d.measure(rows).alias(f"cluster_{i}" if i else "difficulty") for i, d in enumerate(difficulties)]
    return rows.select(*keep, *values, unit=pl.col(column).cast(pl.String), **measures)


def rank_units(measured: pl.DataFrame, config: "PartitionConfig") -> pl.DataFrame:
    """Average the measures over each unit, count its pairs and tokens; easiest first, ties by the unit."""
    if config.by == "pair":
        units = measured.drop("pair_id", "prompt_id", "per_token", strict=False).with_columns(pairs=pl.lit(1))
    else:
        means = [name for name in measured.columns if name in ("difficulty", "length") or name.startswith("cluster_")]
        tokens = [pl.col("tokens").sum()] if "tokens" in measured.columns else []
        units = measured.group_by("unit").agg(pl.col("source").min(), pl.col(means).mean(), *tokens, pairs=pl.len())
    return sort_by_difficulty(units, "unit")
