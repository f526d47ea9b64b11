"""Evaluate RUN's base model and every finished step on H4's tasks, all on the same items.

Without RUN, one model, of which nothing is kept. A gate for CI takes two models, so it is in
`python -m sdpo_eval.compare RUN --fail-if-worse 1.0`.

Examples:
    python -m sdpo_eval runs/a                          # all 26,073 items: for a GPU
    python -m sdpo_eval runs/a --budget tiny            # 207 items, always the same: minutes a model on two cores
    python -m sdpo_eval runs/a --tasks h4 winogrande    # and another task of lm-eval, kept apart
    python -m sdpo_eval runs/a --documents              # what is asked, as text, for decontamination
    python -m sdpo_eval --model my/model --limit 200
    accelerate launch -m sdpo_eval runs/a               # on several devices: the same numbers, sooner
"""

from typing import TYPE_CHECKING

import polars as pl

from sdpo_data import workers
from sdpo_data.config import Command, read_command
from sdpo_data.console import command, print_table, say
from sdpo_data.models import load_tokenizer
from sdpo_data.tables import DOCUMENTS
from sdpo_eval.contrasts import TITLES
from sdpo_eval.documents import LM_EVAL
from sdpo_eval.evaluation import carry_out
from sdpo_eval.h4 import MEAN, TASKS
from sdpo_eval.plan import EvalConfig, list_documents, other_limit, other_tasks, plan_evaluation, plan_questions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_HELP = (
    "The model evaluated, of a run with steps the one before step 1, evaluated as arm base: "
    "a folder, a hub id, or embedded:NAME."
)
SWITCHES = {
    "documents": "Write RUN/documents.parquet, the questions as text, and evaluate nothing.",
    "show": "Print the first and last tokens of one request per task, and evaluate nothing.",
}


def main() -> None:
    """Write RUN/items/*.parquet and RUN/results.parquet, and show the tasks by model."""
    call = read_command(
        "python -m sdpo_eval", __doc__, "eval", {"eval": EvalConfig}, switches=SWITCHES, needs_run=False,
        model_help=MODEL_HELP,
    )  # fmt: skip
    config, steps = call.settings["eval"], call.run.steps
    assert isinstance(config, EvalConfig)
    if call.asked and not workers.is_main():
        return None
    if "documents" in call.asked:
        return _write_documents(call, config)
    if "show" in call.asked:
        return _show_requests(call, config)
    plan = plan_evaluation(steps if steps.height else call.model, config, call.run, base=call.model, force=call.force)
    made, path = call.run.lineage.get("results"), call.run.path / "results.parquet"
    results = carry_out(plan)
    if not workers.is_main():
        return None
    if call.run.lineage.get("results") == made:
        say(f"up to date: {path}")
    else:
        title = "points of 100 ± standard error"
        print_table(tabulate(results), f"{path}: {title}" if call.kept else f"{call.model}, nothing kept: {title}")
    for line in caveats(results, plan.missing_tasks):
        say(line)
    return None


def _write_documents(call: Command, config: EvalConfig) -> None:
    others: list[dict] = []
    for name in other_tasks(config):
        from sdpo_eval.harness import list_questions  # lm-eval loads only where it is asked

        others += list_questions(name, other_limit(config), config.task_dir)
    known = list_documents(plan_questions(config, call.run).values())
    documents = pl.concat([known, pl.DataFrame(others, DOCUMENTS)])
    with call.run.stage("documents", config.model_dump(exclude={"token_budget"}), force=True) as stage:
        stage.write("documents", documents)
    counts = ", ".join(
        f"{TITLES.get(task, task)} {n:,}" for task, n in documents["task"].value_counts(sort=True).rows()
    )
    say(f"{call.run.path / 'documents.parquet'}: {documents.height:,} questions ({counts})")


def _show_requests(call: Command, config: EvalConfig) -> None:
    tokenizer, others = load_tokenizer(call.model), []
    for name in other_tasks(config):
        from sdpo_eval.harness import first_requests  # lm-eval loads only where it is asked

        others += first_requests(name, tokenizer, config.task_dir)  # before H4's are shown: a misspelt name is found
    for name, asked in plan_questions(config, call.run).items():
        if asked.documents:
            row = asked.encode(asked.chosen[:1], tokenizer, call.run.path / ".requests").row(0, named=True)
            title = f"{TITLES[name]}, {row['item_id']}, {asked.protocol}"
            _show_request(title, row["context"], row["answers"][0], tokenizer)
    for one in others:
        _show_request(f"{one.task}, {one.item_id}, lm-eval {LM_EVAL}", one.context, one.answer, tokenizer)


def _show_request(
    title: str, context: list[int], answer: list[int] | None, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    first, last, choice = (
        " ".join(tokenizer.convert_ids_to_tokens(part)) for part in (context[:8], context[-8:], answer or [])
    )
    say(f"{title}: {len(context):,} tokens, {'no choices' if answer is None else f'first choice {len(answer)}'}")
    say(f"  begins {first}\n  ends   {last}" + ("" if answer is None else f"\n  choice {choice}"))


def tabulate(results: pl.DataFrame) -> pl.DataFrame:
    """Lay RESULTS out for reading: a row per model, a column per task, whose n is the same for all.

    A task of which every question is clean has no second column: `caveats` says so.
    """
    rows: dict[tuple, dict[str, str]] = {}
    for row in results.join(_all_clean(results), on=["task", "subset"], how="anti").iter_rows(named=True):
        stderr = "?" if row["stderr"] is None else f"{row['stderr']:.1f}"
        cells = rows.setdefault((row["arm"], row["seed"], row["step"]), {})
        title = TITLES.get(row["task"], f"{row['task']} {row['metric']}")
        title += "" if row["subset"] == "all" else f", {row['subset']}"
        cells[f"{title} (n = {row['n']:,})"] = f"{row['value']:.1f} ± {stderr}"
    return pl.DataFrame(
        [dict(zip(("arm", "seed", "step"), model, strict=True)) | cells for model, cells in rows.items()]
    )


def _all_clean(results: pl.DataFrame) -> pl.DataFrame:
    """Name the tasks, with subset "clean", of which no question is given away by a training pair."""
    counts = results.group_by("task", maintain_order=True).agg(
        least=pl.col("n").filter(subset="clean").min(), most=pl.col("n").filter(subset="all").max()
    )
    return counts.filter(pl.col("least") == pl.col("most")).select("task", subset=pl.lit("clean"))


def caveats(results: pl.DataFrame, missing_tasks: list[str]) -> list[str]:
    """Say in plain words what the numbers are not."""
    lines = []
    asked = results.filter(pl.col("task") != MEAN, subset="all").unique("task", maintain_order=True)
    limited = asked.filter(pl.col("n") < pl.col("n_full")).select("task", "n", "n_full").rows()
    if limited:
        counts = ", ".join(f"{TITLES.get(task, task)} {n:,} of {n_full:,}" for task, n, n_full in limited)
        lines.append(f"a subset, not the benchmark: {counts} questions. Its standard errors say what it can tell.")
    why = {name: "out of reach" if name in missing_tasks else "not in eval.tasks" for name in TASKS}
    clean = [TITLES.get(task, task) for task in _all_clean(results)["task"] if task != MEAN]
    if clean:
        lines.append(f"no question of {', '.join(clean)} is given away by a training pair: clean results are the same.")
    left_out = [f"{TITLES[name]} is {why[name]}" for name in TASKS if name not in results["task"]]
    if left_out:
        lines.append(f"no H4, which is the mean of all four tasks: {', '.join(left_out)}.")
    return lines


if __name__ == "__main__":
    command(main)
