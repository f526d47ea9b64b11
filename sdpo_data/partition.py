"""Cut scored pairs into steps, easiest first.

Makes what is missing on the way: pairs.parquet, then scores.parquet, then partition.parquet.

Examples:
    python -m sdpo_data.partition runs/a --pairs.source my_pairs.jsonl --model my-org/my-sft --parts 3
    python -m sdpo_data.partition runs/a --by source --difficulty reward_accuracy    # the paper's way
"""

import itertools
import logging
from typing import Literal

import numpy as np
import polars as pl
import pydantic

from sdpo_data import workers
from sdpo_data.config import Command, Settings, read_command
from sdpo_data.console import command, print_table, say
from sdpo_data.describe import length_correlation, noise_band, print_report
from sdpo_data.difficulty import Difficulty, difficulty_named
from sdpo_data.pairs import PairsConfig, make_pairs
from sdpo_data.score import ScoreConfig, make_scores
from sdpo_data.tables import LOGP_MARGIN, PARTITION, REWARD_ACCURACY, SCORES, SdpoError, check

log = logging.getLogger(__name__)


class PartitionConfig(Settings):
    parts: int = pydantic.Field(2, ge=1)
    """Steps to cut the pairs into."""
    by: Literal["pair", "source"] = "pair"
    """What stays whole: single pairs are ranked, or whole sources (the paper's way)."""
    difficulty: str = "margin_per_token"
    """margin_per_token, logp_margin, reward_accuracy (by source only), implicit_reward (needs score.against),
    rating_gap, chosen_perplexity, risk; or SQL over SCORES, such as "abs(chosen_logp - rejected_logp) / prompt_tokens".
    """
    within: Literal["shuffle", "difficulty"] = "shuffle"
    """Order inside a step: a seeded shuffle, or easiest first."""
    seed: int = 0
    """Of the shuffle."""


def partition_pairs(scores: pl.DataFrame, config: PartitionConfig | None = None) -> pl.DataFrame:
    """Cut scored pairs into steps of rising difficulty.

    Units (pairs or sources) are ranked by mean difficulty, ties by their id; unit number r of n,
    counted from 0, goes to step 1 + floor(r * parts / n): sizes differ by at most one unit.
    The result depends on the rows, not on their order.

    Args:
        scores: SCORES frame.

    Returns:
        PARTITION frame, sorted by rank (the training order).

    Raises:
        SdpoError: fewer units than parts, an unknown difficulty, or one that cannot rank single
            pairs or has no value for some; repeated pairs or non-finite log-probabilities.

    Source: arXiv 2403.19270, section 3.1 (by source, reward accuracy). Deviation: the paper does
        not split sources; by="pair" does.
    """
    config = config or PartitionConfig()
    scores = check(scores, SCORES, "scores").sort("pair_id")  # an expression may look at neighbouring rows
    difficulty = _difficulty(config)
    bad = scores.filter(~(LOGP_MARGIN.is_finite() & (pl.min_horizontal("chosen_tokens", "rejected_tokens") > 0)))
    if bad.height:
        raise SdpoError(
            f"{bad.height} of {scores.height} pairs have a non-finite log-probability or an answer of 0 tokens, e.g. "
            f"pair_id {bad['pair_id'][0]!r}. Score again in float32, or drop them."
        )
    unit = {"pair": "pair_id", "source": "source"}[config.by]
    measured = scores.select(unit, difficulty.measure(scores).alias("difficulty"))
    units = measured.group_by(unit).agg(pl.col("difficulty").mean()).sort("difficulty", unit)
    if units.height < config.parts:
        remedy = ", or set partition.by to 'pair'" if config.by == "source" else ""
        raise SdpoError(
            f"Cannot cut {units.height} {config.by}(s) into {config.parts} steps. "
            f"Lower partition.parts to {units.height}{remedy}."
        )
    units = units.with_columns(step=1 + pl.int_range(pl.len()) * config.parts // pl.len())
    placed = scores.select(list({"pair_id", "source", unit})).join(units, on=unit)
    return _ranked(placed, config).with_columns(definition=pl.lit(config.difficulty)).select(list(PARTITION))


def describe_parts(partition: pl.DataFrame, scores: pl.DataFrame) -> pl.DataFrame:
    """Sum up each step: pairs, tokens, sources, difficulty from easiest to hardest, reward accuracy."""
    joined = partition.join(scores.drop("source"), on="pair_id")
    return (
        joined.group_by("step")
        .agg(
            pairs=pl.len(),
            tokens=(2 * pl.col("prompt_tokens") + pl.col("chosen_tokens") + pl.col("rejected_tokens")).sum(),
            sources=pl.col("source").unique().sort().str.join(", "),
            easiest=pl.col("difficulty").min(),
            median=pl.col("difficulty").median(),
            hardest=pl.col("difficulty").max(),
            reward_accuracy=REWARD_ACCURACY,
            mean_margin=LOGP_MARGIN.mean(),
        )
        .sort("step")
    )


def describe_edges(partition: pl.DataFrame, band: float) -> pl.DataFrame:
    """Count the pairs so near to an edge between two steps that noise could put them on its other side.

    Args:
        partition: PARTITION frame, by single pairs.
        band: how far noise moves a difficulty, in its unit: see `noise_band`.

    Returns:
        A row per edge: edge, difficulty (halfway between the last pair before it and the first
        after it); easier_pairs and harder_pairs within the band on either side, each with its
        share of all pairs. A tie that the edge cuts counts whatever the band.
    """
    rows = []
    for edge, before, after in _edges(partition):
        near = (pl.col("difficulty") - edge).abs() <= band
        sides = [partition.filter(near & side).height for side in (pl.col("step") <= before, pl.col("step") >= after)]
        rows.append((f"{before} | {after}", edge, *(x for n in sides for x in (n, n / partition.height))))
    columns = {"edge": pl.String, "difficulty": pl.Float64}
    for side in ("easier", "harder"):
        columns |= {f"{side}_pairs": pl.Int64, f"{side}_share": pl.Float64}
    return pl.DataFrame(rows, columns, orient="row")


def count_edge_pairs(partition: pl.DataFrame, band: float) -> int:
    """Count the pairs within the band of any edge, each once: see `describe_edges`."""
    near = [(pl.col("difficulty") - edge).abs() <= band for edge, *_ in _edges(partition)]
    return partition.filter(pl.any_horizontal(near)).height if near else 0


def make_partition(call: Command, scores: pl.DataFrame) -> pl.DataFrame:
    """Make RUN/partition.parquet, unless it is up to date."""
    config = call.settings["partition"]
    assert isinstance(config, PartitionConfig)
    with call.run.stage("partition", config.model_dump(), ["scores"], force=call.force) as stage:
        if stage.current:
            return call.run.partition
        return stage.write("partition", partition_pairs(scores, config))


def main() -> None:
    """Make RUN/partition.parquet and what it needs, and show its parts."""
    sections: dict[str, type[Settings]] = {"partition": PartitionConfig, "pairs": PairsConfig, "score": ScoreConfig}
    call = read_command("python -m sdpo_data.partition", __doc__, "partition", sections)
    config = call.settings["partition"]
    assert isinstance(config, PartitionConfig)
    difficulty = _difficulty(config)  # refuse what cannot work before the hour of scoring, not after it
    made = call.run.lineage.get("partition")
    pairs = workers.main_first(lambda: make_pairs(call), lambda: call.run.pairs)
    _check_ahead(difficulty, pairs, call)
    scores = make_scores(call, pairs)
    if not workers.is_main():
        return
    partition = make_partition(call, scores)
    call.save()
    if call.run.lineage["partition"] == made:
        say(f"up to date: {call.run.path / 'partition.parquet'}")
        return
    print_report(scores, config.difficulty)
    print_table(describe_parts(partition, scores), f"{call.run.path / 'partition.parquet'}")
    rho, n = length_correlation(scores, config.difficulty)
    say(f"{config.difficulty} against the token difference chosen - rejected: rank correlation {rho:+.2f} (n = {n:,})")
    if config.by == "pair" and (call.run.path / "noise.parquet").exists():
        _print_noise(partition, scores, check(call.run.read("noise"), SCORES, "noise.parquet"), difficulty)


def _difficulty(config: PartitionConfig) -> Difficulty:
    difficulty = difficulty_named(config.difficulty)
    if config.by == "pair" and not difficulty.single_pairs:
        raise SdpoError(
            f"partition.difficulty {config.difficulty!r} is a share over many pairs and cannot rank single ones. "
            "Set partition.by to 'source', or partition.difficulty to 'margin_per_token'."
        )
    return difficulty


def _check_ahead(difficulty: Difficulty, pairs: pl.DataFrame, call: Command) -> None:
    """Refuse what the scores of these pairs will not allow, as far as it can be known before they are made."""
    score = call.settings["score"]
    assert isinstance(score, ScoreConfig)
    against = score.against
    if any(column.startswith("against_") for column in difficulty.columns) and against in (None, call.model):
        raise SdpoError(
            f"partition.difficulty {difficulty.name!r} needs the log-probabilities of a second model, but "
            f"score.against is {against!r}. Name a model other than {call.model!r} there."
        )
    if difficulty.columns <= set(pairs.columns):
        difficulty.measure(pairs)


def _edges(partition: pl.DataFrame) -> list[tuple[float, int, int]]:
    """Difficulty halfway between neighbouring steps, and the two steps."""
    ends = partition.group_by("step").agg(low=pl.col("difficulty").min(), high=pl.col("difficulty").max()).sort("step")
    rows = ends.rows()
    return [((high + low) / 2, before, after) for (before, _, high), (after, low, _) in itertools.pairwise(rows)]


def _print_noise(partition: pl.DataFrame, scores: pl.DataFrame, rescored: pl.DataFrame, difficulty: Difficulty) -> None:
    try:
        band, n = noise_band(scores, rescored, difficulty.name)
    except SdpoError as error:  # the partition is made and stands
        say(f"noise band unknown: {error}")
        return
    print_table(describe_edges(partition, band), "edges between steps, and the pairs within the noise band of each")
    k = count_edge_pairs(partition, band)
    say(
        f"noise band {band:.2g} {difficulty.unit} (95 % of {n:,} re-scored pairs): {k:,} of {partition.height:,} pairs "
        "could be on the other side of an edge"
    )


def _ranked(placed: pl.DataFrame, config: PartitionConfig) -> pl.DataFrame:
    """Give every pair its place in the training order: by step, inside it as config.within says."""
    if config.within == "difficulty":
        ordered = placed.sort("step", "difficulty", "pair_id")
    else:
        drawn = np.random.default_rng(config.seed).permutation(placed.height)
        ordered = placed.sort("pair_id").with_columns(drawn=drawn).sort("step", "drawn")
    return ordered.with_columns(rank=pl.int_range(pl.len(), dtype=pl.Int64))


if __name__ == "__main__":
    command(main)
