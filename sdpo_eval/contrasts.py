"""Contrasts: what two models, or two arms, answer differently over the questions that both were asked."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl
import pydantic

from sdpo_data.config import Settings
from sdpo_data.tables import SdpoError
from sdpo_eval.clean import Clean
from sdpo_eval.h4 import MEAN, TASKS
from sdpo_eval.margins import HELD_OUT
from sdpo_eval.stats import (
    ENOUGH_SEEDS,
    RESAMPLES,
    Differences,
    compare_checkpoints,
    compare_methods,
    holm,
    judge,
    mcnemar,
    questions_needed,
)

TITLES = {name: task.title for name, task in TASKS.items()} | {MEAN: "H4", HELD_OUT: "held-out accuracy"}
"""What to call what models are compared by."""
CHECKPOINTS = "these checkpoints"
METHODS = "these methods"
CONTRASTS = pl.Schema(
    {  # one row per verdict, task and metric
        "verdict_on": pl.String,  # CHECKPOINTS: would other questions say the same; METHODS: other seeds too
        "first": pl.String,
        "second": pl.String,
        "task": pl.String,  # "h4" for the mean of the four; "held_out" for held-out pairs
        "metric": pl.String,  # one of METRICS
        "subset": pl.String,  # all questions, or the clean ones
        "effect": pl.Float64,  # first - second
        "stderr": pl.Float64,  # null, as low, high and p, where nothing varies
        "low": pl.Float64,  # of the 95 % interval, not adjusted for looking at several
        "high": pl.Float64,
        "n": pl.Int64,  # questions that both answered
        "seeds": pl.Int64,
        "p": pl.Float64,
        "p_holm": pl.Float64,  # adjusted over the secondary contrasts; the primary one's is p
        "primary": pl.Boolean,
        "verdict": pl.String,  # better, worse, not distinguishable; by p_holm
        "detectable": pl.Float64,  # smallest true difference found with 80 % power, unit of effect
        "n_for_1_point": pl.Int64,  # questions that tell 1 point with 80 % power; checkpoints only
        "only_first": pl.Int64,  # questions that only the first gets right
        "only_second": pl.Int64,
        "p_mcnemar": pl.Float64,  # where a task's score is a plain share of right answers to independent questions
    }
)
METRICS = {
    "score": 100 * pl.col("score"),  # points
    "gold_logp": pl.col("gold_logp"),  # nats
    "logp_margin": pl.col("logp_margin"),  # nats
    "choice_margin": 100 * pl.col("margin"),  # points
}
"""Metric -> what is subtracted of one question, in the unit of CONTRASTS.effect: see `_valued`."""
FEWER_RESAMPLES = 2_000  # for metrics beside the score, whose values are all different and slow to draw
QUESTION = ["protocol", "task", "item_id"]


class CompareConfig(Settings):
    primary: str = "sdpo - dpo"
    """The one contrast named beforehand, "ARM - ARM": it alone is not adjusted for looking at several."""
    primary_task: str = MEAN
    """What the primary contrast is judged by: h4, one of its tasks, or held_out, the accuracy on held-out pairs."""

    @pydantic.field_validator("primary")
    @classmethod
    def _two_arms(cls, value: str) -> str:
        if len(value.split(" - ")) != 2:
            raise ValueError("write two arms with ' - ' between them, such as 'sdpo - dpo'")
        return value


@dataclass(frozen=True)
class Side:
    """One side of a contrast: a model, or the models of an arm, one per seed."""

    name: str
    arm: str
    items: pl.DataFrame
    """ITEMS of its models."""

    @property
    def models(self) -> list[tuple[int, str]]:
        """(seed, model key), by seed."""
        return self.items.select("seed", "model_key").unique().sort("seed").rows()

    def of(self, seed: int) -> "Side":
        """Give one seed's model, named by it where there are others."""
        name = f"{self.name} seed {seed}" if len(self.models) > 1 else self.name
        return Side(name, self.arm, self.items.filter(seed=seed))

    def only(self, clean: "Sequence[Clean]") -> "Side":
        """Give the same models with the questions that are clean for all who say so."""
        items = self.items
        for one in clean:
            items = one.keep(items)
        return Side(self.name, self.arm, items)


def choose_models(items: pl.DataFrame, arm: str, seed: int | None = None, step: int | None = None) -> Side:
    """Take an arm's models as one side: of every seed the last step, or of one seed or step alone.

    Args:
        items: ITEMS frame.

    Raises:
        SdpoError: no such model has answered anything; the seeds' last steps differ.
    """
    found = items.filter(pl.col("arm") == arm)
    for name, value in (("seed", seed), ("step", step)):
        found = found if value is None else found.filter(pl.col(name) == value)
    if found.is_empty():
        models = items.select("arm", "seed", "step").unique().sort("arm", "seed", "step").rows()
        known = ", ".join("/".join(map(str, row)) for row in models)
        wanted = "/".join(str(part) for part in (arm, seed, step) if part is not None)
        raise SdpoError(f"No answers of {wanted}. There are, as arm/seed/step: {known or 'none'}.")
    lasts = found.group_by("seed").agg(pl.col("step").max())
    if lasts["step"].n_unique() > 1:
        steps = ", ".join(f"seed {one}: step {last}" for one, last in lasts.sort("seed").rows())
        raise SdpoError(f"The seeds of {arm} do not end at the same step ({steps}). Name one: {arm}/SEED/STEP.")
    last = lasts["step"][0]
    return Side(f"{arm} step {last}" if last else arm, arm, found.filter(step=last))


def contrast_models(
    pairs: Iterable[tuple[Side, Side]],
    config: CompareConfig | None = None,
    metrics: Sequence[str] = ("score",),
    clean: Sequence[Clean] = (),
) -> pl.DataFrame:
    """Contrast the first of each pair with the second, on every task that both answered, and on H4.

    Seeds are paired by number; a side of one model meets every seed of the other. Each pair of
    models gives a verdict on these checkpoints; at least ENOUGH_SEEDS pairs of different
    weights give one on the methods as well. p-values are adjusted (Holm) over the contrasts of one
    kind, metric and subset, but for the primary one, if it is one row: with several seeds
    the primary verdict is the one on the methods.

    Questions of one cluster, such as HellaSwag's from one source document (8,407 of 10,042 questions), are
    one draw.

    Args:
        metrics: of METRICS.
        clean: what the runs of the sides say is clean, where they do; a question is if it is for all of them.

    Returns:
        CONTRASTS frame: H4 first, then tasks in the order of TASKS; all questions, then the clean ones.

    Raises:
        SdpoError: two sides were asked under different protocols, or share no seed or question.
    """
    config = config or CompareConfig()
    rows = [row for pair in pairs for metric in metrics for row in _contrast(*pair, metric, clean)]
    wanted = (*config.primary.split(" - "), config.primary_task, "score")
    for row in rows:
        row["primary"] = (*row.pop("arms"), row["task"], row["metric"]) == wanted
    table = pl.DataFrame(rows, CONTRASTS)
    family = ["verdict_on", "metric", "subset"]
    table = table.with_columns(primary=pl.col("primary") & (pl.col("primary").sum().over(family) == 1))
    parts = [_adjusted(part) for _, part in table.group_by(family, maintain_order=True)]
    return pl.concat([table.clear(), *parts]).sort("subset", pl.col("task") != MEAN, maintain_order=True)


def _adjusted(family: pl.DataFrame) -> pl.DataFrame:
    """Fill in p_holm and the verdict; where nothing varies there is no p, and it counts as 1."""
    p = family["p"].fill_null(1.0).to_list()
    secondary = [place for place, primary in enumerate(family["primary"]) if not primary]
    adjusted = list(p)
    for place, value in zip(secondary, holm([p[place] for place in secondary]), strict=True):
        adjusted[place] = value
    verdicts = [judge(effect, value) for effect, value in zip(family["effect"], adjusted, strict=True)]
    return family.with_columns(
        p_holm=pl.Series(adjusted, dtype=pl.Float64), verdict=pl.Series(verdicts, dtype=pl.String)
    )


def tell_kind(contrasts: pl.DataFrame) -> str:
    """Say in words what the verdicts are on: these checkpoints, or the methods behind them as well."""
    methods = contrasts.filter(verdict_on=METHODS)
    if methods.height:
        return (
            f"Verdicts on these methods cross at least {methods['seeds'].min()} seeds with the questions; those on "
            "these checkpoints would hold for other questions, not for other seeds."
        )
    return (
        "These verdicts are on these checkpoints, not on the methods behind them: that takes at least "
        f"{ENOUGH_SEEDS} seeds per arm, of different weights."
    )


def refuse_other_protocols(first: Side, second: Side) -> None:
    """Raise where a task was put to both under more than one protocol.

    Raises:
        SdpoError: that is so; with the protocols.
    """
    asked = [dict(side.items.group_by("task").agg(pl.col("protocol").unique()).rows()) for side in (first, second)]
    for task in sorted(asked[0].keys() & asked[1].keys()):
        one, two = (sorted(protocols[task]) for protocols in asked)
        if len({*one, *two}) > 1:
            raise SdpoError(
                f"{first.name} answered {task} under {' and '.join(one)}, {second.name} under {' and '.join(two)}: "
                "other questions, which are not compared. Evaluate both with one eval.protocol, dtype and documents."
            )


def pair_seeds(first: Side, second: Side) -> list[tuple[Side, Side]]:
    """Pair two sides' models by seed; a side of one model meets every seed of the other.

    Raises:
        SdpoError: both have several seeds, and none in common.
    """
    ones, twos = ([seed for seed, _ in side.models] for side in (first, second))
    if len(ones) > 1 and len(twos) > 1:
        shared = [seed for seed in ones if seed in twos]
        if not shared:
            raise SdpoError(f"{first.name} has the seeds {ones}, {second.name} {twos}: none in common to be paired.")
        return [(first.of(seed), second.of(seed)) for seed in shared]
    return [(first.of(one), second.of(two)) for one in ones for two in twos]


def pair_questions(
    pairs: Sequence[tuple[Side, Side]], metric: str = "score"
) -> dict[str, tuple[pl.DataFrame, Differences]]:
    """Subtract the answers of pairs of models on the questions that all of them have an answer to.

    Returns:
        task -> its questions, in the order of the differences: protocol, task, item_id, subject and
        what the first pair's models got right (first_correct, second_correct); and the
        differences, a row per pair. Tasks are in the order of TASKS; one without a shared question is left out.
    """
    frames = []
    for number, (first, second) in enumerate(pairs):
        one, two = (_valued(side.items, metric) for side in (first, second))
        both = one.join(two.select(*QUESTION, other="value", second_correct="correct"), on=QUESTION)
        frames.append(both.with_columns(pl.col("value") - pl.col("other"), pair=pl.lit(number)))
    answered = pl.concat(frames).rename({"correct": "first_correct"}).drop_nulls("value")
    shared = answered.filter(pl.len().over(QUESTION) == len(pairs)).sort(*QUESTION, "pair")
    found = {}
    for task in [*TASKS, *sorted(set(shared["task"]) - set(TASKS))]:
        own = shared.filter(task=task)
        if own.height:
            asked = own.filter(pair=0)
            values = own["value"].to_numpy().reshape(asked.height, len(pairs)).T
            found[task] = asked, Differences.of(values, asked["subject"].to_numpy(), asked["cluster"].to_numpy())
    return found


def _valued(items: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Give each question's value of a metric, and the cluster it belongs to.

    logp_margin is by how much the right choice is likelier than the best wrong one (gamma, of a held-out pair), the
    margin how much more of the choices' probability it has; null where there are several right ones (mc2).
    """
    logps = pl.col("choice_logps")
    best, next_best = logps.list.max(), logps.list.sort(descending=True).list.get(1, null_on_oob=True)
    wrong = pl.when(pl.col("gold_logp") == best).then(next_best).otherwise(best)
    whole = logps.list.eval((pl.element() - pl.element().max()).exp()).list.sum()
    margin = ((pl.col("gold_logp") - best).exp() - (wrong - best).exp()) / whole
    one_right = pl.when(pl.col("correct").is_not_null())
    margins = {"margin": one_right.then(margin), "logp_margin": one_right.then(pl.col("gold_logp") - wrong)}
    return items.with_columns(**margins).select(*QUESTION, "subject", "correct", "cluster", value=METRICS[metric])


def _contrast(first: Side, second: Side, metric: str, clean: Sequence[Clean]) -> Iterator[dict[str, Any]]:
    refuse_other_protocols(first, second)
    pairs = pair_seeds(first, second)
    drawn = {(one.models[0][1], two.models[0][1]): (one, two) for one, two in pairs}  # equal weights are one draw
    for subset in ("all", "clean") if clean else ("all",):
        known = clean if subset == "clean" else ()
        for one, two in pairs:
            yield from _rows(CHECKPOINTS, one, two, [(one, two)], metric, known)
        if len(drawn) >= ENOUGH_SEEDS:
            yield from _rows(METHODS, first, second, list(drawn.values()), metric, known)


def _rows(
    kind: str, first: Side, second: Side, pairs: list[tuple[Side, Side]], metric: str, clean: Sequence[Clean]
) -> Iterator[dict[str, Any]]:
    """Give the rows of CONTRASTS of one pair of models or of arms, without p_holm and verdict."""
    asked = pair_questions([(one.only(clean), two) for one, two in pairs], metric)
    if not asked and metric == "score" and not clean:
        raise SdpoError(f"{first.name} and {second.name} have no answered question in common. Evaluate both alike.")
    groups = {task: [task] for task in asked}
    if metric == "score" and TASKS.keys() <= asked.keys():
        groups[MEAN] = list(TASKS)
    for task, parts in groups.items():
        differences = [asked[part][1] for part in parts]
        if kind == METHODS:
            effect = compare_methods(differences)
        else:
            effect = compare_checkpoints(differences, resamples=RESAMPLES if metric == "score" else FEWER_RESAMPLES)
        row = {"verdict_on": kind, "first": first.name, "second": second.name, "task": task, "metric": metric}
        row["subset"] = "clean" if clean else "all"
        row |= {"arms": (first.arm, second.arm), "effect": effect.value} | asdict(effect)
        if kind == CHECKPOINTS and metric == "score":
            row |= _counts([asked[part][0] for part in parts])
            row["n_for_1_point"] = effect.stderr and questions_needed(effect.stderr, effect.n, 1.0)
        del row["value"]
        yield row


def _counts(asked: list[pl.DataFrame]) -> dict[str, Any]:
    """Count the questions that one of two models alone gets right; test the counts where they are the score."""
    right = pl.concat(asked).drop_nulls(["first_correct", "second_correct"])
    if right.is_empty():
        return {}
    up, down = (
        right.filter(pl.col("first_correct") * sign > pl.col("second_correct") * sign).height for sign in (1, -1)
    )
    alone = right["cluster"].n_unique() == right.height  # McNemar's test takes questions as independent draws
    plain = len(asked) == 1 and right["subject"].n_unique() == 1 and alone
    return {"only_first": up, "only_second": down, "p_mcnemar": mcnemar(up, down) if plain else None}
