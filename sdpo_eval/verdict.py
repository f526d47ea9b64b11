"""How the models of a run compare: the verdict in words, and the H4 tables and figures under it."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

import polars as pl

from sdpo_data.tables import UNIT
from sdpo_eval import plots
from sdpo_eval.arms import say_effects
from sdpo_eval.blocks import Block, Drawing, Estimate, Heading, Missing, Prose, Table
from sdpo_eval.contrasts import CHECKPOINTS, METHODS, TITLES, CompareConfig, tell_kind
from sdpo_eval.evidence import Evidence, Model, comparable_results, find_base, find_lasts
from sdpo_eval.h4 import MEAN, TASKS
from sdpo_eval.margins import HELD_OUT, summarise_margins
from sdpo_eval.published import TABLE_2
from sdpo_eval.stats import ALPHA, UNDECIDED

ENOUGH_QUESTIONS = 500  # with fewer, a task's standard error is above 2 points
MOST_TOLD = 4  # contrasts in the first sentence of the verdict; half of it in the second


def tell_verdict(evidence: Evidence) -> Iterator[Block]:
    """Say in two sentences how sDPO stands against the other way and against the base model; then what limits that."""
    results = comparable_results(evidence.results)
    spoken = [MEAN] if MEAN in results["task"] else [name for name in TASKS if name in results["task"]]
    if evidence.compare.primary_task in evidence.answers["task"]:  # what was named beforehand is said first
        spoken = list(dict.fromkeys([evidence.compare.primary_task, *spoken]))
    if not spoken:
        yield Prose("No model of this run has been evaluated yet, so there is no verdict.", lead=True)
    for sentence in _say_contrasts(evidence, spoken):
        yield Prose(sentence, lead=True)
    if evidence.results.is_empty():
        yield name_command(evidence, "H4 of the base model and of every step is missing", "sdpo_eval")
    yield from _say_limits(results)
    missing = [task.title for name, task in TASKS.items() if name not in results["task"]]
    if missing and results.height:
        what = f"There is no H4, the mean of all four tasks, without {' and '.join(missing)}"
        yield name_command(evidence, what, "sdpo_eval", "--truthfulqa FILE" if "TruthfulQA" in missing else "")
    for task in spoken:
        models = [model for model in (find_base(results), *find_lasts(results)) if model]
        scores = [f"{_called(model, results)} {score}" for model in models if (score := _score(results, model, task))]
        if task == HELD_OUT:
            scores = _say_accuracies(evidence)
        yield Prose(f"{TITLES.get(task, task)}: {', '.join(scores)}.")
    if evidence.contrasts.height:
        yield Prose(f"{tell_kind(evidence.contrasts)} {_say_primary(evidence)}")
        judged = best_verdicts(evidence.contrasts).filter(task=evidence.compare.primary_task)
        if judged.height > 1:
            title = TITLES.get(evidence.compare.primary_task, evidence.compare.primary_task)
            named = judged.with_columns(contrast=pl.format("{} − {}", "first", "second"))
            yield Drawing("contrasts", lambda: plots.plot_contrasts(named, title))
    yield from say_factorial(evidence)


def _say_accuracies(evidence: Evidence) -> list[str]:
    """Say of every arm's last models which share of the held-out pairs they get right; over the seeds, its mean."""
    lasts = [model for model in (find_base(evidence.answers), *find_lasts(evidence.answers)) if model]
    wanted = pl.DataFrame(lasts, {name: evidence.answers.schema[name] for name in UNIT}, orient="row")
    measured = summarise_margins(evidence.held_out_scores.join(wanted, on=UNIT, how="semi"), UNIT)
    said = []
    for (arm,), own in measured.sort(UNIT).group_by("arm", maintain_order=True):
        if own.height == 1:
            score = Estimate(own["accuracy"][0], own["accuracy_stderr"][0], own["n"][0])
            said.append(f"{arm} {score}")
        else:
            low, high = own["accuracy"].min(), own["accuracy"].max()
            said.append(f"{arm} {own['accuracy'].mean():.1f} (of {own.height} seeds, {low:.1f} to {high:.1f})")
    return said


def say_factorial(evidence: Evidence, opening: str = "The") -> Iterator[Prose]:
    """Say what order and reference do, each averaged over the other, by what decides.

    Args:
        opening: of the sentence; of several runs with the run's name.
    """
    if evidence.factorial.is_empty():
        return
    task = primary_task(evidence.factorial, evidence.compare)
    shown = best_verdicts(evidence.factorial).filter(task=task)
    said = [
        f"{row['effect_of']} ({row['first']} − {row['second']}) {as_difference(row, digits=1).number}, {row['verdict']}"
        for row in shown.iter_rows(named=True)
    ]
    if len(said) > MOST_TOLD:  # a row per effect and seed
        decided = shown.filter(pl.col("verdict") != UNDECIDED).height
        said = [*say_effects(shown), f"{decided or 'none'} of these {shown.height} can be told from 0"]
    yield Prose(
        f"{opening} core factorial, points of {TITLES.get(task, task)}: {'; '.join(said)}. Adjusted among themselves."
    )


def primary_task(contrasts: pl.DataFrame, config: CompareConfig) -> str:
    """Name the task that decides: the one named beforehand where it was asked, else H4, else the first there is."""
    asked = contrasts["task"].unique(maintain_order=True).to_list()
    return next((task for task in (config.primary_task, MEAN) if task in asked), asked[0])


def best_verdicts(contrasts: pl.DataFrame) -> pl.DataFrame:
    """Keep, task by task, the verdicts on the methods where there are any, else those on the checkpoints."""
    on_methods = pl.col("verdict_on") == METHODS
    return contrasts.filter(on_methods | ~on_methods.any().over("task"), metric="score", subset="all")


def _say_contrasts(evidence: Evidence, tasks: list[str]) -> Iterator[str]:
    """Say the contrast between two arms that was named beforehand, then those against the base model."""
    contrasts = evidence.contrasts
    if contrasts.is_empty():
        return
    order = pl.col("task").replace_strict({task: place for place, task in enumerate(tasks)}, return_dtype=pl.Int64)
    judged = best_verdicts(contrasts).filter(pl.col("task").is_in(tasks)).sort(order, maintain_order=True)
    base = pl.col("second").str.contains(r"(^|: )base$")
    first, second = evidence.compare.primary.split(" - ")
    named = [
        pl.col(side).str.contains(rf"(^|: ){re.escape(arm)}( |$)")
        for side, arm in (("first", first), ("second", second))
    ]
    for rows, most in ((judged.filter(*named, ~base), MOST_TOLD), (judged.filter(base), MOST_TOLD // 2)):
        if rows.height:
            told: dict[str, list[str]] = {}
            for row in rows.head(most).iter_rows(named=True):
                told.setdefault(f"{row['first']} against {row['second']}", []).append(_say_contrast(row))
            others = f" {rows.height - most} more stand in the table." if rows.height > most else ""
            sentences = [f"{who}: {', '.join(said)}" for who, said in told.items()]
            yield f"{'; '.join(sentences)}.{others}"


def _say_contrast(row: dict[str, Any]) -> str:
    difference = as_difference(row, digits=1)
    adjusted = row["p"] is not None and row["p"] < ALPHA <= row["p_holm"]
    said = f"{row['verdict']}{' once adjusted for being several,' if adjusted else ''}"
    return f"{difference.number} {TITLES.get(row['task'], row['task'])}, {said} at n = {row['n']:,}"


def _say_primary(evidence: Evidence) -> str:
    config = evidence.compare
    wanted = f"{config.primary} by {TITLES.get(config.primary_task, config.primary_task)}"
    if evidence.contrasts["primary"].any():
        return f"The primary contrast is {wanted}; the verdicts of all others are adjusted for being several."
    return f"All verdicts are adjusted for being several; {wanted}, the primary one, cannot be had from this run."


def tell_h4(evidence: Evidence) -> Iterator[Block]:
    """Show every model's score on every task, what differs from the base model, and the paper's own numbers."""
    results = comparable_results(evidence.results)
    if results.is_empty():
        return
    chance = {name: task.chance for name, task in TASKS.items()}
    if MEAN in results["task"]:
        yield Drawing("h4", lambda: plots.plot_h4(results, sum(chance.values()) / len(chance)))
    of_h4 = results.filter(pl.col("task").is_in([*TASKS, MEAN]))
    if of_h4.height:
        yield Drawing("tasks", lambda: plots.plot_tasks(of_h4, chance, TITLES))
        yield Table("scores", "Points of 100 ± standard error (n questions)", score_rows(of_h4))
    beside = [
        {"model": _called((row["arm"], row["seed"], row["step"]), results), "task": row["task"]}
        | {"metric": row["metric"], "score": Estimate(row["value"], row["stderr"], row["n"])}
        for row in results.join(of_h4, on="task", how="anti", maintain_order="left").iter_rows(named=True)
    ]
    if beside:
        yield Table("other_tasks", "Tasks beside H4, in no mean ± standard error (n questions)", beside)
    yield from _contrast_tables(evidence)
    protocols = results.filter(pl.col("task") != MEAN).select("task", "protocol").unique(maintain_order=True)
    asked = ", ".join(f"{TITLES.get(task, task)} {protocol}" for task, protocol in protocols.rows())
    yield Prose(f"Protocols: {asked}. Scores under another protocol answer another question.")
    others = evidence.results.filter(subset="all").join(results, on=["task", "protocol"], how="anti")
    if others.height:
        text = f"Left out of the table: {others.height} scores under other protocols, which results.parquet holds."
        yield Prose(text, loud=True)
    if MEAN in results["task"]:
        yield Heading("The paper's numbers, for scale")
        yield Drawing("paper_scale", lambda: plots.plot_paper_scale(_beside_the_paper(results)))
        rows = [{TITLES.get(name, name): value for name, value in row.items()} for row in TABLE_2.iter_rows(named=True)]
        yield Table("paper", "Table 2 of arXiv 2403.19270, as printed, without standard errors", rows, folded=True)


def _contrast_tables(evidence: Evidence) -> Iterator[Table]:
    """Show the contrasts that decide at once, all others folded; of one kind of verdict it stands in the title."""
    contrasts, task = evidence.contrasts, evidence.compare.primary_task
    if task not in contrasts["task"]:
        task = MEAN
    deciding = best_verdicts(contrasts.filter(task=task)).select("first", "second", "verdict_on").rows()
    kinds = contrasts["verdict_on"].unique().to_list()
    on = f" on {kinds[0]}" if len(kinds) == 1 else ""
    hidden = {"verdict_on", "seeds"} if kinds == [CHECKPOINTS] else set()
    title = (
        f"Differences over the same questions, points with 95 % intervals; verdicts{on} are adjusted for being several"
    )
    rows = [
        (row["task"] == task and (row["first"], row["second"], row["verdict_on"]) in deciding, contrast_row(row))
        for row in contrasts.iter_rows(named=True)
    ]
    shown = [
        [{k: v for k, v in row.items() if k not in hidden} for mean, row in rows if mean == which]
        for which in (True, False)
    ]
    if shown[0]:
        yield Table("contrasts", title, shown[0])
    if shown[1]:
        others = f"{title}: all others" if shown[0] else title
        yield Table("task_contrasts", others, shown[1], folded=bool(shown[0]))


def _beside_the_paper(results: pl.DataFrame) -> pl.DataFrame:
    paper = TABLE_2.select("model", of=pl.lit("the paper"), h4=pl.col(MEAN), stderr=pl.lit(None, pl.Float64))
    models = [model for model in (find_base(results), *find_lasts(results)) if model]
    own = [
        (_called(model, results), "this run", score.value, score.stderr)
        for model in models
        if (score := _score(results, model, MEAN))
    ]
    return pl.concat([pl.DataFrame(own, paper.schema, orient="row"), paper])


def name_command(evidence: Evidence, what: str, module: str, flags: str = "") -> Missing:
    """Say what is missing and which command adds it."""
    return Missing(f"{what}. This adds it:", f"python -m {module} {shlex.quote(str(evidence.path))} {flags}".strip())


def _say_limits(results: pl.DataFrame) -> Iterator[Prose]:
    tasks = (
        results.filter(pl.col("task").is_in(list(TASKS)))
        .group_by("task", maintain_order=True)
        .agg(pl.col("n", "n_full").max())
    )
    counts = ", ".join(f"{TITLES.get(task, task)} {n:,} of {full:,}" for task, n, full in tasks.rows())
    if any(n < min(ENOUGH_QUESTIONS, full) for _, n, full in tasks.rows()):
        scores = "H4 decides" if MEAN in results["task"] else "scores decide"
        yield Prose(
            f"Wiring run: it shows that the chain works; its {scores} nothing. Questions asked: {counts}.", loud=True
        )
    elif any(n < full for _, n, full in tasks.rows()):
        yield Prose(f"Limited run. Questions asked: {counts}.", loud=True)


def score_rows(results: pl.DataFrame) -> list[dict[str, Any]]:
    """Lay RESULTS of one subset out: a row per model, a column per task, and what guessing scores."""
    tasks = [name for name in (*TASKS, MEAN) if name in results["task"]]
    rows = [
        {"model": _called(model, results)} | {TITLES[task]: _score(results, model, task) for task in tasks}
        for model in dict.fromkeys(results.select(UNIT).rows())
    ]
    chance = {TITLES[task]: f"{TASKS[task].chance:.1f}" if task in TASKS else None for task in tasks}
    return [*rows, {"model": "guessing"} | chance]


def name_contrast(row: dict[str, Any]) -> str:
    """Name a row of CONTRASTS, or another that has first and second."""
    return f"{row['first']} − {row['second']}"


def as_difference(row: dict[str, Any], digits: int = 2) -> Estimate:
    """Give a row's effect with its error; the interval is that of the test, which need not lie evenly about it."""
    ends = None if row["low"] is None else (row["low"], row["high"])
    return Estimate(row["effect"], row["stderr"], row["n"], digits=digits, signed=True, ends=ends)


def contrast_row(row: dict[str, Any]) -> dict[str, Any]:
    """Give a row of CONTRASTS as the cells of a table."""
    return {
        "contrast": name_contrast(row), "verdict_on": row["verdict_on"], "task": TITLES.get(row["task"], row["task"]),
        "difference": as_difference(row), "verdict": row["verdict"], "p_adjusted": round(row["p_holm"], 4),
        "seeds": row["seeds"], "found_with_80_%": row["detectable"] and Estimate(row["detectable"], digits=2),
        "questions_for_1_point": row["n_for_1_point"],
    }  # fmt: skip


def _called(model: Model, results: pl.DataFrame) -> str:
    arm, seed, step = model
    seeds = f" seed {seed}" if results["seed"].n_unique() > 1 and step else ""
    return f"{arm}{seeds}{f' step {step}' if step else ''}"


def _score(results: pl.DataFrame, model: Model, task: str) -> Estimate | None:
    arm, seed, step = model
    rows = results.filter(arm=arm, seed=seed, step=step, task=task).select("value", "stderr", "n").rows()
    return Estimate(*rows[0]) if rows else None
