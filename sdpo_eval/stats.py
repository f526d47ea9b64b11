"""Means, their standard errors, and what a difference over the same questions proves. numpy and scipy.

Two verdicts, never mixed. `compare_checkpoints`: do these two models answer differently, were
other questions of the kind asked? `compare_methods`: would other seeds too? The second needs
at least ENOUGH_SEEDS seeds; with fewer, only the first can be had.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

UNDECIDED = "not distinguishable"
ALPHA = 0.05
POWER = 0.8
ENOUGH_SEEDS = 5  # fewer tell checkpoints apart, not methods
RESAMPLES = 10_000
NO_SPREAD = 1e-9  # float noise of sums of residues that are 0
CHUNK = 1_000  # resamples drawn at once, for memory

Array = NDArray[np.float64]


def mean_of_means(means: Sequence[float], stderrs: Sequence[float | None]) -> tuple[float, float | None]:
    """Average independent means, each counting once, with sqrt(sum of SE^2) / k: H4 of its four tasks.

    Returns:
        mean, and its standard error; None where one of the means has none.

    Source: H4 of arXiv 2403.19270, table 2.
    """
    known = [stderr for stderr in stderrs if stderr is not None]
    stderr = math.hypot(*known) / len(means) if len(known) == len(means) else None
    return math.fsum(means) / len(means), stderr


def macro_mean_stderr(
    values: ArrayLike, strata: ArrayLike | None = None, clusters: ArrayLike | None = None
) -> tuple[float, float | None]:
    """Average the means of fixed strata, each counting once: MMLU over its subjects.

    The strata are all there are, not a draw from more: differences between them are no error,
    and clustering by stratum would overstate it. Where a stratum shows no spread (one value, or
    equal ones), the spread of all values together stands in for every stratum's. That
    also holds the differences between strata, so the standard error then errs upward.

    Args:
        values: at least one, finite.
        strata: the stratum of each value; by default all are of one, and the error is s / sqrt(n).
        clusters: the cluster of each value, whose values are one draw; by default each is its own.

    Returns:
        macro mean, and its standard error; None where the values show no spread, because there is one
        or because they are equal: four wrong answers are not 0 +- 0.

    Source: arXiv 2411.00640 for strata and clusters; Cochran, Sampling Techniques, 3rd edition, section
        5A.12, for collapsing strata with one unit (here all of them, into one). Deviation: times
        sqrt(G / (G - 1)) for G clusters of a stratum.
    """
    task = Differences.of(values, strata, clusters)
    known = _strata(task, task.values[0])
    return float(task.macro_means()[0]), math.sqrt(_variance(known)) if known else None


@dataclass(frozen=True)
class Differences:
    """What one task says of two models, or of two methods: first - second on the questions both answered.

    Args:
        values: (seeds, questions), in any unit; one row compares two checkpoints.
        strata: (questions,), MMLU's subjects: fixed, each counting once.
        clusters: (questions,), what a question was made from; by default each is its own.
    """

    values: Array
    strata: NDArray
    clusters: NDArray

    @classmethod
    def of(cls, values: ArrayLike, strata: ArrayLike | None = None, clusters: ArrayLike | None = None) -> "Differences":
        """Make one from whatever numpy reads as arrays.

        Raises:
            ValueError: there is no question, or the shapes disagree.
        """
        array = np.atleast_2d(np.asarray(values, dtype=float))
        n = array.shape[1]
        groups = np.zeros(n) if strata is None else np.unique(np.asarray(strata), return_inverse=True)[1]
        units = np.arange(n) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
        if not n or array.ndim != 2 or len(groups) != n or len(units) != n:
            raise ValueError(f"values are {array.shape}, but there are {len(groups)} strata and {len(units)} clusters.")
        return cls(array, groups, units)

    @cached_property
    def members(self) -> list[tuple[NDArray, NDArray]]:
        """Of each stratum its questions, and the cluster of each, counted from 0."""
        places = [np.flatnonzero(self.strata == stratum) for stratum in np.unique(self.strata)]
        return [(rows, np.unique(self.clusters[rows], return_inverse=True)[1]) for rows in places]

    @property
    def units(self) -> int:
        """Independent draws of questions, beyond one for each stratum: the degrees of freedom."""
        return max(1, sum(int(clusters.max()) for _, clusters in self.members))

    def macro_means(self) -> Array:
        """Of each seed, the mean over strata of their means: (seeds,)."""
        return np.mean([self.values[:, rows].mean(axis=1) for rows, _ in self.members], axis=0)


@dataclass(frozen=True)
class Effect:
    """A difference with what is known about it, in the unit of the values."""

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    p: float | None
    """Two-sided, of no difference; None, as the three before it, where nothing varies, so nothing is known."""
    detectable: float | None
    """Smallest true difference found with a power of 80 %, by a two-sided test at 5 %."""
    n: int
    """Questions."""
    seeds: int


@dataclass(frozen=True)
class _Stratum:
    """What resampling one stratum's mean takes."""

    pool: NDArray
    """Residue of every cluster it can draw: the sum of its values' distances from the mean."""
    draws: int
    questions: int

    @property
    def variance(self) -> float:
        return self.draws * float(self.pool @ self.pool) / (len(self.pool) - 1) / self.questions**2

    def draw(self, resamples: int, random: np.random.Generator) -> Array:
        """Draw how far the mean of other questions lies from this one's: (resamples,)."""
        kinds, counts = np.unique(self.pool.round(9), return_counts=True)
        if 8 * len(kinds) < self.draws:  # a right or wrong answer has few kinds of differences: count those
            sums = random.multinomial(self.draws, counts / counts.sum(), size=resamples) @ kinds
        else:
            pool, sums = np.sort(self.pool), np.empty(resamples)
            for first in range(0, resamples, CHUNK):
                size = (min(CHUNK, resamples - first), self.draws)
                sums[first : first + CHUNK] = pool[random.integers(len(pool), size=size, dtype=np.int32)].sum(axis=1)
        return sums * math.sqrt(len(self.pool) / (len(self.pool) - 1)) / self.questions


def compare_checkpoints(
    tasks: Sequence[Differences], *, alpha: float = ALPHA, resamples: int = RESAMPLES, seed: int = 0
) -> Effect:
    """Say how these two checkpoints differ: paired bootstrap over questions, stratified by task and subject.

    Several tasks count once each (H4). Every stratum draws as many clusters of questions as it
    has, with replacement; where one shows no spread, all of its task's questions stand in for
    every stratum's, as in `macro_mean_stderr`. The p-value and the interval are of the
    resampled means' percentiles. The order of the questions does not matter.

    Args:
        tasks: one row of values each.
        alpha: 1 - the interval's level.

    Source: paired over items, arXiv 2411.00640, where it is analytic; percentile bootstrap, Efron
        and Tibshirani, An Introduction to the Bootstrap, chapters 13 and 15. Deviations: distances
        from a stratum's mean are drawn, stretched by sqrt(G / (G - 1)) for G clusters, without
        which strata of few questions look surer than they are (Rao and Wu, JASA 83, 1988).
    """
    value = float(np.mean([task.macro_means()[0] for task in tasks]))
    strata = [_strata(task, task.values[0]) for task in tasks]
    n = sum(task.values.shape[1] for task in tasks)
    if any(task is None for task in strata):
        return Effect(value, None, None, None, None, None, n, 1)
    known = [task for task in strata if task is not None]
    stderr = math.sqrt(sum(_variance(task) for task in known)) / len(known)
    random = np.random.default_rng(seed)
    moved = [np.mean([stratum.draw(resamples, random) for stratum in task], axis=0) for task in known]
    means = value + np.mean(moved, axis=0)
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    tail = min(np.sum(means <= NO_SPREAD), np.sum(means >= -NO_SPREAD))
    p = min(1.0, 2 * (1 + int(tail)) / (1 + resamples))
    return Effect(value, stderr, float(low), float(high), p, detectable_difference(stderr), n, 1)


def compare_methods(tasks: Sequence[Differences], *, alpha: float = ALPHA) -> Effect:
    """Say how two methods differ: seeds crossed with questions, both a sample of more.

    The variance of the mean over seeds and questions is V_seed + V_question - V_rest, the three
    mean squares of the two-way table over its size: V_seed, s^2 / K of the seeds' own effects;
    V_question, that of the questions' means over seeds, by stratum and cluster; V_rest, which
    both hold, of what is left. It is never taken to be less than either of the first two. The
    interval is Student's t with Satterthwaite's degrees of freedom, so few seeds make it wide.

    Args:
        tasks: the same seeds in each, a row of values per seed (of both arms, or of one arm
            against one base model). Seeds that have nothing in common but their number cost
            degrees of freedom, never validity.
        alpha: 1 - the interval's level.

    Raises:
        ValueError: fewer than two seeds.

    Source: random effects of a two-way table, Searle, Casella and McCulloch, Variance
        Components, chapter 4; the question part as in arXiv 2411.00640, which knows no seeds.
        Deviation: V_rest is left out of the degrees of freedom.
    """
    effects = np.mean([task.macro_means() for task in tasks], axis=0)  # (seeds,)
    seeds, value, n = len(effects), float(effects.mean()), sum(task.values.shape[1] for task in tasks)
    if seeds < 2:
        raise ValueError("One seed says nothing of other seeds: compare the checkpoints.")
    strata = [_strata(task, task.values.mean(axis=0)) for task in tasks]
    known = [task for task in strata if task is not None]
    if len(known) < len(tasks):
        return Effect(value, None, None, None, None, None, n, seeds)
    of_seeds = float(effects.var(ddof=1)) / seeds
    of_questions = sum(map(_variance, known)) / len(tasks) ** 2
    rest = sum(
        _variance(_strata_alone(task, row)) for task in tasks for row in task.values - task.values.mean(axis=0)
    ) / (len(tasks) ** 2 * seeds * (seeds - 1))
    variance = max(of_seeds + of_questions - rest, of_seeds, of_questions)
    freedom = variance**2 / (of_seeds**2 / (seeds - 1) + of_questions**2 / sum(task.units for task in tasks))
    stderr = math.sqrt(variance)
    reach = float(special.stdtrit(freedom, 1 - alpha / 2)) * stderr
    p = 2 * float(special.stdtr(freedom, -abs(value) / stderr))
    return Effect(
        value, stderr, value - reach, value + reach, p, detectable_difference(stderr, freedom=freedom), n, seeds
    )


def _strata_alone(task: Differences, values: Array) -> list[_Stratum]:
    """Cut one row of values into strata, each with the spread of its own questions."""
    strata = []
    for rows, clusters in task.members:
        residues = np.bincount(clusters, weights=values[rows] - values[rows].mean())
        strata.append(_Stratum(residues if len(residues) > 1 else np.zeros(2), len(residues), len(rows)))
    return strata


def _strata(task: Differences, values: Array) -> list[_Stratum] | None:
    """Cut one row of values into strata; None where no question differs from another."""
    strata = _strata_alone(task, values)
    if all(np.ptp(stratum.pool) > NO_SPREAD for stratum in strata):
        return strata
    clusters = np.unique(task.clusters, return_inverse=True)[1]
    pool = np.bincount(clusters, weights=values - values.mean())
    if len(pool) < 2 or np.ptp(pool) <= NO_SPREAD:
        return None
    return [_Stratum(pool, stratum.draws, stratum.questions) for stratum in strata]


def _variance(strata: list[_Stratum]) -> float:
    """Variance of the plain mean of the strata's means."""
    return sum(stratum.variance for stratum in strata) / len(strata) ** 2


def detectable_difference(
    stderr: float, *, power: float = POWER, alpha: float = ALPHA, freedom: float = math.inf
) -> float:
    """Smallest true difference that a two-sided test at `alpha` finds with this power, in the unit of `stderr`.

    Source: (z(1 - alpha / 2) + z(power)) * SE, arXiv 2411.00640, section 5; Student's t for z
        where the degrees of freedom are few.
    """
    return float(special.stdtrit(freedom, 1 - alpha / 2) + special.stdtrit(freedom, power)) * stderr


def questions_needed(stderr: float, n: int, difference: float, *, power: float = POWER, alpha: float = ALPHA) -> int:
    """Questions after which two checkpoints that differ by this much are told apart with this power.

    Args:
        stderr: standard error that n questions gave, in the unit of `difference`.
    """
    return math.ceil(n * (detectable_difference(stderr, power=power, alpha=alpha) / difference) ** 2)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided mid-p value of McNemar's test that both models are right equally often.

    It takes questions as independent draws: for plain accuracies without strata or clusters.

    Args:
        only_first: questions that only the first model answers right; only_second likewise.

    Source: Fagerland, Lydersen and Laake, BMC Medical Research Methodology 13:91, 2013.
    """
    fewer, n = min(only_first, only_second), only_first + only_second
    if only_first == only_second:
        return 1.0
    return float(special.bdtr(fewer, n, 0.5) + special.bdtr(fewer - 1, n, 0.5)) if fewer else 0.5**n


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values so that the chance of any false "differs" among them stays at the level they are read at.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    order = np.argsort(p_values, kind="stable")
    raised = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(raised))
    return adjusted.tolist()


def judge(effect: float, p: float | None, alpha: float = ALPHA) -> str:
    """Say "better", "worse" or "not distinguishable"; without a p-value it is the last."""
    if p is None or p >= alpha:
        return UNDECIDED
    return "better" if effect > 0 else "worse"
