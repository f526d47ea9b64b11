"""Where one part ends and the next begins: the ways to cut ranked units into parts.

A unit is what stays whole: a pair, a prompt with its pairs, a source. Three ways go by rank and
have a say in how large the parts are (equal, pairs, tokens, shares); three by value, and parts are
as large as they come out (quantiles, thresholds, kmeans).
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl

from sdpo_data.tables import SdpoError

if TYPE_CHECKING:
    from sdpo_data.partition import PartitionConfig

Cut = Literal["equal", "pairs", "tokens", "shares", "quantiles", "thresholds", "kmeans"]
BY_VALUE = ("quantiles", "thresholds", "kmeans")
KMEANS_STARTS = 10  # the best of so many seeded starts


def cut_by_rank(units: pl.DataFrame, cut: Cut, parts: int, at: Sequence[float]) -> pl.Series:
    """Cut units, which stand in training order, into parts of given size.

    equal: unit r of n, from 0, goes to part 1 + floor(r * parts / n): sizes differ by at most one unit.
    pairs, tokens: a unit goes to the part in which its first pair or token lies, when all of them
        are cut into equal parts: no part is off by more than its largest unit.
    shares: likewise, the pairs cut into the shares `at`.

    Args:
        units: columns pairs and tokens, counts per unit.
        at: of shares: one per part, sum 1.

    Returns:
        The part of every unit, from 1, rising.
    """
    if cut == "equal":
        return 1 + pl.int_range(units.height, eager=True) * parts // units.height
    weights = units["tokens" if cut == "tokens" else "pairs"]
    before = weights.cum_sum() - weights
    if cut != "shares":
        return 1 + before * parts // weights.sum()
    edges = (np.cumsum(at[:-1]) - 1e-9) * int(weights.sum())  # 0.7 * 10 is above 7 in floats
    return 1 + pl.Series(np.searchsorted(edges, before.to_numpy(), side="right"), dtype=pl.Int64)


def cut_by_value(units: pl.DataFrame, cut: Cut, parts: int, at: Sequence[float], seed: int) -> pl.Series:
    """Cut units where their difficulty says so; equal difficulties are never cut apart, but by kmeans.

    thresholds: part 1 is below at[0], and so on; exactly at a threshold belongs to the harder part.
    quantiles: thresholds at these quantiles of the units' difficulties (linear between two).
    kmeans: clusters of difficulty and the columns cluster_*, each scaled to a standard deviation of 1;
        numbered by their mean difficulty, then by their first unit.

    Args:
        units: unit, difficulty; for kmeans also cluster_*; in an order that does not depend on the
            order of the rows they came from.
        at: thresholds or quantiles, rising, one less than parts.
        seed: of the starts of kmeans.

    Returns:
        The part of every unit, from 1.

    Raises:
        SdpoError: there are fewer different points than clusters.
    """
    hard = units["difficulty"]
    if cut == "kmeans":
        return _clusters(units, parts, seed)
    edges = np.quantile(hard.to_numpy(), at) if cut == "quantiles" else np.asarray(at)
    return 1 + pl.Series(np.searchsorted(edges, hard.to_numpy(), side="right"), dtype=pl.Int64)


def refuse_small(sizes: pl.DataFrame, config: "PartitionConfig", hard: pl.Series) -> None:
    """Refuse empty parts, and those of fewer pairs than partition.min_pairs.

    Args:
        sizes: step, pairs; a row per part that has any.
        hard: the difficulties that were cut.

    Raises:
        SdpoError: a part is too small.
    """
    found = dict(sizes.select("step", "pairs").rows())
    for part in range(1, config.parts + 1):
        if (count := found.get(part, 0)) < config.min_pairs:
            remedy = "Move the edges in partition.at" if config.at else "Lower partition.parts"
            raise SdpoError(
                f"partition.cut {config.cut} leaves step {part} with {count} pair(s), fewer than partition.min_pairs "
                f"{config.min_pairs}; difficulty runs from {hard.min():.4g} to {hard.max():.4g}. "
                f"{remedy}, or choose another cut."
            )


def _clusters(units: pl.DataFrame, parts: int, seed: int) -> pl.Series:
    from sklearn.cluster import KMeans  # takes a second: only where it is asked for
    from sklearn.exceptions import ConvergenceWarning

    measures = units.select("difficulty", "^cluster_.*$").to_numpy()
    spread = measures.std(axis=0)
    if len(np.unique(measures, axis=0)) < parts:
        raise SdpoError(
            f"partition.cut kmeans: {len(np.unique(measures, axis=0))} different point(s) cannot be {parts} clusters. "
            "Lower partition.parts."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = KMeans(parts, n_init=KMEANS_STARTS, random_state=seed)
        labels = model.fit_predict((measures - measures.mean(axis=0)) / np.where(spread > 0, spread, 1.0))
    clusters = units.select("unit", "difficulty", label=pl.Series(labels, dtype=pl.Int64))
    order = clusters.group_by("label").agg(pl.col("difficulty").mean(), pl.col("unit").min()).sort("difficulty", "unit")
    numbers = order.select("label", part=1 + pl.int_range(pl.len(), dtype=pl.Int64))
    return clusters.select("label").join(numbers, on="label", how="left", maintain_order="left")["part"]
