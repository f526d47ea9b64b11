"""What the report says of difficulty: how it is distributed, what it is confounded with, and pairs at its edges."""

from collections.abc import Iterator
from typing import Any

import polars as pl

from sdpo_data.describe import describe_definitions, describe_scores, length_correlation, unclear_orders
from sdpo_data.difficulty import Difficulty, difficulty_named
from sdpo_data.tables import TOKEN_DIFFERENCE, SdpoError
from sdpo_eval import plots_pairs
from sdpo_eval.blocks import Block, Drawing, Estimate, Heading, Prose, Quotes, Table
from sdpo_eval.evidence import Evidence, edge_pairs, read_texts
from sdpo_eval.margins import summarise_margins
from sdpo_eval.verdict import name_command

JUDGED = {"mean_margin": "nats", "reward_accuracy": "%", "accuracy_per_token": "%"}


def tell_difficulty(evidence: Evidence) -> Iterator[Block]:
    """Show what is easy and what is hard here, part by part and source by source, and what that may really be."""
    partition, scores = evidence.partition, evidence.scores
    if partition.is_empty():
        yield name_command(evidence, "The pairs have not been cut into parts yet", "sdpo_data.partition")
        return
    definition = partition["definition"][0]
    known = _definition(definition)
    unit = known.unit if known else "units of its maker's"
    yield Drawing("difficulties", lambda: plots_pairs.plot_difficulties(partition, unit))
    title = f"Difficulty by part: {definition} [{unit}], higher is harder"
    yield Table("difficulty", title, _difficulty_rows(partition))
    yield Table("sizes", "Sizes; tokens are sums over the part", _size_rows(partition, scores))
    if scores.height:
        placed = scores.join(partition.select("pair_id", "step"), on="pair_id")
        measured = summarise_margins(placed, ["step"]).iter_rows(named=True)
        rows = [{"step": row["step"]} | judgement(row) for row in measured]
        yield Table("parts_judged", "What the base model thinks of each part", rows, JUDGED)
        yield Drawing("margin_curves", lambda: plots_pairs.plot_margin_curves(scores, partition))
        yield from _sources(scores)
        yield Heading("Is it difficulty, or length?")
        yield from _length(evidence, definition, known)
        yield from _definitions(scores, definition if known and known.single_pairs else None)
    if evidence.pairs.height:
        yield Heading("Pairs at the edges")
        for (step,), part in edge_pairs(evidence).group_by("step", maintain_order=True):
            yield Quotes(f"Step {step}: its easiest, median and hardest pair", part.to_dicts())


def judgement(row: dict[str, Any]) -> dict[str, Estimate]:
    """Give a row of `summarise_margins` as the cells of a table."""
    return {
        "mean_margin": Estimate(row["mean"], row["stderr"], row["n"]),
        "reward_accuracy": Estimate(row["accuracy"], row["accuracy_stderr"], row["n"]),
        "accuracy_per_token": Estimate(row["per_token"], row["per_token_stderr"], row["n"]),
    }


def _sources(scores: pl.DataFrame) -> Iterator[Block]:
    described = describe_scores(scores)
    shares = ("reward_accuracy", "per_token")
    rows = [
        {"source": row["source"], "pairs": row["pairs"], "prompts": row["prompts"]}
        | {name: _share(row, name) for name in shares}
        | {"mean_margin": Estimate(row["mean_margin"]), "chosen_is_longer": Estimate(100 * row["longer_chosen"])}
        | {"rho_with_length": row["length_rho"] and Estimate(row["length_rho"], digits=2, signed=True)}
        for row in described.iter_rows(named=True)
    ]
    title = "What the base model thinks of each source: shares with 95 % intervals, clustered by prompt"
    units = {"mean_margin": "nats"} | dict.fromkeys([*shares, "chosen_is_longer"], "%")
    yield Table("source_scores", title, rows, units)
    unclear = list(unclear_orders(described))
    if unclear:
        said = "; ".join(unclear)
        yield Prose(f"The paper's order of sources would be chance here: {said}.")


def _share(row: dict[str, Any], name: str) -> Estimate:
    value, low, high = (100 * row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return Estimate(value, ends=(low, high))


def _length(evidence: Evidence, definition: str, known: Difficulty | None) -> Iterator[Block]:
    scores, partition = evidence.scores, evidence.partition
    texts = read_texts(evidence.pairs) if evidence.pairs.height else None
    yield Drawing("length_confound", lambda: plots_pairs.plot_length_confound(scores, partition, texts))
    if known:
        rho, n = length_correlation(scores, definition)
        said = Estimate(rho, n=n, digits=2, signed=True)
        yield Prose(
            f"Rank correlation (Spearman) of {definition} with how much longer the chosen answer is: {said}. "
            "Near +1 or −1 the order of the pairs is mostly an order of lengths."
        )


def _definitions(scores: pl.DataFrame, definition: str | None) -> Iterator[Block]:
    compared = describe_definitions(scores, definition)
    yield Drawing("definitions", lambda: plots_pairs.plot_definitions(compared))
    rows = compared.with_columns(pl.col(pl.Float64).round(3)).rename({"length_rho": "rho_with_length"}).to_dicts()
    title = (
        "Definitions of difficulty: rank correlation with the difference in length, and Kendall's tau with each other"
    )
    yield Table("definitions", title, rows, folded=True)


def _definition(name: str) -> Difficulty | None:
    try:
        return difficulty_named(name)
    except SdpoError:  # a partition from elsewhere may be ranked by what only its maker knows
        return None


def _size_rows(partition: pl.DataFrame, scores: pl.DataFrame) -> list[dict[str, Any]]:
    known = partition.join(scores.drop("source"), on="pair_id", how="left")
    tokens = {f"{name}_tokens": pl.col(f"{name}_tokens").sum() for name in ("prompt", "chosen", "rejected")}
    longer = {"chosen_is_longer": (TOKEN_DIFFERENCE > 0).sum(), "truncated": pl.col("truncated").sum()}
    sizes = known.group_by("step").agg(pairs=pl.len(), **(tokens | longer if scores.height else {}))
    counts = partition.group_by("step", "source").agg(n=pl.len()).sort("n", "source", descending=[True, False])
    sources = counts.group_by("step", maintain_order=True).agg(sources=pl.format("{} {}", "source", "n").str.join(", "))
    return sizes.join(sources, on="step").sort("step").to_dicts()


def _difficulty_rows(partition: pl.DataFrame) -> list[dict[str, Any]]:
    places = {"easiest": 0.0, "25_%": 0.25, "median": 0.5, "75_%": 0.75, "hardest": 1.0}
    shares = {name: pl.col("difficulty").quantile(share, "linear") for name, share in places.items()}
    return partition.group_by("step").agg(pairs=pl.len(), **shares).sort("step").to_dicts()
