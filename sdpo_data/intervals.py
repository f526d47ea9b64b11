"""How sure a mean over pairs is when pairs share prompts: clustered errors, intervals of shares, a test of two.

Pairs of one prompt are no independent draws: 1,000 pairs of 10 prompts say little more than 10 pairs do.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import polars as pl

Z_95 = NormalDist().inv_cdf(0.975)


def clustered_means(values: pl.DataFrame, by: Sequence[str], cluster: str = "prompt_id") -> pl.DataFrame:
    """Average columns per group, with standard errors that know that rows of one cluster belong together.

    Args:
        values: the columns `by` and `cluster`; every other column is averaged, in its own unit.

    Returns:
        The columns `by`, then each average and its `<name>_stderr` (null where the group has one
        cluster: its spread is unknown), n (rows) and clusters. Sorted by `by`.

    Source: clustered standard error of a mean, arXiv 2411.00640. Deviation: times
        sqrt(G / (G - 1)) for G clusters, without which few clusters look surer than they are.
    """
    names = [name for name in values.columns if name not in (*by, cluster)]
    sums = values.group_by(*by, cluster, maintain_order=True).agg(pl.col(names).cast(pl.Float64).sum(), n=pl.len())
    means = pl.col(names).sum() / pl.col("n").sum()
    residues = pl.col(names) - means * pl.col("n")
    correction = pl.when(pl.len() > 1).then(pl.len() / (pl.len() - 1))
    stderrs = (residues.pow(2).sum() * correction).sqrt() / pl.col("n").sum()
    table = sums.group_by(by).agg(means, stderrs.name.suffix("_stderr"), pl.col("n").sum(), clusters=pl.len())
    return table.sort(by)


def effective_size(share: str) -> pl.Expr:
    """How many independent rows would pin a share down as well as these: p (1 - p) / SE^2, over `clustered_means`.

    Where that says nothing (all right, all wrong, one cluster) it is the number of clusters; and
    it is never more than the rows, as a cluster that happens to balance itself out proves nothing.

    Source: Korn and Graubard, Survey Methodology 24 (1998), 193-201. Deviation: without their
        ratio of t quantiles; the cap is that of the US NCHS (Vital and Health Statistics 2/175).
    """
    p, stderr = pl.col(share), pl.col(f"{share}_stderr")
    spread = p * (1 - p)
    known = (spread > 0) & (pl.col("clusters") > 1)
    return pl.when(known).then(pl.min_horizontal(spread / stderr.pow(2), "n")).otherwise("clusters")


def wilson_interval(share: pl.Expr, size: pl.Expr) -> tuple[pl.Expr, pl.Expr]:
    """Give the two ends of the 95 % interval of a share seen in `size` draws; `size` need not be whole.

    Source: Wilson, JASA 22 (1927), 209-212.
    """
    z2 = Z_95**2
    middle = (share + z2 / (2 * size)) / (1 + z2 / size)
    half = Z_95 * (share * (1 - share) / size + z2 / (4 * size.pow(2))).sqrt() / (1 + z2 / size)
    return (middle - half).clip(0.0, 1.0), (middle + half).clip(0.0, 1.0)


def compare_shares(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Test whether two shares differ: two-sided p value of the score test at their effective sizes.

    A plain z over the clustered errors would call 1 right of 1 surer than any other number, as its
    error is 0. This test takes the variance that the two would have if they were equal instead.

    Args:
        first: share, effective size; of draws that have no cluster in common with the second's.
        second: likewise.

    Source: Rao and Scott, Biometrics 48 (1992), 577-585.
    """
    (p, n), (q, m) = first, second
    pooled = (p * n + q * m) / (n + m)
    variance = pooled * (1 - pooled) * (1 / n + 1 / m)
    return math.erfc(abs(p - q) / math.sqrt(2 * variance)) if variance > 0 else 1.0
