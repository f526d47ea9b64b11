"""What makes a pair hard for a model: named definitions over SCORES. Higher is harder, always.

A definition is an expression; for a unit larger than a pair its mean is taken. Beside the named
ones, any SQL expression over the columns of SCORES is a definition, or a column of the user's own file.
"""

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from sdpo_data.run import sha256
from sdpo_data.tables import LOGP_MARGIN, MARGIN_PER_TOKEN, SCORES, SdpoError

EXAMPLE = "'abs(chosen_logp - rejected_logp) / prompt_tokens'"
EXTERNAL = re.compile(r"(?P<file>.+\.(parquet|csv)):(?P<column>[^:]+)")


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

    file: Path | None = None
    """Where its values are read from, joined by pair_id; `expression` is then their column there."""

    @property
    def columns(self) -> set[str]:
        """The columns of SCORES that it reads."""
        return {"pair_id"} if self.file else set(self.expression.meta.root_names())

    @property
    def row_by_row(self) -> bool:
        """Whether a pair's value depends on its own row alone; of the user's own SQL that is not known."""
        return self.file is not None or self.name in DIFFICULTIES

    @property
    def fingerprint(self) -> str | None:
        """The content hash of its file; None without one."""
        return sha256(self.file) if self.file else None

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
            rows = self._beside(scores, self.file) if self.file else scores
            values = rows.select(difficulty=self.expression).to_series()
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

    def _beside(self, scores: pl.DataFrame, file: Path) -> pl.DataFrame:
        """Give the file's rows, in the order of `scores`; nulls for pairs it does not have."""
        [column] = self.expression.meta.root_names()
        table = _read_table(file)
        if missing := [name for name in ("pair_id", column) if name not in table.columns]:
            raise SdpoError(
                f"{self._place}: {file} has no column {missing[0]!r}. It has: {', '.join(table.columns)}; it needs "
                f"pair_id and {column}."
            )
        own = table.select(pl.col("pair_id").cast(pl.String), column)
        if (repeated := own.filter(pl.col("pair_id").is_duplicated())).height:
            raise SdpoError(
                f"{self._place}: {file} repeats pair_id {repeated['pair_id'][0]!r}. Give each pair one row there."
            )
        return scores.select("pair_id").join(own, on="pair_id", how="left", maintain_order="left")

    def _why_not(self, bad: pl.DataFrame, of: int, what: str, value: float | None) -> str:
        """Say which pairs have no difficulty, and what they lack: a second model, ratings, or sense."""
        if self.file:
            shown = "no number" if value is None else f"{value}"
            return (
                f"{self._place} has {shown} for {bad.height:,} of {of:,} pairs, e.g. pair_id {bad['pair_id'][0]!r}. "
                f"Add them to {self.file}, or leave those pairs out."
            )
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
    """Look a definition up: its name, FILE.parquet:COLUMN (or .csv), a column of SCORES, or SQL over them.

    Raises:
        SdpoError: there is none of that name, or no such file; the expression cannot be read, names
            a column that is not there, or gives no number per pair.
    """
    if name in DIFFICULTIES:
        return DIFFICULTIES[name]
    if external := EXTERNAL.fullmatch(name):
        file = Path(external["file"])
        if not file.is_file():
            raise SdpoError(f"partition.difficulty {name!r}: there is no file {file}. Write FILE.parquet:COLUMN.")
        return Difficulty(name, pl.col(external["column"]), f"units of {file.name}", "the user's own file", file=file)
    close = difflib.get_close_matches(name, DIFFICULTIES, n=1)
    meant = f"Did you mean {close[0]!r}? " if close else ""
    if name.isidentifier() and name not in SCORES:
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


def _read_table(file: Path) -> pl.DataFrame:
    try:
        return pl.read_csv(file, infer_schema_length=None) if file.suffix == ".csv" else pl.read_parquet(file)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise SdpoError(f"{file} cannot be read ({str(error).splitlines()[0]}).") from None


def _sample_scores() -> pl.DataFrame:
    """Three rows of SCORES, to see what kind of thing an expression gives."""
    rows = {}
    for place, (column, dtype) in enumerate(SCORES.items()):
        sign = -1 if column.endswith("logp") else 1
        rows[column] = pl.Series([sign * (place + row) for row in (1, 2, 4)]).cast(dtype)
    return pl.DataFrame(rows)
