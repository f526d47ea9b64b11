"""Whom to ask what: settings, candidates, questions. Refuses what cannot be before anything is done; no torch."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import polars as pl
import pydantic
import ruamel.yaml

from sdpo_data import workers
from sdpo_data.config import Settings, merge_config
from sdpo_data.models import model_key
from sdpo_data.run import Run, Stage, only_kept, write_atomically
from sdpo_data.tables import DOCUMENTS, ITEMS, STEPS, UNIT, SdpoError, check
from sdpo_eval import h4
from sdpo_eval.documents import document_text, fingerprint, load_documents
from sdpo_eval.questions import Questions, tokenizer_key, tokenizer_key_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Model = str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase]
    Models = pl.DataFrame | Model | Mapping[str, Model]

log = logging.getLogger(__name__)

ANSWERS = pl.Schema({**ITEMS, "tokenizer_key": pl.String})  # ITEMS as a run keeps them; null: not noted
OTHER_TASKS = {"full": None, "standard": 2000, "small": 200, "tiny": 50}  # first documents of a task beside H4


class EvalConfig(Settings):
    protocol: Literal["h4-lmeval", "h4-v1"] = "h4-lmeval"
    """What is asked and how it is scored: as lm-eval 0.4.13 does, or as the Open LLM Leaderboard v1 did."""
    tasks: list[str] = pydantic.Field(["h4"], min_length=1)
    """h4, or of its tasks arc_challenge, hellaswag, mmlu, truthfulqa_mc2; and any other task of lm-eval, kept apart."""
    budget: Literal["full", "standard", "small", "tiny"] = "full"
    """Named subset of H4, always the same items: without it all 26,073; standard is 28 % of the tokens, tiny 207."""
    limit: int | None = pydantic.Field(None, ge=1)
    """Items per task instead of a budget, MMLU's spread over its subjects, always the same ones; None for all."""
    mmlu_subjects: list[str] = pydantic.Field([])
    """Only these of MMLU's 57 subjects; empty for all."""
    data_dir: str = "embedded:h4"
    """Where documents come from: hub, embedded:h4, or a folder with its files."""
    truthfulqa: str = "truthfulqa/truthful_qa"
    """TruthfulQA where data_dir has none: a hub id, or a .jsonl(.gz) file."""
    task_dir: str | None = None
    """Folder with lm-eval task files (YAML) of your own, for tasks beside H4."""
    steps: Literal["all", "last"] = "all"
    """Evaluate every finished step, or of every arm and seed the last one; the base model always."""
    seeds: list[int] = pydantic.Field([])
    """Evaluate the models of these seeds only; empty for all."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and forward pass, the same for every model."""
    token_budget: int | None = pydantic.Field(None, ge=1)
    """Tokens of a forward pass at most; None for what suits the device. Changes the numbers only within float noise."""

    @pydantic.model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.limit is not None and self.budget != "full":
            raise ValueError(f"limit {self.limit} and budget {self.budget!r} both say how many items; set one of them")
        return self


def h4_tasks(config: EvalConfig) -> list[str]:
    """Name those of H4's four that are asked, in H4's order."""
    return [name for name in h4.TASKS if name in config.tasks or h4.MEAN in config.tasks]


def other_tasks(config: EvalConfig) -> list[str]:
    """Name the tasks of lm-eval that are asked beside H4."""
    return [name for name in dict.fromkeys(config.tasks) if name not in (*h4.TASKS, h4.MEAN)]


def other_limit(config: EvalConfig) -> int | None:
    """Count the documents, the first ones, that each task beside H4 is asked."""
    return config.limit if config.limit is not None else OTHER_TASKS[config.budget]


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate, and where it stands in the run."""

    arm: str
    seed: int
    step: int
    model: "Model"
    model_key: str
    tokenizer_key: str | None
    """None: out of reach, so that nothing can be asked; what was answered stands."""

    def unit(self, task: str) -> str:
        return f"items/{self.arm}-{self.seed}-{self.step}-{task}"


@dataclass(frozen=True)
class Plan:
    """Whom to ask what."""

    run: Run
    config: EvalConfig
    candidates: list[Candidate]
    questions: dict[str, Questions]
    missing_tasks: list[str]
    """Those of H4's whose documents are out of reach."""
    force: bool
    chain: bool
    """The candidates are the steps of one run: what differs between them must be the weights alone."""

    def keep(self, stage: Stage, table: str, frame: pl.DataFrame) -> None:
        """Write a table of answers and the settings they were asked by; of several processes the main one does."""
        if workers.is_main():
            stage.write(table, frame)
            self.save_settings()

    def keep_texts(self, documents: pl.DataFrame) -> None:
        """Write questions as text, once for each task and protocol: what flips is shown by it."""
        for (task, protocol), own in documents.group_by("task", "protocol"):
            path = self.run.path / f"questions/{task}-{protocol}.parquet"
            if workers.is_main() and not path.exists():
                write_atomically(path, own.write_parquet)

    @property
    def base_tokenizer(self) -> str | None:
        """The tokenizer that a run's steps have, as copies of the base model's; None where models are not one run's."""
        return self.candidates[0].tokenizer_key if self.chain else None

    def read_answers(self) -> pl.DataFrame:
        """Read what the run holds: an ANSWERS frame.

        Answers from before tokenizers were noted are taken for those of the tokenizer that their model has
        now; of a model that is not asked, for those of the base model's.
        """
        answers = read_answers(self.run)
        if count := answers.filter(pl.col("task").is_in(list(self.questions)))["tokenizer_key"].null_count():
            log.info("%d answers name no tokenizer: taken for those of the tokenizers the models have now.", count)
        known = {f"{one.arm}/{one.seed}/{one.step}": one.tokenizer_key for one in self.candidates}
        theirs = pl.format("{}/{}/{}", *UNIT).replace_strict(known, default=self.base_tokenizer, return_dtype=pl.String)
        return answers.with_columns(pl.col("tokenizer_key").fill_null(theirs))

    def save_settings(self) -> None:
        first, model = self.candidates[0], {}
        if first.arm == "base" and not isinstance(first.model, tuple) and self.run.steps.is_empty():
            model = {"model": str(first.model)}  # where there are steps, it is the model they were trained from
        merge_config(self.run, model | {"eval": self.config.model_dump(mode="json")})


def plan_evaluation(
    models: "Models", config: EvalConfig, run: Run, *, base: "Model | None" = None, force: bool = False
) -> Plan:
    """Find out whom to ask what, and refuse what cannot be, before anything is done: see `evaluate`."""
    candidates = _candidates(models, run, config, base)
    questions = workers.from_main(lambda: plan_questions(config, run))  # one of them asks the hub, or all may differ
    missing = [name for name in h4_tasks(config) if name not in questions or not questions[name].documents]
    if not force:
        for candidate in candidates:
            for asked in questions.values():
                _refuse_another_recipe(run, candidate, asked)
    return Plan(run, config, candidates, questions, missing, force, isinstance(models, pl.DataFrame))


def plan_questions(config: EvalConfig, run: Run) -> dict[str, Questions]:
    """Choose the items of H4's tasks; a task whose documents are out of reach and unknown is not in it."""
    found = {name: _questions(h4.TASKS[name], config, run) for name in h4_tasks(config)}
    return {name: asked for name, asked in found.items() if asked}


def read_answers(run: Run) -> pl.DataFrame:
    """Read the items of a run, and the tokenizer they were asked with where it was noted: an ANSWERS frame."""
    frames = [ANSWERS.to_frame()]
    for path in sorted(run.path.glob("items/*.parquet")):
        frame = run.read(f"items/{path.stem}")
        noted = frame["tokenizer_key"] if "tokenizer_key" in frame.columns else pl.lit(None, pl.String)
        frames.append(check(frame, ITEMS, str(path)).with_columns(noted.alias("tokenizer_key")))
    return pl.concat(frames)


def list_documents(questions: Iterable[Questions], *, every: bool = False) -> pl.DataFrame:
    """Give what is evaluated as text, to hold training data against: DOCUMENTS.

    Args:
        every: all items of the tasks; if not, those that are asked.
    """
    rows = [
        (asked.protocol, asked.task.name, item_id, document_text(asked.document(item_id)))
        for asked in questions
        for item_id in ((asked.every if every else asked.chosen) if asked.documents else [])
    ]
    return pl.DataFrame(rows, DOCUMENTS, orient="row")


def describe_cost(questions: Mapping[str, Questions], size: str) -> list[str]:
    """Say how much is asked and what it can tell, before it is asked."""
    titles = {name: task.title for name, task in h4.TASKS.items()} | {h4.MEAN: "H4"}
    asked = ", ".join(
        f"{titles[name]} {len(own.chosen):,} of {h4.TASKS[name].n_full:,}" for name, own in questions.items()
    )
    sizes = {name: _cluster_sizes(own) for name, own in questions.items()}
    errors = ", ".join(f"{titles[name]} {error:.2f}" for name, error in h4.largest_stderr(sizes).items())
    return [f"{size}, questions: {asked}", f"standard errors, points, at most about: {errors}"] if questions else []


def _cluster_sizes(asked: Questions) -> dict[str, list[int]]:
    """Count, by subject, the chosen items of each cluster; each is its own where the documents are out of reach."""
    clusters: dict[str, Counter[str]] = {}
    for item in asked.chosen:
        subject = item.rpartition("/")[0]
        clusters.setdefault(subject, Counter())[asked.cluster(item) if asked.documents else item] += 1
    return {subject: list(own.values()) for subject, own in clusters.items()}


def _candidates(models: Any, run: Run, config: EvalConfig, base: "Model | None") -> list[Candidate]:
    if not isinstance(models, pl.DataFrame):
        named = models if isinstance(models, Mapping) else {"base": models}
        rows: list[tuple] = [(name, 0, 0, model, _key(model)) for name, model in named.items()]
    else:
        steps = check(models, STEPS, "steps")
        base = base or _base_model(run)
        keys = steps.filter(step=1)["start_key"].unique().to_list() or [_key(base)]
        if len(keys) > 1:
            raise SdpoError(f"The steps start from {len(keys)} different models. Evaluate one run at a time.")
        if missing := sorted(set(config.seeds) - set(steps["seed"])):
            raise SdpoError(f"eval.seeds has {missing[0]}, but no step is finished with it. Finished: {_seeds(steps)}.")
        if config.seeds:
            steps = steps.filter(pl.col("seed").is_in(config.seeds))
        if config.steps == "last":
            steps = steps.filter(pl.col("step") == pl.col("step").max().over("arm", "seed"))
        kept = only_kept(steps, "what is evaluated").select(*UNIT, "model", "model_key").rows()
        rows: list[tuple] = [("base", 0, 0, base, keys[0]), *kept]
    found = [Candidate(arm, seed, step, model, key, _tokenizer_key(model)) for arm, seed, step, model, key in rows]
    for candidate in found:
        if not re.fullmatch(r"[\w.+=,-]+", candidate.arm):
            raise SdpoError(
                f"A model cannot be called {candidate.arm!r}, as its files are: use letters, digits and .,_+=- only."
            )
    return found


def _seeds(steps: pl.DataFrame) -> str:
    return ", ".join(f"seed {seed}" for seed in steps["seed"].unique().sort())


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
        if any(parameter.is_meta for parameter in model[0].parameters()):
            raise SdpoError(
                f"A loaded {type(model[0]).__name__} has weights off its device, so it is not known by them. Give its "
                "folder: what is larger than a device is spread over several by itself."
            )
        return model_key(model[0])
    raise SdpoError(
        f"Cannot evaluate a {type(model).__name__}. Give a folder, a hub id, embedded:NAME, or (model, tokenizer)."
    )


def _tokenizer_key(model: Any) -> str | None:
    if isinstance(model, tuple):
        return tokenizer_key(model[1])
    try:
        return tokenizer_key_of(model)
    except SdpoError:  # said where the model is needed; if all is answered, it is not
        return None


def _questions(task: h4.Task, config: EvalConfig, run: Run) -> Questions | None:
    limit = config.limit if config.limit is not None else h4.BUDGETS[config.budget].get(task.name)
    documents = load_documents(task, config.data_dir, config.truthfulqa)
    if documents is None:  # what was answered on a better day still stands
        known = run.items.filter(pl.col("protocol").str.starts_with(f"{config.protocol}@"), task=task.name)
        chosen = h4.select_items({task.name: task.n_full}, limit)
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
    protocol = fingerprint(config.protocol, task, documents, config.dtype)
    return Questions(task, protocol, h4.select_items(sizes, limit), documents)


def recipe_of(candidate: Candidate, asked: Questions) -> dict[str, str]:
    """Say by what answers are kept, beside their item."""
    own = {"model_key": candidate.model_key, "protocol": asked.protocol}
    return own | ({"tokenizer_key": candidate.tokenizer_key} if candidate.tokenizer_key else {})


def _refuse_another_recipe(run: Run, candidate: Candidate, asked: Questions) -> None:
    file = f"{candidate.unit(asked.task.name)}.parquet"
    if not (run.path / file).exists():
        return
    items = run.read(candidate.unit(asked.task.name))
    recipe = recipe_of(candidate, asked)
    for name, now in ((name, now) for name, now in recipe.items() if name in items.columns):
        made = items.filter(pl.col(name) != now)[name]
        if len(made):
            raise SdpoError(
                f"{run.path / file} holds answers of {name} {made[0]}, now it is {now}. "
                "Choose another run folder, or --force to evaluate it again."
            )
