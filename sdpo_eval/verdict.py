"""How the models of a run compare: the verdict in words, and the H4 tables and figures under it."""

import shlex
from collections.abc import Iterator
from typing import Any

import polars as pl

from sdpo_eval import plots
from sdpo_eval.blocks import Block, Drawing, Estimate, Missing, Prose, Table
from sdpo_eval.evidence import UNIT, Evidence, Model, comparable_results, paired_differences
from sdpo_eval.h4 import MEAN, TASKS

TITLES = {name: task.title for name, task in TASKS.items()} | {MEAN: "H4"}
ENOUGH_SEEDS = 5  # fewer tell checkpoints apart, not methods
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
        models = [model for model in (_base(results), *_lasts(results)) if model]
        scores = [f"{_called(model, results)} {score}" for model in models if (score := _score(results, model, task))]
        yield Prose(f"{TITLES[task]}: {', '.join(scores)}.")
    told: dict[str, list[str]] = {}
    for row in _contrasts(evidence, results):
        if row["task"] in [TITLES[task] for task in spoken]:
            interval = f" {row['95_%_interval']}" if row["difference"].interval else ""
            said = f"{row['task']} {row['difference'].number}{interval}, {row['verdict']}"
            told.setdefault(row["contrast"], []).append(said)
    for contrast, said in told.items():
        yield Prose(f"{contrast}, over the same questions: {'; '.join(said)}.")
    if told:
        seeds = results.filter(pl.col("step") > 0).group_by("arm").agg(pl.col("seed").n_unique())["seed"].min()
        if isinstance(seeds, int) and seeds < ENOUGH_SEEDS:
            yield Prose(
                f"These are checkpoints, not methods: with {seeds} seed{'' if seeds == 1 else 's'} per arm, how much "
                "another seed would change is not known well enough."
            )


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
    contrasts = _contrasts(evidence, results)
    if contrasts:
        title = "Differences over the same questions, in points; the intervals are not adjusted for looking at several"
        yield Table("differences", title, contrasts)
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


def _contrasts(evidence: Evidence, results: pl.DataFrame) -> list[dict[str, Any]]:
    """Set every arm's last model against the base model, and sDPO's against DPO's of the same seed."""
    base, lasts = _base(results), _lasts(results)
    pairs = [(last, base) for last in lasts if base]
    pairs += [(one, two) for one in lasts for two in lasts if (one[0], two[0], one[1]) == ("sdpo", "dpo", two[1])]
    rows = []
    for first, second in pairs:
        name = f"{_called(first, results)} − {_called(second, results)}"
        for row in paired_differences(evidence.items, results, first, second).iter_rows(named=True):
            difference = Estimate(row["value"], row["stderr"], row["n"], digits=2, signed=True)
            rows.append({
                "contrast": name, "task": TITLES[row["task"]], "difference": difference,
                "95_%_interval": difference.interval_shown, "verdict": _judged(difference),
            })  # fmt: skip
    return sorted(rows, key=lambda row: row["task"] != TITLES[MEAN])


def _judged(difference: Estimate) -> str:
    if difference.interval is None:  # one question, or the same answers to all
        return "not distinguishable"
    low, high = difference.interval
    return "higher" if low > 0 else "lower" if high < 0 else "not distinguishable"


def _base(results: pl.DataFrame) -> Model | None:
    rows = results.filter(arm="base", step=0).select(UNIT).rows()
    return rows[0] if rows else None


def _lasts(results: pl.DataFrame) -> list[Model]:
    """Find the last model of every arm and seed, sdpo's first."""
    others = results.filter(pl.col("arm") != "base").group_by("arm", "seed").agg(pl.col("step").max())
    return others.sort(pl.col("arm") != "sdpo", "arm", "seed").select(UNIT).rows()


def _called(model: Model, results: pl.DataFrame) -> str:
    arm, seed, step = model
    seeds = f" seed {seed}" if results["seed"].n_unique() > 1 and step else ""
    return f"{arm}{seeds}{f' step {step}' if step else ''}"


def _score(results: pl.DataFrame, model: Model, task: str) -> Estimate | None:
    arm, seed, step = model
    rows = results.filter(arm=arm, seed=seed, step=step, task=task).select("value", "stderr", "n").rows()
    return Estimate(*rows[0]) if rows else None
