"""What scores say of each source, how far the definitions of difficulty agree, and what noise does to them."""

import itertools
import logging
import math
from collections.abc import Iterator

import numpy as np
import polars as pl

from sdpo_data.console import print_table, say
from sdpo_data.difficulty import DIFFICULTIES, difficulty_named
from sdpo_data.intervals import clustered_means, compare_shares, effective_size, wilson_interval
from sdpo_data.tables import LOGP_MARGIN, MARGIN_PER_TOKEN, TOKEN_DIFFERENCE, SdpoError

log = logging.getLogger(__name__)

TAU_PAIRS = 20_000
"""Kendall's tau is measured on at most so many pairs: more would take long and tell no more."""


def length_correlation(scores: pl.DataFrame, definition: str) -> tuple[float, int]:
    """Rank correlation of a difficulty with how much longer the chosen answer is.

    Near +1 or -1 the difficulty mostly measures relative length.

    Returns:
        Spearman's rho and the number of pairs; NaN where one of the two does not vary.
    """
    frame = scores.select(difficulty_named(definition).measure(scores).alias("difficulty"), length=TOKEN_DIFFERENCE)
    rho = frame.select(_spearman("difficulty", "length")).item()
    return math.nan if rho is None else rho, frame.height


def describe_scores(scores: pl.DataFrame) -> pl.DataFrame:
    """Sum the scores up per source, the one with the highest reward accuracy first.

    Returns:
        source, pairs, prompts; reward_accuracy and per_token (share of pairs with a positive
        summed or per-token margin), each with the ends of its 95 % interval (Wilson's) and the
        effective number of pairs behind it, clustered by prompt; mean_margin (nats), longer_chosen
        (share of pairs), length_rho (Spearman's, of the margin with the token difference; null
        where one of them does not vary).

    Source: reward accuracy, arXiv 2403.19270 section 3.1.
    """
    shares = {"reward_accuracy": LOGP_MARGIN > 0, "per_token": MARGIN_PER_TOKEN > 0}
    accuracies = clustered_means(scores.select("source", "prompt_id", **shares), ["source"])
    margins = scores.group_by("source").agg(
        mean_margin=LOGP_MARGIN.mean(),
        longer_chosen=(TOKEN_DIFFERENCE > 0).mean(),
        length_rho=_spearman(LOGP_MARGIN, TOKEN_DIFFERENCE),
    )
    ends = {}
    for name in shares:
        ends[f"{name}_low"], ends[f"{name}_high"] = wilson_interval(pl.col(name), effective_size(name))
        ends[f"{name}_effective"] = effective_size(name)
    columns = [name + end for name in shares for end in ("", "_low", "_high", "_effective")]
    return (
        accuracies.with_columns(**ends)
        .join(margins, on="source")
        .rename({"n": "pairs", "clusters": "prompts"})
        .select("source", "pairs", "prompts", *columns, *margins.columns[1:])
        .sort("reward_accuracy", "source", descending=[True, False])
    )


def unclear_orders(described: pl.DataFrame) -> Iterator[str]:
    """Say of each two neighbours by reward accuracy, raw and per token, whose order may be chance, with the p value.

    Args:
        described: of `describe_scores`. Its sources are taken to share no prompts.
    """
    for name, title in (("reward_accuracy", "reward accuracy"), ("per_token", "reward accuracy per token")):
        ranked = described.sort(name, "source", descending=[True, False])
        rows = list(ranked.select("source", name, f"{name}_effective").iter_rows())
        for (easier, *first), (harder, *second) in itertools.pairwise(rows):
            chance = compare_shares((first[0], first[1]), (second[0], second[1]))
            if chance >= 0.05:
                yield (
                    f"{title} does not tell {easier} ({first[0]:.3f}) from {harder} ({second[0]:.3f}): p = "
                    f"{chance:.2g} (two-sided, clustered by prompt)"
                )


def describe_definitions(scores: pl.DataFrame, definition: str | None = None) -> pl.DataFrame:
    """Compare the definitions that can rank single pairs, as far as these scores allow each.

    Args:
        scores: SCORES frame.
        definition: one more to compare, such as an expression.

    Returns:
        A row per definition: definition, unit, length_rho (Spearman's, with how much longer the
        chosen answer is), pairs; then a column per definition with Kendall's tau-b against it
        (1 or -1: the same or the opposite order; null where one of the two does not vary), and
        tau_pairs: above TAU_PAIRS pairs, tau is that of a seeded sample of so many.
    """
    measured = dict(_measurable(scores, definition))
    values = pl.DataFrame(measured, schema=dict.fromkeys(measured, pl.Float64))
    ranks = values.with_columns(scores.select(_length=TOKEN_DIFFERENCE).to_series()).select(pl.all().rank())
    rhos = ranks.select(_correlation(pl.corr(name, "_length")).alias(name) for name in measured)
    picked = values
    if values.height > TAU_PAIRS:  # by pair_id: the same sample whatever the order of the rows
        drawn = np.random.default_rng(0).choice(values.height, TAU_PAIRS, replace=False)
        picked = values[scores["pair_id"].arg_sort()[np.sort(drawn)]]
    table = pl.DataFrame(
        {
            "definition": list(measured),
            "unit": [difficulty_named(name).unit for name in measured],
            "length_rho": pl.Series([rhos[name][0] for name in measured], dtype=pl.Float64),
            "pairs": [values.height] * len(measured),
        }
    )
    pairs = itertools.combinations_with_replacement(measured, 2)
    taus = {frozenset(both): _tau(picked[both[0]], picked[both[1]]) for both in pairs}
    columns = [pl.Series(name, [taus[frozenset((name, other))] for other in measured], pl.Float64) for name in measured]
    return table.with_columns(*columns, tau_pairs=pl.lit(picked.height))


def noise_band(scores: pl.DataFrame, rescored: pl.DataFrame, definition: str) -> tuple[float, int]:
    """How far a pair's difficulty moves when it is scored again in float32: the 95 % quantile.

    Args:
        scores: SCORES frame.
        rescored: SCORES of some of its pairs, the same model in float32.

    Returns:
        The band, in the definition's unit, and the number of pairs behind it.

    Raises:
        SdpoError: they have no pair in common, or are of different models.
    """
    again = rescored.join(scores.select("pair_id", "model_key"), on="pair_id", suffix="_before").sort("pair_id")
    other = again.filter(pl.col("model_key") != pl.col("model_key_before"))
    if again.is_empty() or other.height:
        why = "no pair of theirs is among the scores"
        if other.height:
            why = f"pair_id {other['pair_id'][0]!r} has model_key {other['model_key'][0]!r} instead of "
            why += repr(other["model_key_before"][0])
        raise SdpoError(f"Re-scored pairs are not of the same scores ({why}). Score again with --force.")
    before = scores.join(again.select("pair_id"), on="pair_id", how="semi").sort("pair_id")
    difficulty = difficulty_named(definition)
    moved = (difficulty.measure(before) - difficulty.measure(again.select(rescored.columns))).abs()
    band = moved.quantile(0.95, "linear")
    assert band is not None
    return band, moved.len()


def describe_noise(scores: pl.DataFrame, rescored: pl.DataFrame) -> pl.DataFrame:
    """Give the noise band of every definition that these scores allow: see `noise_band`.

    Returns:
        definition, unit, band, rescored (pairs behind it), near_median and share: how many of all
        pairs are within the band of the median, the edge of two equal steps, and could as well be
        on its other side.

    Raises:
        SdpoError: they have no pair in common, or are of different models.
    """
    rows = []
    for name, difficulty in _measurable(scores, None):
        band, n = noise_band(scores, rescored, name)
        near = int(((difficulty - difficulty.median()).abs() <= band).sum())
        rows.append((name, difficulty_named(name).unit, band, n, near, near / scores.height))
    columns = ("definition", "unit", "band", "rescored", "near_median", "share")
    return pl.DataFrame(rows, columns, orient="row")


def print_report(scores: pl.DataFrame, definition: str | None = None, rescored: pl.DataFrame | None = None) -> None:
    """Print what the scores say of each source, which order of sources may be chance, and how definitions agree.

    Args:
        scores: SCORES frame.
        definition: the one in use, when it may be an expression.
        rescored: SCORES of some of its pairs in float32, the content of noise.parquet: their noise is told too.
    """
    described = describe_scores(scores)
    interval = "{:.3f} [{:.3f}, {:.3f}]".format
    shown = described.with_columns(
        pl.Series(name, [interval(*row) for row in described.select(name, f"{name}_low", f"{name}_high").rows()])
        for name in ("reward_accuracy", "per_token")
    )
    hidden = [name for name in described.columns if name.endswith(("_low", "_high", "_effective"))]
    title = "reference model on each source: shares with 95 % intervals clustered by prompt; mean margin in nats"
    print_table(shown.drop(hidden), title)
    for line in unclear_orders(described):
        say(line)
    compared = describe_definitions(scores, definition)
    names = compared["definition"].to_list()
    numbered = {name: f"tau {place}" for place, name in enumerate(names, 1)}
    places = pl.Series("definition", [f"{place} {name}" for place, name in enumerate(names, 1)])
    print_table(
        compared.with_columns(places, pl.col(pl.Float64).round(2) + 0.0).drop("pairs", "tau_pairs").rename(numbered),
        "definitions: rank correlation with the token difference (length_rho), Kendall's tau",
    )
    if scores.height > TAU_PAIRS:
        say(f"tau on a seeded sample of {TAU_PAIRS:,} of {scores.height:,} pairs")
    if rescored is not None:
        dtype = " and ".join(sorted(scores["dtype"].unique()))
        title = f"noise of {dtype}: 95 % of re-scored pairs move less than the band; pairs within it of the median"
        print_table(describe_noise(scores, rescored), title)


def _measurable(scores: pl.DataFrame, extra: str | None) -> Iterator[tuple[str, pl.Series]]:
    for name in dict.fromkeys([*DIFFICULTIES, *([extra] if extra else [])]):
        difficulty = difficulty_named(name)
        if not difficulty.single_pairs:
            continue
        try:
            yield name, difficulty.measure(scores)
        except SdpoError as error:
            if name == extra:
                raise
            log.debug("not compared: %s", error)


def _spearman(first: pl.Expr | str, second: pl.Expr | str) -> pl.Expr:
    return _correlation(pl.corr(first, second, method="spearman"))


def _correlation(rho: pl.Expr) -> pl.Expr:
    """Null instead of NaN where one of the two does not vary, and of two pairs, of which it is always 1 or -1."""
    return pl.when(pl.len() > 2).then(rho.fill_nan(None))


def _tau(first: pl.Series, second: pl.Series) -> float | None:
    import scipy.stats  # takes a second: only where there is something to compare

    tau = float(scipy.stats.kendalltau(first.to_numpy(), second.to_numpy()).statistic)
    return None if math.isnan(tau) else tau
