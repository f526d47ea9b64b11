"""Cut scored pairs into steps, easiest first.

Makes what is missing on the way: pairs.parquet, then scores.parquet, then partition.parquet.

Examples:
    python -m sdpo_data.partition runs/a --pairs.source my_pairs.jsonl --model my-org/my-sft --parts 3
    python -m sdpo_data.partition runs/a --by source --difficulty reward_accuracy    # the paper's way
    python -m sdpo_data.partition runs/a --cut shares --at 0.2 0.8 --drop-hardest 0.1
"""

import itertools
import logging
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
import pydantic

from sdpo_data import orders, workers
from sdpo_data.cards import describe_partition
from sdpo_data.config import Command, Settings, read_command
from sdpo_data.console import command, say
from sdpo_data.cuts import BY_VALUE, Cut, cut_by_rank, cut_by_value, refuse_small
from sdpo_data.describe import length_correlation, print_report
from sdpo_data.orders import Order, Within
from sdpo_data.pairs import PairsConfig, make_pairs
from sdpo_data.score import ScoreConfig, make_scores
from sdpo_data.tables import DROPPED, PARTITION, SCORES, SdpoError, check
from sdpo_data.units import difficulties_of, measure_pairs, rank_units, unit_column

log = logging.getLogger(__name__)


class PartitionConfig(Settings):
    parts: int = pydantic.Field(2, ge=1)
    """Steps to cut the pairs into."""
    by: str = "pair"
    """What stays whole and is ranked by its mean difficulty: pair, prompt (all pairs of a prompt together),
    source (the paper's way), or a column of PAIRS or SCORES."""
    difficulty: str = "margin_per_token"
    """margin_per_token, logp_margin, reward_accuracy (not of single pairs), implicit_reward (needs
    score.against), rating_gap, chosen_perplexity, risk; SQL over SCORES, such as
    "abs(chosen_logp - rejected_logp) / prompt_tokens"; or a column of a file of yours, joined by its
    pair_id: FILE.parquet:COLUMN, or .csv. Higher is harder."""
    cut: Cut = "equal"
    """equal: as many units in each part; pairs, tokens: as many of them, where units differ in size;
    shares: of the pairs; quantiles, thresholds, kmeans: by the value of the difficulty."""
    at: list[float] = pydantic.Field([])
    """Of cut shares: each part's share. Of quantiles and thresholds: the edges between the parts, rising."""
    cluster_on: list[str] = pydantic.Field([])
    """Of cut kmeans: what it looks at beside the difficulty, whose mean orders the clusters."""
    order: Order | Literal["given"] = "easy_to_hard"
    """Which part comes first: easy_to_hard, hard_to_easy, given (see source_order); or, for control,
    parts of the same sizes filled random, stratified (the mix of the whole) or by token_difference."""
    source_order: list[str] = pydantic.Field([])
    """Of order given, by source: every source, the first to train on first."""
    cumulative: bool = False
    """Step t trains on parts 1 to t instead of part t alone."""
    within: Within = "shuffle"
    """Order inside a step: a seeded shuffle; difficulty, easiest first; length, alike ones together."""
    drop_hardest: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of the units to leave out, the hardest ones."""
    drop_easiest: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of the units to leave out, the easiest ones."""
    drop_suspect: float | None = None
    """Leave out pairs with a margin per token below this, nats: sure of the rejected answer, as at -1."""
    hold_out: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of each part's prompts that goes to held_out_parts.parquet with all their pairs."""
    min_pairs: int = pydantic.Field(1, ge=1)
    """Refuse to make a part of fewer pairs."""
    seed: int = 0
    """Of shuffles, drawn orders, kmeans and hold_out."""

    @pydantic.model_validator(mode="after")
    def _go_together(self) -> "PartitionConfig":
        edges = {"shares": self.parts, "quantiles": self.parts - 1, "thresholds": self.parts - 1}.get(self.cut, 0)
        if len(self.at) != edges:
            raise ValueError(f"cut {self.cut} in {self.parts} parts takes {edges} number(s) in at, not {self.at}")
        if self.cut == "shares" and (min(self.at) <= 0 or abs(sum(self.at) - 1) > 1e-6):
            raise ValueError(f"the shares in at are above 0 and sum to 1, not {self.at}")
        if self.cut in BY_VALUE and not all(low < high for low, high in itertools.pairwise(self.at)):
            raise ValueError(f"the edges in at rise, not {self.at}")
        if self.cut == "quantiles" and not all(0 < edge < 1 for edge in self.at):
            raise ValueError(f"quantiles lie between 0 and 1, not {self.at}")
        if self.cluster_on and self.cut != "kmeans":
            raise ValueError("cluster_on is read by cut kmeans alone")
        if (self.order == "given") != bool(self.source_order):
            raise ValueError("order given and source_order go together")
        if self.source_order and (self.by != "source" or self.cut in BY_VALUE):
            raise ValueError("order given takes by source, and a cut that is not by value")
        if self.drop_hardest + self.drop_easiest >= 1:
            raise ValueError("drop_hardest and drop_easiest together leave nothing")
        return self


@dataclass(frozen=True)
class Divided:
    """What cutting gave: every scored pair is in a step, or dropped with a reason."""

    partition: pl.DataFrame
    held_out: pl.DataFrame
    """PARTITION of what hold_out took: the step each pair would have been in. They are among the dropped too."""
    dropped: pl.DataFrame
    """DROPPED; content is empty, for the pairs stand in pairs.parquet."""


def partition_pairs(
    scores: pl.DataFrame, config: PartitionConfig | None = None, *, pairs: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Cut scored pairs into steps of rising difficulty.

    Units (pairs, prompts, sources) are ranked by mean difficulty, ties by their id, and cut into
    parts as config.cut says: see `cuts`. What is dropped goes before: first suspect pairs, then
    units. Then config.order says which part is step 1. hard_to_easy and given rank the units so and
    cut then, unless the cut is by value, whose parts hard_to_easy turns round; random, stratified and
    token_difference keep the number of units of every part and fill it with others: see
    `orders.rearrange`. The result depends on the rows, not on their order.

    Args:
        scores: SCORES frame.
        pairs: PAIRS frame, where config.by is a column of it.

    Returns:
        PARTITION frame, sorted by rank (the training order). What was left out is logged with its
        reasons; `divide_pairs` also returns it.

    Raises:
        SdpoError: fewer units than parts, or a part too small; an unknown difficulty, or one that
            cannot rank single pairs or has no value for some; an unknown unit, or pairs without
            one; repeated pairs or non-finite log-probabilities.

    Source: arXiv 2403.19270, section 3.1 (by source, reward accuracy). Deviation: the paper does
        not split sources; by="pair" does.
    """
    divided = divide_pairs(scores, config or PartitionConfig(), pairs=pairs)
    for reason, n in divided.dropped["reason"].value_counts().sort("reason").rows():
        log.info("left out %d of %d pairs: %s", n, scores.height, reason)
    return divided.partition


def divide_pairs(scores: pl.DataFrame, config: PartitionConfig, *, pairs: pl.DataFrame | None = None) -> Divided:
    """Do what `partition_pairs` does, and return beside it what was left out.

    With hold_out, a prompt belongs to the first step that has a pair of it. Of a step's n prompts
    floor(hold_out * n) are drawn by the seed and leave with all their pairs, from whatever step. They
    are other prompts than those of held_out.parquet, which pairs.hold_out puts aside before anything
    is scored, and which belong to no step: these have scores and a step, so that a model can be tried
    on pairs like those of each of its steps.

    Returns:
        Divided: every pair of `scores` is either in its partition or in its dropped, once.
    """
    scores = check(scores, SCORES, "scores")
    measured = measure_pairs(scores, config, pairs)
    total, lost = scores.height, []
    if config.drop_suspect is not None:
        suspect = pl.col("per_token") < config.drop_suspect
        lost.append(_as_dropped(measured.filter(suspect), f"margin per token below {config.drop_suspect:g} nats"))
        measured = measured.filter(~suspect)
    units = rank_units(measured, config)
    hardest, easiest = (math.floor(share * units.height + 1e-9) for share in (config.drop_hardest, config.drop_easiest))
    for extreme, reason in ((units.tail(hardest), "hardest"), (units.head(easiest), "easiest")):
        if extreme.height:
            gone = measured.join(extreme, on="unit", how="semi")
            lost.append(_as_dropped(gone, f"of the {reason} {extreme.height} {config.by}(s)"))
            measured = measured.join(extreme, on="unit", how="anti")
    units = units.slice(easiest, units.height - easiest - hardest)
    placed = _placed(measured, _stepped(units, config), config)
    held = placed.clear()
    if config.hold_out:
        held = _held_out(placed, config)
        placed = placed.join(held, on="pair_id", how="anti")
        lost += [_as_dropped(rows, f"held out of step {step}") for (step,), rows in held.group_by("step")]
    sizes = placed.group_by("step").agg(pairs=pl.len())
    refuse_small(sizes, config, units["difficulty"])
    partition = orders.ordered_within(placed.select(list(PARTITION)), config.within, config.seed, scores)
    dropped = pl.concat([DROPPED.to_frame(), *lost])
    assert partition.height + dropped.height == total
    if config.cumulative:
        partition = orders.accumulate(partition, seed=config.seed)
        partition = orders.order_within(partition, config.within, seed=config.seed, scores=scores)
    return Divided(partition, held.select(list(PARTITION)).sort("step", "pair_id"), dropped)


def make_partition(call: Command, scores: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """Make RUN/partition.parquet, unless it is up to date; with hold_out held_out_parts.parquet too."""
    config = call.settings["partition"]
    assert isinstance(config, PartitionConfig)
    recipe = config.model_dump() | _files(config)
    inputs = ["scores"] if unit_column(config, pairs) in SCORES else ["scores", "pairs"]
    with call.run.stage("partition", recipe, inputs, force=call.force) as stage:
        if stage.current:
            return call.run.partition
        divided = divide_pairs(scores, config, pairs=pairs)
        call.run.replace_dropped("partition", divided.dropped)
        if config.hold_out:
            stage.write("held_out_parts", divided.held_out)
        else:
            (call.run.path / "held_out_parts.parquet").unlink(missing_ok=True)  # of settings before
        return stage.write("partition", divided.partition)


def main() -> None:
    """Make RUN/partition.parquet and what it needs, and show a card of each part."""
    sections: dict[str, type[Settings]] = {"partition": PartitionConfig, "pairs": PairsConfig, "score": ScoreConfig}
    call = read_command("python -m sdpo_data.partition", __doc__, "partition", sections)
    config = call.settings["partition"]
    assert isinstance(config, PartitionConfig)
    difficulties_of(config)  # refuse what cannot work before the hour of scoring, not after it
    made = call.run.lineage.get("partition")
    pairs = workers.main_first(lambda: make_pairs(call), lambda: call.run.pairs)
    _check_ahead(config, pairs, call)
    scores = make_scores(call, pairs)
    if not workers.is_main():
        return
    partition = make_partition(call, scores, pairs)
    call.save()
    if call.run.lineage["partition"] == made:
        say(f"up to date: {call.run.path / 'partition.parquet'}")
        return
    print_report(scores, config.difficulty)
    noise = call.run.path / "noise.parquet"
    single = config.by == "pair" and noise.exists()  # of single pairs: it says nothing of a source's mean
    rescored = check(call.run.read("noise"), SCORES, "noise.parquet") if single else None
    describe_partition(partition, scores, pairs, rescored).print(str(call.run.path / "partition.parquet"))
    rho, n = length_correlation(scores, config.difficulty)
    say(f"{config.difficulty} against the token difference chosen - rejected: rank correlation {rho:+.2f} (n = {n:,})")


def _check_ahead(config: PartitionConfig, pairs: pl.DataFrame, call: Command) -> None:
    """Refuse what the scores of these pairs will not allow, as far as it can be known before they are made."""
    score = call.settings["score"]
    assert isinstance(score, ScoreConfig)
    against = score.against
    for difficulty in difficulties_of(config):
        if any(column.startswith("against_") for column in difficulty.columns) and against in (None, call.model):
            raise SdpoError(
                f"partition.difficulty {difficulty.name!r} needs the log-probabilities of a second model, but "
                f"score.against is {against!r}. Name a model other than {call.model!r} there."
            )
        if difficulty.columns <= set(pairs.columns):
            difficulty.measure(pairs)
    unit_column(config, pairs)


def _files(config: PartitionConfig) -> dict[str, str]:
    """Give the content hash of every file a difficulty is read from: another content is another partition."""
    return {d.name: key for d in difficulties_of(config) if (key := d.fingerprint) is not None}


def _stepped(units: pl.DataFrame, config: PartitionConfig) -> pl.DataFrame:
    """Give every unit its step."""
    if units.is_empty():
        raise SdpoError("No pair is left to be cut into steps. Score more pairs, or leave fewer of them out.")
    if units.height < config.parts:
        remedy = "" if config.by == "pair" else ", or set partition.by to 'pair'"
        raise SdpoError(
            f"Cannot cut {units.height} {config.by}(s) into {config.parts} steps. "
            f"Lower partition.parts to {units.height}{remedy}."
        )
    if config.cut in BY_VALUE:
        part = cut_by_value(units, config.cut, config.parts, config.at, config.seed)
        units = units.with_columns(step=config.parts + 1 - part if config.order == "hard_to_easy" else part)
    else:
        if config.order == "hard_to_easy":
            units = units.sort("difficulty", descending=True, maintain_order=True)
        elif config.order == "given":
            units = _in_given_order(units, config)
        units = units.with_columns(step=cut_by_rank(units, config.cut, config.parts, config.at))
    if config.order in ("easy_to_hard", "hard_to_easy", "given"):
        return units
    refuse_small(units.group_by("step").agg(pl.col("pairs").sum()), config, units["difficulty"])
    whole = pl.lit(0, pl.Int64)
    as_pairs = units.select(
        "source", pl.col("step").cast(pl.Int64), "difficulty", pair_id="unit", rank=whole, definition=pl.lit("")
    ).select(list(PARTITION))
    lengths = None
    if config.order == "token_difference":
        lengths = units.select(pair_id="unit", chosen_tokens="length", rejected_tokens=whole)
    filled = orders.rearrange(as_pairs, config.order, seed=config.seed, scores=lengths)
    return units.drop("step").join(filled.select("step", unit="pair_id"), on="unit", maintain_order="left")


def _in_given_order(units: pl.DataFrame, config: PartitionConfig) -> pl.DataFrame:
    given, there = config.source_order, units["unit"].to_list()
    if sorted(given) != sorted(there):
        raise SdpoError(
            f"partition.source_order is {given}, but the sources are {sorted(there)}. Name each of them once."
        )
    places = pl.DataFrame({"unit": given, "place": range(len(given))})
    return units.join(places, on="unit").sort("place").drop("place")


def _placed(measured: pl.DataFrame, units: pl.DataFrame, config: PartitionConfig) -> pl.DataFrame:
    """Give every pair the step and difficulty of its unit: PARTITION, with prompt_id where it is needed."""
    if config.by == "pair" and not config.hold_out:  # a unit is its pair
        placed = units.rename({"unit": "pair_id"})
    else:
        rows = measured.select("pair_id", "source", "unit", *(["prompt_id"] if config.hold_out else []))
        placed = rows.join(units.select("unit", "step", "difficulty"), on="unit")
    return placed.with_columns(
        pl.col("step").cast(pl.Int64), rank=pl.lit(0, pl.Int64), definition=pl.lit(config.difficulty)
    )


def _held_out(placed: pl.DataFrame, config: PartitionConfig) -> pl.DataFrame:
    prompts = placed.group_by("prompt_id").agg(pl.col("step").min()).sort("prompt_id")
    drawn = np.random.default_rng([config.seed, 4]).permutation(prompts.height)
    place = pl.col("drawn").rank("ordinal").over("step")
    count = (pl.len().over("step") * config.hold_out + 1e-9).floor()
    return placed.join(prompts.with_columns(drawn=drawn).filter(place <= count), on="prompt_id", how="semi")


def _as_dropped(rows: pl.DataFrame, reason: str) -> pl.DataFrame:
    return rows.select(
        "pair_id",
        "source",
        stage=pl.lit("partition"),
        row=pl.lit(None, pl.Int64),
        reason=pl.lit(reason),
        content=pl.lit(""),
    ).select(list(DROPPED))


if __name__ == "__main__":
    command(main)
