"""How the models of a run compare: the verdict in words, and the H4 tables and figures under it."""

import shlex
from collections.abc import Iterator
from typing import Any

import polars as pl

from sdpo_eval import plots
from sdpo_eval.blocks import Block, Drawing, Estimate, Missing, Prose, Table
from sdpo_eval.contrasts import METHODS, tell_kind
from sdpo_eval.evidence import UNIT, Evidence, Model, comparable_results, find_base, find_lasts
from sdpo_eval.h4 import MEAN, TASKS

TITLES = {name: task.title for name, task in TASKS.items()} | {MEAN: "H4"}
ENOUGH_QUESTIONS = 500  # with fewer, a task's standard error is above 2 points


def tell_verdict(evidence: Evidence) -> Iterator[Block]:
    """Say what every arm's last model scores and whether that differs from the base model; H4 if there is one."""
    if evidence.results.is_empty():
        yield Prose("No model of this run has been evaluated yet, so there is no verdict.")
        yield name_command(evidence, "H4 of the base model and of every step is missing", "sdpo_eval")
        return
    results = comparable_results(evidence.results)
    yield from _say_limits(results)
    missing = [task.title for name, task in TASKS.items() if name not in results["task"]]
    if missing:
        what = f"There is no H4, the mean of all four tasks, without {' and '.join(missing)}"
        yield name_command(evidence, what, "sdpo_eval", "--truthfulqa FILE" if "TruthfulQA" in missing else "")
    spoken = [MEAN] if MEAN in results["task"] else [name for name in TASKS if name in results["task"]]
    for task in spoken:
        models = [model for model in (find_base(results), *find_lasts(results)) if model]
        scores = [f"{_called(model, results)} {score}" for model in models if (score := _score(results, model, task))]
        yield Prose(f"{TITLES[task]}: {', '.join(scores)}.")
    yield from _tell_contrasts(evidence, spoken)


def _tell_contrasts(evidence: Evidence, tasks: list[str]) -> Iterator[Prose]:
    """Say each contrast's verdict: the one on the methods where there is one, else the checkpoints'."""
    contrasts = evidence.contrasts
    if contrasts.is_empty():
        return
    best = pl.col("verdict_on").eq(METHODS) | ~pl.lit(METHODS in contrasts["verdict_on"])
    told: dict[str, list[str]] = {}
    for row in contrasts.filter(best, pl.col("task").is_in(tasks)).iter_rows(named=True):
        difference = as_difference(row)
        interval = f" {difference.interval_shown}" if difference.interval else ""
        said = f"{TITLES[row['task']]} {difference.number}{interval}, {row['verdict']}"
        told.setdefault(f"{name_contrast(row)} ({row['verdict_on']})", []).append(said)
    for contrast, said in told.items():
        yield Prose(f"{contrast}, over the same questions: {'; '.join(said)}.")
    yield Prose(tell_kind(contrasts))
    config = evidence.compare
    wanted = f"{config.primary} by {TITLES.get(config.primary_task, config.primary_task)}"
    if contrasts["primary"].any():
        yield Prose(f"The primary contrast is {wanted}; the verdicts of all others are adjusted for being several.")
    else:
        yield Prose(f"All verdicts are adjusted for being several; {wanted}, the primary one, is not among them once.")


def tell_h4(evidence: Evidence) -> Iterator[Block]:
    """Show every model's score on every task, and what differs from the base model."""
    results = comparable_results(evidence.results)
    if results.is_empty():
        return
    if MEAN in results["task"]:
        yield Drawing("h4", lambda: plots.plot_h4(results))
    chance = {name: task.chance for name, task in TASKS.items()}
    yield Drawing("tasks", lambda: plots.plot_tasks(results, chance, TITLES))
    yield Table("scores", "Points of 100 ± standard error (n questions)", _score_rows(results))
    rows = [_contrast_row(row) for row in evidence.contrasts.iter_rows(named=True)]
    if rows:
        title = "Differences over the same questions, in points; verdicts are adjusted for being several, intervals not"
        yield Table("contrasts", title, rows)
    clean = comparable_results(evidence.results, "clean")
    if clean.height:
        yield Table(
            "clean_scores", "The same, without the questions that the training pairs give away", _score_rows(clean)
        )
    protocols = results.filter(pl.col("task") != MEAN).select("task", "protocol").unique(maintain_order=True)
    asked = ", ".join(f"{TITLES[task]} {protocol}" for task, protocol in protocols.rows())
    yield Prose(f"Protocols: {asked}. Scores under another protocol answer another question.")
    others = evidence.results.filter(subset="all").join(results, on=["task", "protocol"], how="anti")
    if others.height:
        text = f"Left out of the table: {others.height} scores under other protocols, which results.parquet holds."
        yield Prose(text, loud=True)


def name_command(evidence: Evidence, what: str, module: str, flags: str = "") -> Missing:
    """Say what is missing and which command adds it."""
    return Missing(f"{what}. This adds it:", f"python -m {module} {shlex.quote(str(evidence.path))} {flags}".strip())


def _say_limits(results: pl.DataFrame) -> Iterator[Prose]:
    tasks = (
        results.filter(pl.col("task") != MEAN).group_by("task", maintain_order=True).agg(pl.col("n", "n_full").max())
    )
    counts = ", ".join(f"{TITLES[task]} {n:,} of {full:,}" for task, n, full in tasks.rows())
    if any(n < min(ENOUGH_QUESTIONS, full) for _, n, full in tasks.rows()):
        scores = "H4 decides" if MEAN in results["task"] else "scores decide"
        yield Prose(
            f"Wiring run: it shows that the chain works; its {scores} nothing. Questions asked: {counts}.", loud=True
        )
    elif any(n < full for _, n, full in tasks.rows()):
        yield Prose(f"Limited run. Questions asked: {counts}.", loud=True)


def _score_rows(results: pl.DataFrame) -> list[dict[str, Any]]:
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


def as_difference(row: dict[str, Any]) -> Estimate:
    """Give a row's effect with its error; the interval is that of the test, which need not lie evenly about it."""
    ends = None if row["low"] is None else (row["low"], row["high"])
    return Estimate(row["effect"], row["stderr"], row["n"], digits=2, signed=True, ends=ends)


def _contrast_row(row: dict[str, Any]) -> dict[str, Any]:
    difference = as_difference(row)
    return {
        "contrast": name_contrast(row), "verdict_on": row["verdict_on"], "task": TITLES.get(row["task"], row["task"]),
        "difference": difference, "95_%_interval": difference.interval_shown, "seeds": row["seeds"],
        "p_adjusted": round(row["p_holm"], 4), "verdict": row["verdict"],
        "found_with_80_%": None if row["detectable"] is None else f"{row['detectable']:.2f}",
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
