"""Evaluate RUN's base model and every finished step on H4's tasks, all on the same items.

Examples:
    python -m sdpo_eval runs/a                  # all 26,073 items: for a GPU
    python -m sdpo_eval runs/a --limit 100      # 100 of each task, always the same ones
    python -m sdpo_eval runs/a --limit 8 --mmlu-subjects astronomy virology --data-dir my/benchmarks
"""

import polars as pl

from sdpo_data.config import read_command
from sdpo_data.console import command, print_table, say
from sdpo_eval.answers import carry_out
from sdpo_eval.h4 import MEAN, TASKS
from sdpo_eval.plan import EvalConfig, plan_evaluation

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
    """Lay RESULTS out for reading: a row per model, a column per task, whose n is the same for all."""
    rows: dict[tuple, dict[str, str]] = {}
    for row in results.iter_rows(named=True):
        stderr = "?" if row["stderr"] is None else f"{row['stderr']:.1f}"
        cells = rows.setdefault((row["arm"], row["seed"], row["step"]), {})
        cells[f"{TITLES[row['task']]} (n = {row['n']:,})"] = f"{row['value']:.1f} ± {stderr}"
    return pl.DataFrame(
        [dict(zip(("arm", "seed", "step"), model, strict=True)) | cells for model, cells in rows.items()]
    )


def caveats(results: pl.DataFrame, missing_tasks: list[str]) -> list[str]:
    """Say in plain words what the numbers are not."""
    lines = []
    asked = results.filter(pl.col("task") != MEAN).unique("task", maintain_order=True)
    limited = asked.filter(pl.col("n") < pl.col("n_full")).select("task", "n", "n_full").rows()
    if limited:
        counts = ", ".join(f"{TITLES[task]} {n:,} of {n_full:,}" for task, n, n_full in limited)
        lines.append(f"limited run, which does not measure the models: {counts} questions.")
    why = {name: "out of reach" if name in missing_tasks else "not in eval.tasks" for name in TASKS}
    left_out = [f"{TITLES[name]} is {why[name]}" for name in TASKS if name not in results["task"]]
    if left_out:
        lines.append(f"no H4, which is the mean of all four tasks: {', '.join(left_out)}.")
    return lines


if __name__ == "__main__":
    command(main)
