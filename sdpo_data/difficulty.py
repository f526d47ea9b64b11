"""What makes a pair hard for a model: named definitions over SCORES. Higher is harder, always.

A definition is an expression; for a unit larger than a pair its mean is taken. Beside the named
ones, any SQL expression over the columns of SCORES is a definition. `print_report` shows what the
scores say of each source, and how far the definitions agree.
"""

import difflib
import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from sdpo_data.console import print_table, say
from sdpo_data.intervals import clustered_means, compare_shares, effective_size, wilson_interval
from sdpo_data.tables import LOGP_MARGIN, MARGIN_PER_TOKEN, SCORES, TOKEN_DIFFERENCE, SdpoError

log = logging.getLogger(__name__)

TAU_PAIRS = 20_000
"""Kendall's tau is measured on at most so many pairs: more would take long and tell no more."""

EXAMPLE = "'abs(chosen_logp - rejected_logp) / prompt_tokens'"


@dataclass(frozen=True)
class Difficulty:
    """One definition: its formula, its unit, where it comes from."""

    name: str
    """Or the SQL text of an expression of the user's own."""
    expression: pl.Expr
    unit: str
    source: str
    single_pairs: bool = True
    """Whether it can rank single pairs."""

    @property
    def columns(self) -> set[str]:
        """The columns of SCORES that it reads."""
        return set(self.expression.meta.root_names())

    def measure(self, scores: pl.DataFrame) -> pl.Series:
        """Compute the difficulty of every pair, in the order of `scores`.

        Args:
            scores: SCORES; or any frame that has `columns`, pair_id and source.

        Returns:
            Finite numbers, in `unit`.

        Raises:
            SdpoError: it has no value for some pair, or no finite one; it compares a model with
                itself; or, of an expression, it gives no number per pair.
        """
        values = self._evaluate(scores)
        if any(column.startswith("against_") for column in self.columns):
            same = scores.filter(pl.col("against_key") == pl.col("model_key"))
            if same.height:
                raise SdpoError(
                    f"{self._place} sets the model against itself (both keys are {same['model_key'][0]!r}), which is "
                    "0 for every pair by definition. Set score.against to another model."
                )
        for wrong, what in ((values.is_null(), "has no value"), (~values.is_finite(), "is not finite")):
            if wrong.any():
                raise SdpoError(self._why_not(scores.filter(wrong), scores.height, what, values.filter(wrong)[0]))
        return values

    @property
    def _place(self) -> str:
        return f"partition.difficulty {self.name!r}"

    def _evaluate(self, scores: pl.DataFrame) -> pl.Series:
        try:
            values = scores.select(difficulty=self.expression).to_series()
        except pl.exceptions.PolarsError as error:
            said = str(error).splitlines()[0]
            raise SdpoError(f"{self._place} cannot be computed ({said}). Mend the expression.") from None
        if values.len() != scores.height:
            raise SdpoError(
                f"{self._place} gives {values.len()} value(s) for {scores.height} pairs. Give each pair its own, "
                f"e.g. {EXAMPLE}, and a mean per group as avg(...) OVER (PARTITION BY source)."
            )
        if not values.dtype.is_numeric():
            raise SdpoError(
                f"{self._place} gives {values.dtype}, not a number. Give a number, higher for harder pairs, "
                "e.g. CASE WHEN truncated THEN 1 ELSE 0 END."
            )
        return values.cast(pl.Float64)

    def _why_not(self, bad: pl.DataFrame, of: int, what: str, value: float | None) -> str:
        """Say which pairs have no difficulty, and what they lack: a second model, ratings, or sense."""
        empty = {column for column in self.columns if bad[column].null_count() and value is None}
        if any(column.startswith("against_") for column in empty):
            return (
                f"{self._place} needs the log-probabilities of a second model, which {bad.height:,} of {of:,} pairs "
                "lack. Name that model in score.against and score again."
            )
        if any(column.startswith("rating_") for column in empty):
            counts = bad["source"].value_counts(sort=True).sort("count", "source", descending=[True, False])
            where = ", ".join(f"{n:,} of source {source!r}" for source, n in counts.rows())
            return (
                f"{self._place} needs the judge's ratings, which {bad.height:,} of {of:,} pairs lack ({where}). "
                "Give their rows rating_chosen and rating_rejected, leave them out, or choose another difficulty."
            )
        shown = "" if value is None else f", where it is {value}"
        return (
            f"{self._place} {what} for {bad.height:,} of {of:,} pairs, e.g. pair_id {bad['pair_id'][0]!r}{shown}. "
            "Mend the expression, leave those pairs out, or choose another difficulty."
        )


DIFFICULTIES: dict[str, Difficulty] = {}


def define(unit: str, *, single_pairs: bool = True) -> Callable[[Callable[[], pl.Expr]], Callable[[], pl.Expr]]:
    """Enter a function that gives an expression as the difficulty of its name; its docstring says its Source."""

    def enter(formula: Callable[[], pl.Expr]) -> Callable[[], pl.Expr]:
        source = " ".join((inspect.getdoc(formula) or "").partition("Source: ")[2].split())
        DIFFICULTIES[formula.__name__] = Difficulty(formula.__name__, formula(), unit, source, single_pairs)
        return formula

    return enter


@define("nats per token")
def margin_per_token() -> pl.Expr:
    """-(chosen_logp / chosen_tokens - rejected_logp / rejected_tokens).

    Less of a length measure than the sum.

    Source: minus the margin of SimPO, arXiv 2405.14734, whose reward is the mean log-probability.
    """
    return -MARGIN_PER_TOKEN


@define("nats")
def logp_margin() -> pl.Expr:
    """-(chosen_logp - rejected_logp) = -gamma: longer chosen answers count as harder.

    Source: gamma of arXiv 2403.19270, section 3, of the model itself.
    """
    return -LOGP_MARGIN


@define("share of pairs", single_pairs=False)
def reward_accuracy() -> pl.Expr:
    """1 where chosen_logp <= rejected_logp, else 0: its mean is 1 - reward accuracy.

    Source: arXiv 2403.19270, section 3.1, read reference-free: the implicit reward of a model
        against itself is 0 for every pair.
    """
    return (LOGP_MARGIN <= 0).cast(pl.Float64)


@define("nats")
def implicit_reward() -> pl.Expr:
    """-((chosen_logp - against_chosen_logp) - (rejected_logp - against_rejected_logp)).

    The reward margin that DPO implies for the model, with the second model as its reference. Its
    factor beta is left out: it changes no order.

    Source: DPO, arXiv 2305.18290, equation 5; as a difficulty arXiv 2508.04149.
    """
    second = pl.col("against_chosen_logp") - pl.col("against_rejected_logp")
    return -(LOGP_MARGIN - second)


@define("points of the judge's scale")
def rating_gap() -> pl.Expr:
    """-(rating_chosen - rating_rejected): a pair whose answers the judge rates far apart is easy.

    Ratings of judges with different scales are not made comparable.

    Source: Curri-DPO, arXiv 2403.07230. Deviation: they order the pairs of one prompt, this all.
    """
    return -(pl.col("rating_chosen") - pl.col("rating_rejected"))


@define("perplexity")
def chosen_perplexity() -> pl.Expr:
    """exp(-chosen_logp / chosen_tokens): how surprising the answer to be learnt is, whatever it is set against.

    Source: perplexity as a measure of data, arXiv 2309.04564. Deviation: theirs is of whole
        documents, this of the chosen answer given its prompt.
    """
    return (-pl.col("chosen_logp") / pl.col("chosen_tokens")).exp()


@define("nats per token")
def risk() -> pl.Expr:
    """|chosen_logp / chosen_tokens - rejected_logp / rejected_tokens|.

    Our reading: BALIGN keeps pairs whose two answers are about equally likely per token, and
    takes the others as risky, whichever of the two the model prefers. So a pair that the model
    already has clearly right is as hard here as one that it has clearly wrong.

    Source: BALIGN, from a description of it: its text was not at hand.
    """
    return MARGIN_PER_TOKEN.abs()


def difficulty_named(name: str) -> Difficulty:
    """Look a definition up; what is not a bare word is read as SQL over the columns of SCORES.

    Raises:
        SdpoError: there is none of that name; the expression cannot be read, names a column that
            is not there, or gives no number per pair.
    """
    if name in DIFFICULTIES:
        return DIFFICULTIES[name]
    close = difflib.get_close_matches(name, DIFFICULTIES, n=1)
    meant = f"Did you mean {close[0]!r}? " if close else ""
    if name.isidentifier():
        raise SdpoError(
            f"partition.difficulty {name!r} is not defined. {meant}There are: {', '.join(DIFFICULTIES)}; "
            f"or an expression over SCORES, e.g. {EXAMPLE}."
        )
    try:
        difficulty = Difficulty(name, pl.sql_expr(name), "units of the expression", "the user's own expression")
    except pl.exceptions.PolarsError as error:
        said = str(error).splitlines()[0]
        raise SdpoError(
            f"partition.difficulty {name!r} is not an expression ({said}). {meant}Write SQL, e.g. {EXAMPLE}."
        ) from None
    unknown = sorted(difficulty.columns - set(SCORES))
    if unknown:
        raise SdpoError(
            f"partition.difficulty {name!r} names {unknown[0]!r}, which SCORES does not have. "
            f"{meant}It has: {', '.join(SCORES)}."
        )
    difficulty._evaluate(_sample_scores())  # before the hour of scoring, not after it
    return difficulty


def _sample_scores() -> pl.DataFrame:
    """Three rows of SCORES, to see what kind of thing an expression gives."""
    rows = {}
    for place, (column, dtype) in enumerate(SCORES.items()):
        sign = -1 if column.endswith("logp") else 1
        rows[column] = pl.Series([sign * (place + row) for row in (1, 2, 4)]).cast(dtype)
    return pl.DataFrame(rows)


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
        summed or per-token margin), each with the ends of its 95 % interval (Wilson's, at the
        effective number of pairs, clustered by prompt); effective_pairs (of reward_accuracy);
        mean_margin (nats), longer_chosen (share of pairs), length_rho (Spearman's, of the margin
        with the token difference; null where one of them does not vary).

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
    columns = [column for name in shares for column in (name, f"{name}_low", f"{name}_high")]
    return (
        accuracies.with_columns(**ends, effective_pairs=effective_size("reward_accuracy"))
        .join(margins, on="source")
        .rename({"n": "pairs", "clusters": "prompts"})
        .select("source", "pairs", "prompts", *columns, "effective_pairs", *margins.columns[1:])
        .sort("reward_accuracy", "source", descending=[True, False])
    )


def unclear_orders(described: pl.DataFrame) -> Iterator[str]:
    """Say of each two neighbours by reward accuracy whose order may be chance, with the p value.

    Args:
        described: of `describe_scores`. Its sources are taken to share no prompts.
    """
    rows = list(described.select("source", "reward_accuracy", "effective_pairs").iter_rows())
    for (easier, *first), (harder, *second) in itertools.pairwise(rows):
        chance = compare_shares((first[0], first[1]), (second[0], second[1]))
        if chance >= 0.05:
            yield (
                f"reward accuracy does not tell {easier} ({first[0]:.3f}) from {harder} ({second[0]:.3f}): p = "
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
    moved = (difficulty.measure(before) - difficulty.measure(again.select(scores.columns))).abs()
    band = moved.quantile(0.95, "linear")
    assert band is not None
    return band, moved.len()


def print_report(scores: pl.DataFrame, definition: str | None = None) -> None:
    """Print what the scores say of each source, which order of sources may be chance, and how definitions agree.

    Args:
        scores: SCORES frame.
        definition: the one in use, when it may be an expression.
    """
    described = describe_scores(scores)
    interval = "{:.3f} [{:.3f}, {:.3f}]".format
    shown = described.with_columns(
        pl.Series(name, [interval(*row) for row in described.select(name, f"{name}_low", f"{name}_high").rows()])
        for name in ("reward_accuracy", "per_token")
    )
    hidden = [name for name in described.columns if name.endswith(("_low", "_high"))]
    title = "reference model on each source: shares with 95 % intervals clustered by prompt; mean margin in nats"
    print_table(shown.drop(*hidden, "effective_pairs"), title)
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
