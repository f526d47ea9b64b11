"""Evaluate RUN's base model and every finished step on H4's tasks, all on the same items.

Examples:
    python -m sdpo_eval runs/a                  # all 26,073 items: for a GPU
    python -m sdpo_eval runs/a --limit 100      # 100 of each task, always the same ones
    python -m sdpo_eval runs/a --limit 8 --mmlu-subjects astronomy virology --data-dir my/benchmarks
"""

import polars as pl

from sdpo_data.config import read_command
from sdpo_data.console import command, print_table, say
from sdpo_eval.h4 import MEAN, TASKS
from sdpo_eval.harness import EvalConfig, carry_out, plan_evaluation

TITLES = {name: task.title for name, task in TASKS.items()} | {MEAN: "H4"}


def main() -> None:
    """Write RUN/items/*.parquet and RUN/results.parquet, and show the tasks by model."""
    call = read_command("python -m sdpo_eval", __doc__, "eval", {"eval": EvalConfig})
    config, steps = call.settings["eval"], call.run.steps
    assert isinstance(config, EvalConfig)
    plan = plan_evaluation(steps if steps.height else call.model, config, call.run, base=call.model, force=call.force)
    made, path = call.run.lineage.get("results"), call.run.path / "results.parquet"
    results = carry_out(plan)
    if call.run.lineage.get("results") == made:
        say(f"up to date: {path}")
    else:
        print_table(tabulate(results), f"{path}: points of 100 ± standard error")
    for line in caveats(results, plan.missing_tasks):
        say(line)


def tabulate(results: pl.DataFrame) -> pl.DataFrame:
    """Lay RESULTS out for reading: a row per model, a column per task, which has the same n for all."""
    rows: dict[tuple, dict[str, str]] = {}
    for arm, seed, step, task, value, stderr, n in results.select(
        "arm", "seed", "step", "task", "value", "stderr", "n"
    ).rows():
        error = "?" if stderr is None else f"{stderr:.1f}"
        rows.setdefault((arm, seed, step), {})[f"{TITLES[task]} (n = {n:,})"] = f"{value:.1f} ± {error}"
    return pl.DataFrame([{"arm": arm, "seed": seed, "step": step} | cells for (arm, seed, step), cells in rows.items()])


def caveats(results: pl.DataFrame, missing_tasks: list[str]) -> list[str]:
    """Say in plain words what the numbers are not."""
    lines = []
    asked = results.filter(pl.col("task") != MEAN).unique("task", maintain_order=True)
    limited = asked.filter(pl.col("n") < pl.col("n_full")).select("task", "n", "n_full").rows()
    if limited:
        counts = ", ".join(f"{TITLES[task]} {n:,} of {n_full:,}" for task, n, n_full in limited)
        lines.append(f"limited run, not a measurement of the models: {counts} questions.")
    if missing_tasks:
        names = " and ".join(TITLES[task] for task in missing_tasks)
        lines.append(f"missing: {names} could not be had, so what is asked of it is not new.")
    left_out = [task.title for name, task in TASKS.items() if name not in results["task"]]
    if left_out:
        lines.append(f"no H4, which is the mean of all four tasks: {' and '.join(left_out)} not evaluated.")
    return lines


if __name__ == "__main__":
    command(main)
