"""Tasks of lm-eval beside H4: asked by their own rules, kept per task, and in no mean of H4's."""

from typing import TYPE_CHECKING, Any

import polars as pl

from sdpo_data import workers
from sdpo_data.run import Run
from sdpo_data.tables import DOCUMENTS, ITEMS, RESULTS, STEPS, UNIT
from sdpo_eval.plan import Candidate, Plan, other_limit, other_tasks

if TYPE_CHECKING:
    from sdpo_eval.answers import Engine


def evaluate_other(plan: Plan, candidate: Candidate, name: str, engine: "Engine") -> None:
    """Evaluate a task beside H4, whole: its RESULTS are kept in other_tasks/, its items with the others."""
    config, items = plan.config, candidate.unit(name)
    unit = items.replace("items/", "other_tasks/")
    recipe = {"model_key": candidate.model_key, "task": name, "limit": other_limit(config), "dtype": config.dtype}
    recipe |= {"task_dir": config.task_dir}
    own = {"arm": candidate.arm, "seed": candidate.seed, "step": candidate.step, "model_key": candidate.model_key}
    with workers.main_stage(plan.run, unit, recipe, force=plan.force) as stage:
        if stage.current:
            return
        if twin := workers.from_main(lambda: None if plan.force else _same_recipe(plan.run, recipe)):
            for table in (twin.replace("other_tasks/", "items/"), twin) if workers.is_main() else ():
                frame = plan.run.read(table).with_columns(pl.lit(own[key], STEPS[key]).alias(key) for key in UNIT)
                plan.keep(stage, unit if table == twin else items, frame)
            return
        from sdpo_eval.harness import evaluate_task, prefix_lm

        lm = prefix_lm(*engine(), config.token_budget)
        got = evaluate_task(lm, name, other_limit(config), config.task_dir, config.dtype)
        plan.keep(stage, items, pl.DataFrame([own | row for row in got.items], ITEMS))
        plan.keep_texts(pl.DataFrame(got.questions, DOCUMENTS))
        plan.keep(stage, unit, pl.DataFrame([own | row for row in got.results], RESULTS))


def _same_recipe(run: Run, recipe: dict[str, Any]) -> str | None:
    """Name the unit in which these very weights have answered this very task under another name."""
    made = (name for name, own in run.lineage.items() if name.startswith("other_tasks/") and own["recipe"] == recipe)
    return next(made, None)


def other_results(plan: Plan) -> pl.DataFrame:
    """Give RESULTS of the tasks beside H4 that are asked for, of every model in the run."""
    units = [
        (unit, made["recipe"]) for unit, made in sorted(plan.run.lineage.items()) if unit.startswith("other_tasks/")
    ]
    frames = [plan.run.read(unit) for name in other_tasks(plan.config) for unit, by in units if by["task"] == name]
    return pl.concat([RESULTS.to_frame(), *frames])
