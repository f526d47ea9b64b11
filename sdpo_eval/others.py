"""Tasks of lm-eval beside H4: asked by their own rules, kept per task, and in no mean of H4's."""

import logging
import math
from typing import TYPE_CHECKING, Any

import polars as pl

from sdpo_data import workers
from sdpo_data.tables import DOCUMENTS, ITEMS, RESULTS, STEPS, UNIT
from sdpo_eval.plan import Candidate, Plan, other_limit, other_tasks

if TYPE_CHECKING:
    from sdpo_eval.answers import Engine


log = logging.getLogger(__name__)


def evaluate_other(plan: Plan, candidate: Candidate, name: str, engine: "Engine") -> None:
    """Evaluate a task beside H4, whole: its RESULTS are kept in other_tasks/, its items with the others."""
    config, items = plan.config, candidate.unit(name)
    unit = items.replace("items/", "other_tasks/")
    recipe = {"model_key": candidate.model_key, "task": name, "limit": other_limit(config), "dtype": config.dtype}
    recipe |= {"task_dir": config.task_dir, "tokenizer_key": candidate.tokenizer_key}
    recipe, anew = workers.from_main(lambda: _reconciled(plan, unit, recipe))
    own = {"arm": candidate.arm, "seed": candidate.seed, "step": candidate.step, "model_key": candidate.model_key}
    with workers.main_stage(plan.run, unit, recipe, force=plan.force or anew) as stage:
        if stage.current:
            return
        if twin := workers.from_main(lambda: None if plan.force else _same_recipe(plan, recipe)):
            for table in (twin.replace("other_tasks/", "items/"), twin) if workers.is_main() else ():
                frame = plan.run.read(table).with_columns(pl.lit(own[key], STEPS[key]).alias(key) for key in UNIT)
                plan.keep(stage, unit if table == twin else items, frame)
            return
        from sdpo_eval.harness import evaluate_task, prefix_lm

        lm = prefix_lm(*engine(), config.token_budget)
        got = evaluate_task(lm, name, recipe["limit"], config.task_dir, config.dtype)
        plan.keep(stage, items, pl.DataFrame([own | row for row in got.items], ITEMS))
        plan.keep_texts(pl.DataFrame(got.questions, DOCUMENTS))
        plan.keep(stage, unit, pl.DataFrame([own | row for row in got.results], RESULTS))


def _reconciled(plan: Plan, unit: str, recipe: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Fit a recipe to the one that a unit was made by, and say whether it is made anew to ask more documents.

    More documents are another evaluation of the whole, as lm-eval sums it up; of fewer the larger one is kept.
    Answers from before tokenizers were noted are taken for those of the tokenizer that the model has now.
    """
    made = plan.run.lineage.get(unit, {}).get("recipe")
    if made is None or plan.force:
        return recipe, False
    noted = {"tokenizer_key": recipe["tokenizer_key"]} | made
    recipe = recipe | {"tokenizer_key": recipe["tokenizer_key"] or noted["tokenizer_key"]}  # None: out of reach
    if any(noted.get(name) != value for name, value in recipe.items() if name != "limit"):
        return recipe, False  # refused where the unit is entered
    was, now = (math.inf if limit is None else limit for limit in (made["limit"], recipe["limit"]))
    if now < was:
        whole = "all" if made["limit"] is None else f"{was:,}"
        log.info("%s was asked %s documents, which stand; now it would be %s.", unit, whole, f"{now:,}")
    return (recipe, True) if now > was else (made, False)


def _same_recipe(plan: Plan, recipe: dict[str, Any]) -> str | None:
    """Name the unit in which these very weights have answered this very task under another name."""
    unnoted = {"tokenizer_key": plan.base_tokenizer}  # see Plan.read_answers
    for name, made in plan.run.lineage.items():
        if name.startswith("other_tasks/") and unnoted | made["recipe"] == unnoted | recipe:
            return name
    return None


def other_results(plan: Plan) -> pl.DataFrame:
    """Give RESULTS of the tasks beside H4 that are asked for, of every model in the run."""
    units = [
        (unit, made["recipe"]) for unit, made in sorted(plan.run.lineage.items()) if unit.startswith("other_tasks/")
    ]
    frames = [plan.run.read(unit) for name in other_tasks(plan.config) for unit, by in units if by["task"] == name]
    return pl.concat([RESULTS.to_frame(), *frames])
