"""Evaluate models on H4 through lm-eval: item rows and RESULTS. The only file that imports lm_eval.

lm-eval builds the questions and computes the log-probabilities; which items, what is finished
and what is kept is decided here. lm-eval and torch load once there is something to evaluate.
"""

import gc
import logging
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import polars as pl
import pydantic
import ruamel.yaml

from sdpo_data.config import Settings, merge_config
from sdpo_data.console import progress
from sdpo_data.models import load_model, model_key
from sdpo_data.prefix import score_completions
from sdpo_data.run import Run
from sdpo_data.tables import ITEMS, STEPS, SdpoError, check
from sdpo_eval import h4

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Model = str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase]
    Models = pl.DataFrame | Model | Mapping[str, Model]

log = logging.getLogger(__name__)

SAVE_EVERY = 100  # items between two writes: what a kill can cost
UNIT = ["arm", "seed", "step"]


class EvalConfig(Settings):
    protocol: Literal["h4-lmeval"] = "h4-lmeval"
    """What is asked and how it is scored: h4-lmeval, as lm-eval 0.4.13 does."""
    tasks: list[Literal["arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2"]] = pydantic.Field(
        ["arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2"], min_length=1
    )
    """Which tasks to ask; H4 needs all four."""
    limit: int | None = pydantic.Field(None, ge=1)
    """Items per task, MMLU's spread over its subjects, always the same ones; None for all."""
    mmlu_subjects: list[str] = pydantic.Field([])
    """Only these of MMLU's 57 subjects; empty for all."""
    data_dir: str = "embedded:h4"
    """Where documents come from: hub, embedded:h4, or a folder with its files."""
    truthfulqa: str = "truthfulqa/truthful_qa"
    """TruthfulQA where data_dir has none: a hub id, or a .jsonl(.gz) file."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and forward pass, the same for every model."""
    token_budget: int = pydantic.Field(4096, ge=1)
    """Tokens per packed row at most. Changes speed and memory; the numbers only within float noise."""


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate, and where it stands in the run."""

    arm: str
    seed: int
    step: int
    model: "Model"
    model_key: str

    def unit(self, task: str) -> str:
        return f"items/{self.arm}-{self.seed}-{self.step}-{task}"


@dataclass(frozen=True)
class Item:
    """A question as a model gets it."""

    item_id: str
    doc: dict[str, Any]
    pairs: list[tuple[str, str]]
    """(context, continuation) of each choice, as text."""
    task: "ConfigurableTask"


@dataclass(frozen=True)
class Questions:
    """What every candidate is asked of one task."""

    task: h4.Task
    protocol: str
    chosen: list[str]
    """Item ids."""
    documents: h4.Documents | None
    """None: out of reach; only what was answered before is known."""
    built: dict[str, Item] = field(default_factory=dict)

    def items(self, item_ids: list[str]) -> list[Item]:
        """Build questions, once for all candidates: all of H4 takes lm-eval minutes."""
        assert self.documents is not None
        new = [item_id for item_id in item_ids if item_id not in self.built]
        self.built.update((item.item_id, item) for item in build_items(self.task, self.documents, new))
        return [self.built[item_id] for item_id in item_ids]


@dataclass(frozen=True)
class Plan:
    """Whom to ask what."""

    run: Run
    config: EvalConfig
    candidates: list[Candidate]
    questions: dict[str, Questions]
    missing_tasks: list[str]
    """Those whose documents are out of reach."""
    force: bool

    def save_settings(self) -> None:
        first, model = self.candidates[0], {}
        if first.arm == "base" and not isinstance(first.model, tuple) and self.run.steps.is_empty():
            model = {"model": str(first.model)}  # where there are steps, it is the model they were trained from
        merge_config(self.run, model | {"eval": self.config.model_dump(mode="json")})


def evaluate(
    models: "Models",
    config: EvalConfig | None = None,
    out: str | Path | None = None,
    *,
    base: "Model | None" = None,
    force: bool = False,
) -> pl.DataFrame:
    """Evaluate models on H4's tasks, all of them on the same items.

    What `out` holds is not evaluated again: items are kept by weights, protocol and id, and
    written every 100 items, so that a killed run goes on where it stopped and equal weights in
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
        100: a row per model and task, and one of task "h4" where all four are there.

    Raises:
        SdpoError: a model, a file or a setting is not what it must be; `out` holds items of other
            weights or another protocol under the same name; a question is longer than a model reads.
    """
    config = config or EvalConfig()
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            return carry_out(plan_evaluation(models, config, Run(folder), base=base))
    return carry_out(plan_evaluation(models, config, Run(out), base=base, force=force))


def plan_evaluation(
    models: "Models", config: EvalConfig, run: Run, *, base: "Model | None" = None, force: bool = False
) -> Plan:
    """Find out whom to ask what, and refuse what cannot be, before anything is done: see `evaluate`."""
    candidates = _candidates(models, run, base)
    questions: dict[str, Questions] = {}
    for name in config.tasks:
        if asked := _questions(h4.TASKS[name], config, run):
            questions[name] = asked
    missing: list[str] = [name for name in config.tasks if name not in questions or not questions[name].documents]
    if not force:
        for candidate in candidates:
            for asked in questions.values():
                _refuse_another_recipe(run, candidate, asked)
    return Plan(run, config, candidates, questions, missing, force)


def carry_out(plan: Plan) -> pl.DataFrame:
    """Evaluate what is missing, model by model, and derive results.parquet from the items."""
    known = ITEMS.to_frame() if plan.force else plan.run.items
    for candidate in plan.candidates:
        with _opened(candidate, plan.config) as engine:
            for asked in plan.questions.values():
                known = _evaluate_task(plan, candidate, asked, known, engine)
    return _write_results(plan)


def build_items(task: h4.Task, documents: h4.Documents, item_ids: Iterable[str]) -> list[Item]:
    """Have lm-eval write questions out as it does in a full run, whichever of them are wanted.

    Its sampler draws the shots of one document after the other from one stream of random
    numbers, so it draws for those before a wanted one too.

    Args:
        task: one of h4.TASKS.
        documents: all of the task's.
        item_ids: "subject/row".
    """
    rows: dict[str, set[int]] = {}
    for item_id in item_ids:
        subject, _, row = item_id.rpartition("/")
        rows.setdefault(subject, set()).add(int(row))
    items: list[Item] = []
    with _quiet():
        for subject, wanted in sorted(rows.items()):
            items += _subject_items(task, subject, documents[subject], wanted)
    return items


def _subject_items(task: h4.Task, subject: str, splits: dict[str, list[dict]], wanted: set[int]) -> Iterator[Item]:
    lm_task = _lm_eval_task(task, subject, splits)
    lm_task.set_fewshot_seed(h4.SHOTS_SEED)
    for row in range(max(wanted) + 1):
        if row in wanted:
            doc = lm_task.task_docs[row]
            context = lm_task.fewshot_context(doc, num_fewshot=task.shots)
            requests = cast(list, lm_task.construct_requests(doc, context))
            yield Item(f"{subject}/{row}", doc, [request.args for request in requests], lm_task)
        elif task.shots:
            lm_task.sampler.sample(task.shots)


def _lm_eval_task(task: h4.Task, subject: str, splits: dict[str, list[dict]]) -> "ConfigurableTask":
    """Build lm-eval's own task on our documents, with the shots of its openllm group."""
    from datasets import Dataset
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    shots_from = next((split for split in splits if split != task.split), None)
    datasets = {split: Dataset.from_list(documents) for split, documents in splits.items()}
    config = load_yaml(Path(tasks.__file__).parent / task.yaml.format(subject=subject)) | {
        "custom_dataset": lambda **_: datasets,
        "num_fewshot": task.shots,
        "fewshot_split": shots_from,
    }
    if shots_from and "query" in splits[shots_from][0]:  # HellaSwag's train file has been through process_docs
        config["fewshot_config"] = {"process_docs": None}
    return ConfigurableTask(config=config)


def answer_items(lm: "HFLM", task: h4.Task, items: list[Item]) -> list[dict[str, Any]]:
    """Have a model weigh the choices of each question, and score its answers as lm-eval does.

    Returns:
        Of each item item_id, subject, correct, score, gold_logp and choice_logps (nats): the
        columns of ITEMS that do not say which model it was.

    Raises:
        SdpoError: a question is longer than the model reads (lm-eval would cut off its shots),
            or a log-probability is not finite.
    """
    pairs = [(pair, *lm._encode_pair(*pair)) for item in items for pair in item.pairs]
    longest = max(len(context) + len(answer) for _, context, answer in pairs)
    if longest > lm.max_length + 1:
        raise SdpoError(
            f"{task.title} has questions of {longest - 1:,} tokens, but the model reads {lm.max_length:,}: shots would "
            "be cut off, and its score be that of another test. Leave the task out of eval.tasks."
        )
    answers = iter(lm._loglikelihood_tokens(pairs, disable_tqdm=True))
    return [_scored(task, item, [next(answers) for _ in item.pairs]) for item in items]


def prefix_lm(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", token_budget: int = 4096) -> "HFLM":
    """Give lm-eval's HFLM for a loaded model, with its log-probabilities from the prefix engine.

    It can stand wherever an HFLM does: `lm_eval.simple_evaluate(model=prefix_lm(...), tasks=...)`.
    Requests are encoded by HFLM; what they share is computed once.

    Args:
        token_budget: tokens per packed row at most.
    """
    from lm_eval.models.huggingface import HFLM

    class PrefixLM(HFLM):
        def _loglikelihood_tokens(
            self,
            requests: list,
            disable_tqdm: bool = False,  # noqa: FBT001 - HFLM's
            override_bs: int | None = None,
        ) -> list[tuple[float, bool]]:
            sequences = []
            for _, context, answer in requests:
                ids = (context + answer)[-(self.max_length + 1) :]  # as HFLM cuts
                sequences.append((ids, len(ids) - len(answer)))
            answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
            for places, completions in score_completions(model, sequences, token_budget):
                for place, completion in zip(places, completions, strict=True):
                    answers[place] = (float(completion.logps.sum(dtype="float64")), completion.greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], answers[place])
            return answers

    return PrefixLM(pretrained=model, tokenizer=cast(Any, tokenizer))


def _scored(task: h4.Task, item: Item, answers: list[tuple[float, bool]]) -> dict[str, Any]:
    logps = [logp for logp, _ in answers]
    scores = item.task.process_results(item.doc, answers)
    if task.metric == "mc2":
        correct, score = None, float(scores["acc"])  # lm-eval's name for it
        gold = max(logp for logp, true in zip(logps, item.doc["mc2_targets"]["labels"], strict=True) if true)
    else:
        correct = score = float(scores[task.metric])
        gold = logps[cast(int, item.task.doc_to_target(item.doc))]
    if not all(map(math.isfinite, [score, *logps])):
        raise SdpoError(
            f"{task.title}, item {item.item_id}: log-probabilities {logps} give no score. "
            "Set eval.dtype to float32, or look whether the model's weights are finite."
        )
    subject = item.item_id.rpartition("/")[0]
    row = {"item_id": item.item_id, "subject": subject, "correct": correct, "score": score}
    return row | {"gold_logp": gold, "choice_logps": logps}


def _candidates(models: Any, run: Run, base: "Model | None") -> list[Candidate]:
    if not isinstance(models, pl.DataFrame):
        named = models if isinstance(models, Mapping) else {"base": models}
        found = [Candidate(name, 0, 0, model, _key(model)) for name, model in named.items()]
    else:
        steps = check(models, STEPS, "steps")
        base = base or _base_model(run)
        keys = steps.filter(step=1)["start_key"].unique().to_list() or [_key(base)]
        if len(keys) > 1:
            raise SdpoError(f"The steps start from {len(keys)} different models. Evaluate one run at a time.")
        rows = steps.select(*UNIT, "model", "model_key").rows()
        found = [Candidate("base", 0, 0, base, keys[0]), *(Candidate(*row) for row in rows)]
    for candidate in found:
        if not re.fullmatch(r"[\w.+=-]+", candidate.arm):
            raise SdpoError(
                f"A model cannot be called {candidate.arm!r}, as its files are: use letters, digits and . _ + = - only."
            )
    return found


def _base_model(run: Run) -> str:
    path = run.path / "config.yaml"
    settings = (ruamel.yaml.YAML(typ="safe").load(path) if path.exists() else None) or {}
    if "model" not in settings:
        raise SdpoError(f"{path} does not name the model before step 1. Give it as base=.")
    return settings["model"]


def _key(model: Any) -> str:
    if isinstance(model, str | Path):
        return model_key(model)
    if isinstance(model, tuple):
        return model_key(model[0])
    raise SdpoError(
        f"Cannot evaluate a {type(model).__name__}. Give a folder, a hub id, embedded:NAME, or (model, tokenizer)."
    )


def _questions(task: h4.Task, config: EvalConfig, run: Run) -> Questions | None:
    documents = h4.load_documents(task, config.data_dir, config.truthfulqa)
    if documents is None:  # what was answered on a better day still stands
        known = run.items.filter(pl.col("protocol").str.starts_with(f"{config.protocol}@"), task=task.name)
        chosen = h4.select_items({task.name: task.n_full}, config.limit)
        protocols = known["protocol"].unique()
        return Questions(task, protocols[0], chosen, None) if len(protocols) == 1 else None
    sizes = {subject: len(splits[task.split]) for subject, splits in documents.items()}
    if task.name == "mmlu" and config.mmlu_subjects:
        unknown = [subject for subject in config.mmlu_subjects if subject not in sizes]
        if unknown:
            raise SdpoError(
                f"eval.mmlu_subjects has {unknown[0]!r}, but MMLU does not. It has: {', '.join(sorted(sizes))}."
            )
        sizes = {subject: sizes[subject] for subject in config.mmlu_subjects}
    protocol = h4.fingerprint(config.protocol, task, documents, config.dtype)
    return Questions(task, protocol, h4.select_items(sizes, config.limit), documents)


def _recipe(candidate: Candidate, asked: Questions) -> dict[str, str]:
    return {"model_key": candidate.model_key, "protocol": asked.protocol}


def _refuse_another_recipe(run: Run, candidate: Candidate, asked: Questions) -> None:
    file = f"{candidate.unit(asked.task.name)}.parquet"
    if not (run.path / file).exists():
        return
    items = run.read(candidate.unit(asked.task.name))
    for name, now in _recipe(candidate, asked).items():
        made = items.filter(pl.col(name) != now)[name]
        if len(made):
            raise SdpoError(
                f"{run.path / file} holds answers of {name} {made[0]}, now it is {now}. "
                "Choose another run folder, or --force to evaluate it again."
            )


def _evaluate_task(
    plan: Plan, candidate: Candidate, asked: Questions, known: pl.DataFrame, engine: "Callable[[], HFLM]"
) -> pl.DataFrame:
    """Ask a candidate what `known` does not hold for its weights; give `known` back with the answers."""
    unit, recipe = candidate.unit(asked.task.name), _recipe(candidate, asked)
    own = dict(zip(UNIT, (candidate.arm, candidate.seed, candidate.step), strict=True))
    same = known.filter(task=asked.task.name, **recipe)  # in any arm
    missing = sorted(set(asked.chosen) - set(same["item_id"]))
    finished = set(asked.chosen) <= set(same.filter(**own)["item_id"]) and unit in plan.run.lineage
    if finished or (missing and asked.documents is None):
        return known
    rows = same.unique("item_id", keep="first", maintain_order=True).with_columns(
        pl.lit(value, ITEMS[name]).alias(name) for name, value in own.items()
    )
    constant = {**own, **recipe, "task": asked.task.name}
    with plan.run.stage(unit, recipe, force=True) as stage:  # the plan has refused another recipe
        started = time.monotonic()
        for answers in _answers(engine, asked, missing, unit):
            rows = rows.vstack(pl.DataFrame([constant | answer for answer in answers], ITEMS))
            stage.write(unit, rows)
            plan.save_settings()
        if not missing:
            stage.write(unit, rows)
        log.info(
            "%s: %d items answered in %.0f s, %d known before",
            unit,
            len(missing),
            time.monotonic() - started,
            len(same),
        )
    return pl.concat([known, rows])


def _answers(engine: "Callable[[], HFLM]", asked: Questions, missing: list[str], unit: str) -> Iterator[list[dict]]:
    if not missing:
        return
    lm, items = engine(), asked.items(missing)
    with _quiet(), progress(unit, sum(len(item.pairs) for item in items), "answers") as advance:
        hook: Any = _AnswerCount(advance)
        lm.set_cache_hook(hook)
        for first in range(0, len(items), SAVE_EVERY):
            yield answer_items(lm, asked.task, items[first : first + SAVE_EVERY])


class _AnswerCount:
    """Stands where lm-eval keeps its cache, which is told of every answer: the bar moves inside a task."""

    def __init__(self, advance: Callable[[int], None]):
        self.advance = advance

    def add_partial(self, *_: Any) -> None:
        self.advance(1)


@contextmanager
def _opened(candidate: Candidate, config: EvalConfig) -> "Iterator[Callable[[], HFLM]]":
    """Yield a function that loads the model when it is first called; free the model at the end."""
    loaded: list[HFLM] = []

    def engine() -> "HFLM":
        if not loaded:
            model, tokenizer = _load(candidate, config.dtype)
            with _quiet():
                loaded.append(prefix_lm(model, tokenizer, config.token_budget))
        return loaded[0]

    yield engine
    if loaded:
        import torch

        loaded.clear()
        gc.collect()
        torch.cuda.empty_cache()


def _load(candidate: Candidate, dtype: str) -> Any:
    """Load a candidate's model and tokenizer, having seen that the weights are those it stands for."""
    import torch

    if isinstance(candidate.model, tuple):
        model, tokenizer = candidate.model
        if model.dtype != getattr(torch, dtype):
            raise SdpoError(
                f"The model {candidate.arm!r} is in {str(model.dtype)[6:]}, but eval.dtype is {dtype}: "
                "all models must be in one. Convert it, or set the other."
            )
        return model, tokenizer
    stored = model_key(candidate.model) == candidate.model_key  # if not, it may be the key of its float32 weights
    model, tokenizer = load_model(candidate.model, dtype if stored else "float32")
    if not stored and model_key(model) != candidate.model_key:
        raise SdpoError(
            f"{candidate.model} does not hold the weights of arm {candidate.arm}, seed {candidate.seed}, step "
            f"{candidate.step}: their key is {candidate.model_key}. It has changed since, or is another model."
        )
    return model.to(getattr(torch, dtype)), tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's warnings on what is meant here, and the bars of datasets."""
    import datasets

    logger, bars = logging.getLogger("lm_eval"), not datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _write_results(plan: Plan) -> pl.DataFrame:
    """Derive results.parquet: of every model in the run, the tasks of which it has answered all that is asked."""
    key = ["task", "protocol", "item_id"]
    rows = [(name, asked.protocol, item) for name, asked in plan.questions.items() for item in asked.chosen]
    wanted = pl.DataFrame(rows, [(name, ITEMS[name]) for name in key], orient="row")
    wanted = wanted.with_columns(count=pl.len().over("task"))
    items, model = plan.run.items, [*UNIT, "task"]
    whole = items.join(wanted, on=key).filter(pl.len().over(model) == pl.col("count"))
    others = items.select(model).unique().join(whole, on=model, how="anti").sort(model)
    path = plan.run.path / "results.parquet"
    if others.height:
        name = "-".join(map(str, others.row(0)))
        log.warning("%s leaves out %d evaluations of other or fewer items, e.g. %s.", path, others.height, name)
    results = h4.summarise_items(whole)
    if not path.exists() or not plan.run.results.equals(results):
        protocols = {name: asked.protocol for name, asked in plan.questions.items()}
        recipe = plan.config.model_dump(exclude={"token_budget"})
        with plan.run.stage("results", recipe | {"protocols": protocols}, force=True) as stage:
            stage.write("results", results)
            plan.save_settings()
    return results
