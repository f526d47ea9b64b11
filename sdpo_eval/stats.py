"""Means and their standard errors, in the unit of the values. Analytic; numpy only."""

import math
from collections.abc import Hashable, Sequence

import numpy as np


def mean_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Average values and give the mean's standard error, s / sqrt(n) with s over n - 1.

    Args:
        values: at least one, finite.

    Returns:
        mean, and its standard error; None where the values show no spread, because there is one
        or because they are equal: four wrong answers are not 0 +- 0.
    """
    array = np.asarray(values, dtype=float)
    stderr = float(array.std(ddof=1)) / math.sqrt(array.size) if np.ptp(array) > 0 else None
    return float(array.mean()), stderr


def mean_of_means(means: Sequence[float], stderrs: Sequence[float | None]) -> tuple[float, float | None]:
    """Average independent means, each counting once, with sqrt(sum of SE^2) / k: H4 of its four tasks.

    Returns:
        mean, and its standard error; None where one of the means has none.

    Source: H4 of arXiv 2403.19270, table 2.
    """
    known = [stderr for stderr in stderrs if stderr is not None]
    stderr = math.hypot(*known) / len(means) if len(known) == len(means) else None
    return math.fsum(means) / len(means), stderr


def macro_mean_stderr(values: Sequence[float], strata: Sequence[Hashable]) -> tuple[float, float | None]:
    """Average the means of fixed strata, each counting once: MMLU over its subjects.

    The strata are all there are, not a draw from more: differences between them are no error,
    and clustering by stratum would overstate it. Where a stratum shows no spread (one value, or
    equal ones), the spread of all values together stands in for every stratum's. That
    also holds the differences between strata, so the standard error then errs upward.

    Args:
        values: at least one, finite.
        strata: the stratum of each value.

    Returns:
        macro mean, and its standard error; None where all values are equal.

    Source: arXiv 2411.00640 for strata; Cochran, Sampling Techniques, 3rd edition, section
        5A.12, for collapsing those with one unit (here all of them, into one).
    """
    groups: dict[Hashable, list[float]] = {}
    for value, stratum in zip(values, strata, strict=True):
        groups.setdefault(stratum, []).append(value)
    means, stderrs = zip(*map(mean_stderr, groups.values()), strict=True)
    if None in stderrs and np.ptp(values) > 0:
        spread = float(np.std(np.asarray(values, dtype=float), ddof=1))
        stderrs = [spread / math.sqrt(len(group)) for group in groups.values()]
    return mean_of_means(means, stderrs)
