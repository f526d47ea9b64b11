"""Evaluate models: ask what is missing, keep every answer, and derive RESULTS from them."""

import logging
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from sdpo_data import workers
from sdpo_data.console import progress
from sdpo_data.models import reading_length
from sdpo_data.prefix import score_completions
from sdpo_data.run import Run
from sdpo_data.tables import ITEMS, RESULTS, UNIT, SdpoError
from sdpo_data.tree import count_tokens
from sdpo_eval import h4
from sdpo_eval.answers import answer_requests, opened
from sdpo_eval.clean import Clean, read_clean
from sdpo_eval.others import evaluate_other, other_results
from sdpo_eval.plan import (
    ANSWERS,
    Candidate,
    EvalConfig,
    Plan,
    describe_cost,
    list_documents,
    other_tasks,
    plan_evaluation,
    recipe_of,
)
from sdpo_eval.questions import Questions, sequences_of, slices

if TYPE_CHECKING:
    from sdpo_eval.answers import Engine, Loaded
    from sdpo_eval.plan import Model, Models

log = logging.getLogger(__name__)


def evaluate(
    models: "Models",
    config: EvalConfig | None = None,
    out: str | Path | None = None,
    *,
    base: "Model | None" = None,
    force: bool = False,
) -> pl.DataFrame:
    """Evaluate models on H4's tasks, all of them on the same items.

    What `out` holds is not evaluated again: answers are kept by weights, tokenizer, protocol and item,
    and written every minute, so that a killed run goes on where it stopped and equal weights in
    several arms are evaluated once.

    Args:
        models: a STEPS frame, whose base model is evaluated too, as arm "base", step 0; one
            model (folder, hub id, embedded:NAME, or loaded (model, tokenizer)), as arm "base";
            or name -> model, as arms.
        out: run folder for items/*.parquet and results.parquet; without it nothing is kept.
        base: the model before step 1 of a STEPS frame; by default `model` in out's config.yaml.
        force: evaluate again what `out` holds.

    Returns:
        RESULTS frame of all models in `out` that have answered the items asked for, points of
        100: a row per model and task, and one of task "h4" where all four are there. Subset
        "clean" where `out` holds contamination.parquet.

    Raises:
        SdpoError: a model, a file or a setting is not what it must be; `out` holds items of other
            weights, another tokenizer or protocol under the same name; a question is longer than a model reads.
    """
    config = config or EvalConfig()
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            return carry_out(plan_evaluation(models, config, Run(folder), base=base))
    return carry_out(plan_evaluation(models, config, Run(out), base=base, force=force))


def carry_out(plan: Plan) -> pl.DataFrame:
    """Evaluate what is missing, model by model, and derive results.parquet from the items.

    Processes of `accelerate launch` share the forward passes; the main one alone reads and writes the run.
    """
    known, first = workers.from_main(lambda: ANSWERS.to_frame() if plan.force else plan.read_answers()), True
    plan.keep_texts(list_documents(plan.questions.values(), every=True))
    askable = [asked for asked in plan.questions.values() if asked.documents]
    if workers.is_main() and any(_missing(one, asked, known)[1] for one in plan.candidates for asked in askable):
        size = f"budget {plan.config.budget}" if plan.config.limit is None else f"limit {plan.config.limit}"
        for line in describe_cost(plan.questions, size):
            log.info("%s", line)
    for candidate in plan.candidates:
        with opened(candidate, plan) as engine:
            for name in other_tasks(plan.config):  # before H4, which takes longer: a misspelt name is found at once
                evaluate_other(plan, candidate, name, engine)
            requests = _encode_missing(plan, candidate, known, engine)
            if first and any(frame.height for frame in requests.values()):
                if workers.is_main():
                    _say_time(plan, candidate, requests, engine())
                first = False
            for name, asked in plan.questions.items():
                known = _evaluate_task(plan, candidate, asked, known, requests[name], engine)
    return workers.from_main(lambda: _write_results(plan))


def _missing(candidate: Candidate, asked: Questions, known: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Answers of these weights, in any arm, and the items without one."""
    same = known.filter(task=asked.task.name, **recipe_of(candidate, asked))
    return same, sorted(set(asked.chosen) - set(same["item_id"]))


def _encode_missing(plan: Plan, candidate: Candidate, known: pl.DataFrame, engine: "Engine") -> dict[str, pl.DataFrame]:
    """Questions as token ids, of each task those that a candidate has not answered."""
    encoded = {}
    for name, asked in plan.questions.items():
        _, missing = _missing(candidate, asked, known)
        encoded[name] = pl.DataFrame()
        if missing and asked.documents:
            model, tokenizer = engine()
            encode = partial(asked.encode, missing, tokenizer, plan.run.path / ".requests")
            encoded[name] = workers.from_main(encode)
            _refuse_too_long(asked.task, encoded[name], reading_length(model, tokenizer))
    return encoded


def _refuse_too_long(task: h4.Task, requests: pl.DataFrame, limit: int) -> None:
    answer = pl.col("answers").list.eval(pl.element().list.len()).list.max()
    longest = int(requests.select((pl.col("context").list.len() + answer).max()).item())
    if longest > limit + 1:  # the last token is predicted, not read
        raise SdpoError(
            f"{task.title} has questions of {longest - 1:,} tokens, but the model reads {limit:,}: shots would "
            "be cut off, and its score be that of another test. Leave the task out of eval.tasks."
        )


def _say_time(plan: Plan, candidate: Candidate, requests: dict[str, pl.DataFrame], loaded: "Loaded") -> None:
    """Say before H4 runs how long it will take, at a measured speed."""
    asked = [frame for frame in requests.values() if frame.height]
    parts = [part for frame in asked for part in slices(frame)]
    tokens = sum(count_tokens([one for question in sequences_of(part) for one in question]) for part in parts)
    probe = [sequence for frame in asked for sequence in sequences_of(frame.head(1))[0]]
    started = time.monotonic()
    for _ in score_completions(loaded[0], probe, plan.config.token_budget):
        pass
    speed = workers.count() * count_tokens(probe) / (time.monotonic() - started)
    log.info(
        "%s tokens at %s a second, measured: about %s for %s, of %d models",
        f"{tokens:,}", f"{speed:,.0f}", _duration(tokens / speed), candidate.arm, len(plan.candidates),
    )  # fmt: skip


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _evaluate_task(
    plan: Plan, candidate: Candidate, asked: Questions, known: pl.DataFrame, requests: pl.DataFrame, engine: "Engine"
) -> pl.DataFrame:
    """Ask a candidate what `known` does not hold for its weights; give `known` back with the answers."""
    unit, recipe = candidate.unit(asked.task.name), recipe_of(candidate, asked)
    own = dict(zip(UNIT, (candidate.arm, candidate.seed, candidate.step), strict=True))
    same, missing = _missing(candidate, asked, known)
    finished = set(asked.chosen) <= set(same.filter(**own)["item_id"]) and workers.from_main(
        lambda: unit in plan.run.lineage
    )
    if finished or (missing and asked.documents is None):
        return known
    rows = same.unique("item_id", keep="first", maintain_order=True).with_columns(
        pl.lit(value, ANSWERS[name]).alias(name) for name, value in own.items()
    )
    constant = {**own, **recipe, "task": asked.task.name}
    with workers.main_stage(plan.run, unit, recipe, force=True) as stage:  # the plan has refused another recipe
        started = time.monotonic()
        with progress(unit, len(missing), "questions") as advance:
            parts = (
                answer_requests(engine()[0], asked.task, requests, plan.config.token_budget, advance) if missing else []
            )
            for answers in parts:
                new = [constant | answer | {"cluster": asked.cluster(answer["item_id"])} for answer in answers]
                rows = rows.vstack(pl.DataFrame(new, ANSWERS))
                plan.keep(stage, unit, rows)
        if not missing:
            plan.keep(stage, unit, rows)
        seconds = time.monotonic() - started
        log.info("%s: %d items answered in %.0f s, %d known before", unit, len(missing), seconds, len(same))
    return pl.concat([known, rows])


def _write_results(plan: Plan) -> pl.DataFrame:
    """Derive results.parquet: of every model in the run, the tasks of which it has answered all that is asked."""
    key = ["task", "protocol", "item_id"]
    rows = [(name, asked.protocol, item) for name, asked in plan.questions.items() for item in asked.chosen]
    wanted = pl.DataFrame(rows, [(name, ITEMS[name]) for name in key], orient="row")
    wanted = wanted.with_columns(count=pl.len().over("task"))
    items, model = plan.run.items, [*UNIT, "task"]
    whole = items.join(wanted, on=key).filter(pl.len().over(model) == pl.col("count"))
    others = (
        items.filter(pl.col("task").is_in(list(h4.TASKS)))
        .select(model)
        .unique()
        .join(whole, on=model, how="anti")
        .sort(model)
    )
    path = plan.run.path / "results.parquet"
    if others.height:
        name = "-".join(map(str, others.row(0)))
        log.warning("%s leaves out %d evaluations of other or fewer items, e.g. %s.", path, others.height, name)
    clean = _clean_results(whole, read_clean(plan.run))
    results = pl.concat([h4.summarise_items(whole), clean, other_results(plan)])
    if not path.exists() or not plan.run.results.equals(results):
        protocols = {name: asked.protocol for name, asked in plan.questions.items()}
        recipe = plan.config.model_dump(exclude={"token_budget"})
        with plan.run.stage("results", recipe | {"protocols": protocols}, force=True) as stage:
            stage.write("results", results)
            plan.save_settings()
    return results


def _clean_results(items: pl.DataFrame, clean: Clean | None) -> pl.DataFrame:
    """Results on the items that no training pair touches, once decontamination has said which they are."""
    if clean is None:
        return RESULTS.to_frame()
    unknown = items.join(clean.matched, on=["task", "item_id"], how="anti").select("task", "item_id").n_unique()
    if unknown:
        log.warning(
            "%d questions were not in the documents that the pairs were held against; results on clean ones leave them "
            "out. To hold the pairs against all: python -m sdpo_eval RUN --documents, then decontaminate --force.",
            unknown,
        )
    return h4.summarise_items(clean.keep(items), "clean", dict(clean.touched["task"].value_counts().rows()))
