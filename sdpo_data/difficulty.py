"""What makes a pair hard for a model: named definitions over SCORES. Higher is harder, always.

A definition is an expression; for a unit larger than a pair its mean is taken.
"""

import logging
import math
from dataclasses import dataclass

import polars as pl

from sdpo_data.tables import LOGP_MARGIN, MARGIN_PER_TOKEN, REWARD_ACCURACY, TOKEN_DIFFERENCE, SdpoError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Difficulty:
    """One definition: its formula, its unit, where it comes from."""

    expression: pl.Expr
    unit: str
    source: str
    single_pairs: bool = True
    """Whether it can rank single pairs."""


DIFFICULTIES = {
    "margin_per_token": Difficulty(
        -MARGIN_PER_TOKEN,
        "nats per token",
        "minus the difference of the answers' mean log-probabilities (SimPO's margin, arXiv 2405.14734): "
        "less of a length measure than the sum",
    ),
    "logp_margin": Difficulty(
        -LOGP_MARGIN, "nats", "-gamma of arXiv 2403.19270, section 3: longer chosen answers count as harder"
    ),
    "reward_accuracy": Difficulty(
        (LOGP_MARGIN <= 0).cast(pl.Float64),
        "share of pairs",
        "1 - reward accuracy of arXiv 2403.19270, section 3.1, read reference-free: the implicit reward of a "
        "model against itself is 0 for every pair",
        single_pairs=False,
    ),
}


def difficulty_named(name: str) -> Difficulty:
    """Look a definition up.

    Raises:
        SdpoError: there is none of that name.
    """
    if name not in DIFFICULTIES:
        raise SdpoError(f"partition.difficulty {name!r} is not defined. There are: {', '.join(DIFFICULTIES)}.")
    return DIFFICULTIES[name]


def describe_scores(scores: pl.DataFrame) -> pl.DataFrame:
    """Sum the scores up per source: size, reward accuracy raw and per token with 95 % intervals, mean margin.

    Intervals are Wilson's, pairs taken as independent. Two sources whose intervals overlap
    have no order worth speaking of; a line says so.

    Source: reward accuracy, arXiv 2403.19270 section 3.1.
    """
    table = scores.group_by("source").agg(
        pairs=pl.len(),
        reward_accuracy=REWARD_ACCURACY,
        accuracy_per_token=(MARGIN_PER_TOKEN > 0).mean(),
        mean_margin=LOGP_MARGIN.mean(),
        longer_chosen=(TOKEN_DIFFERENCE > 0).mean(),
    )
    rows = table.sort("reward_accuracy", "source", descending=[True, False])
    bounds = [_wilson(share, n) for share, n in rows.select("reward_accuracy", "pairs").iter_rows()]
    for place in range(1, rows.height):
        if bounds[place][1] >= bounds[place - 1][0]:
            log.info(
                "reward accuracy does not tell %s from %s: their 95 %% intervals overlap",
                rows["source"][place - 1],
                rows["source"][place],
            )
    shown = pl.Series("accuracy_95", [f"[{low:.2f}, {high:.2f}]" for low, high in bounds])
    return rows.insert_column(3, shown)


def length_correlation(scores: pl.DataFrame, definition: str) -> tuple[float, int]:
    """Rank correlation of a difficulty with how much longer the chosen answer is.

    Near +1 or -1 the difficulty mostly measures relative length.

    Returns:
        Spearman's rho and the number of pairs; NaN where one of the two does not vary.
    """
    frame = scores.select(difficulty=difficulty_named(definition).expression, length=TOKEN_DIFFERENCE)
    if frame.height < 3 or frame["difficulty"].n_unique() < 2 or frame["length"].n_unique() < 2:
        return math.nan, frame.height
    return frame.select(pl.corr("difficulty", "length", method="spearman")).item(), frame.height


def _wilson(share: float, n: int) -> tuple[float, float]:
    import scipy.stats  # takes a second: only where there is something to describe

    interval = scipy.stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
