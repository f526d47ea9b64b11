"""The only file that imports lm_eval: it has lm-eval write questions, and gives it a model on the prefix engine."""

import difflib
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub.errors import HTTPError

from sdpo_data import workers
from sdpo_data.prefix import score_together
from sdpo_data.tables import SdpoError
from sdpo_eval.documents import LM_EVAL, SHOTS_SEED, Documents
from sdpo_eval.h4 import Task
from sdpo_eval.questions import Item

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match", "em", "f1", "mc1", "mc2")  # in 0 to 1: given in points


def write_items(task: Task, documents: Documents, item_ids: Iterable[str]) -> Iterator[Item]:
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
    with quiet():
        for subject, wanted in sorted(rows.items()):
            yield from _subject_items(task, subject, documents[subject], wanted)


def _subject_items(task: Task, subject: str, splits: dict[str, list[dict]], wanted: set[int]) -> Iterator[Item]:
    lm_task = _lm_eval_task(task, subject, splits)
    lm_task.set_fewshot_seed(SHOTS_SEED["h4-lmeval"])
    for row in range(max(wanted) + 1):
        if row in wanted:
            doc = lm_task.task_docs[row]
            context = lm_task.fewshot_context(doc, num_fewshot=task.shots)
            requests = cast(list, lm_task.construct_requests(doc, context))
            contexts, choices = zip(*(request.args for request in requests), strict=True)
            assert set(contexts) == {context}
            yield Item(f"{subject}/{row}", contexts[0], list(choices), _gold(lm_task, doc, len(choices)))
        elif task.shots:
            lm_task.sampler.sample(task.shots)


def _gold(lm_task: "ConfigurableTask", doc: dict[str, Any], choices: int) -> list[bool]:
    if "mc2_targets" in doc:
        return [label == 1 for label in doc["mc2_targets"]["labels"]]
    return [place == lm_task.doc_to_target(doc) for place in range(choices)]


def _lm_eval_task(task: Task, subject: str, splits: dict[str, list[dict]]) -> "ConfigurableTask":
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


def prefix_lm(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", token_budget: int | None = None
) -> "HFLM":
    """Give lm-eval's HFLM for a loaded model, with its log-probabilities from the prefix engine.

    It can stand wherever an HFLM does, for any task that weighs continuations. Requests are encoded by
    HFLM; what they share is computed once. All else (generation, models that are not causal) is
    HFLM's own. Processes of `accelerate launch` share the work, and each gets every answer. What is longer
    than the model reads loses its beginning, as with HFLM, and a warning says how much of it there is.

    Args:
        token_budget: tokens of a forward pass at most; None for what suits the device.

    Example:
        import lm_eval
        import sdpo_data
        import sdpo_eval

        lm = sdpo_eval.prefix_lm(*sdpo_data.load_model("my/model", "bfloat16"))
        got = lm_eval.simple_evaluate(model=lm, tasks=["winogrande", "lambada_openai"], limit=200)
        print(got["results"])
    """
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class PrefixLM(HFLM):
        never_cut: str | None = None
        """The task whose requests must not be cut: refused instead."""
        warned = False

        def _loglikelihood_tokens(
            self,
            requests: list,
            disable_tqdm: bool = False,  # noqa: FBT001 - HFLM's
            override_bs: int | None = None,
        ) -> list[tuple[float, bool]]:
            if self.backend != "causal":
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            lengths = [len(context) + len(answer) - 1 for _, context, answer in requests]  # the last is not read
            self._tell_cut(lengths, self.max_length)
            sequences = []
            for _, context, answer in requests:
                ids = (context + answer)[-(self.max_length + 1) :]  # as HFLM cuts
                sequences.append((ids, len(ids) - len(answer)))
            answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
            for places, completions in score_together(model, sequences, token_budget):
                for place, completion in zip(places, completions, strict=True):
                    answers[place] = (float(completion.logps.sum(dtype="float64")), completion.greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], answers[place])
            return answers

        def _tell_cut(self, lengths: list[int], limit: int, what: str = "") -> None:
            longer = [length for length in lengths if length > limit]
            if not longer or (self.warned and not self.never_cut):
                return
            said = (
                f"{len(longer):,} of {len(lengths):,} requests are longer than the {limit:,} tokens that the model "
                f"reads{what}, the longest has {max(longer):,}"
            )
            if self.never_cut:
                raise SdpoError(
                    f"{self.never_cut}: {said}. Their beginnings would be cut off, and its score be that of another "
                    "test. Leave the task out of eval.tasks."
                )
            log.warning("%s: their beginnings are cut off, as by HFLM. Said once for this model.", said)
            self.warned = True

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:  # noqa: FBT001 - HFLM's
            by_room: dict[int, list[int]] = {}
            for context, kwargs in (request.args for request in requests):
                room = normalize_gen_kwargs(kwargs, self.max_gen_toks)["max_gen_toks"]
                by_room.setdefault(room, []).append(len(self.tok_encode(context)))
            for room, lengths in by_room.items():
                self._tell_cut(lengths, self.max_length - room, f" before the {room:,} it writes")
            if any(request.args[1].get("do_sample") for request in requests):
                return super().generate_until(requests, disable_tqdm)  # one stream of random numbers: all do all
            said = [""] * len(requests)
            own = super().generate_until(requests[workers.rank() :: workers.count()], disable_tqdm)
            for rank, part in enumerate(workers.gather(own)):
                said[rank :: workers.count()] = part
            return said

    with quiet():  # of lm-eval's warnings that the model is loaded already
        return PrefixLM(pretrained=model, tokenizer=cast(Any, tokenizer))


def evaluate_task(lm: "HFLM", name: str, limit: int | None, task_dir: str | None, dtype: str) -> "Evaluated":
    """Evaluate a task of lm-eval, or a group of them, as simple_evaluate does: RESULTS and ITEMS without their model.

    Args:
        lm: see `prefix_lm`; what the task has generated comes from HFLM itself.
        limit: first documents of each task.
        task_dir: folder with task files of one's own.
        dtype: of the forward pass, for the fingerprint.

    Raises:
        SdpoError: there is no such task, its data is out of reach, or a request is longer than the model reads.
    """
    from lm_eval import simple_evaluate

    cast(Any, lm).never_cut = name
    with quiet():
        tasks, manager = _load_tasks(name, task_dir)
        got = simple_evaluate(model=lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=1000)
    return workers.from_main(lambda: _evaluated(got, tasks, dtype))  # lm-eval gives them to one process of a host


def _evaluated(got: Any, tasks: list[Any], dtype: str) -> "Evaluated":
    results, items, questions = [], [], []
    asks = {task.config.task: task for task in tasks}
    for task, samples in got["samples"].items():
        counts = got["n-samples"][task]
        hashes = sorted({(sample["doc_hash"], sample["prompt_hash"]) for sample in samples})
        rule = json.dumps([LM_EVAL, got["configs"][task], hashes, dtype], default=str)
        protocol = f"lm-eval@{hashlib.sha256(rule.encode()).hexdigest()[:12]}"
        results += _result_rows(task, protocol, got["results"][task], counts)
        first = samples[0]["filter"] if samples else None
        for sample in samples:
            if sample["filter"] == first:
                items += _item_rows(task, protocol, sample)
                text, key = _question(asks[task], sample["doc"]), f"{task}/{sample['doc_id']}"
                questions.append({"protocol": protocol, "task": task, "item_id": key, "text": text})
    return Evaluated(results, items, questions)


def list_questions(name: str, limit: int | None, task_dir: str | None) -> list[dict[str, Any]]:
    """List what a task of lm-eval asks, as text, without a model: rows of DOCUMENTS.

    Args:
        name: a task of lm-eval, or of task_dir.
        limit: only its first documents, as `evaluate_task` asks them; None for all.
        task_dir: folder with task files of one's own.

    Raises:
        SdpoError: there is no such task, or its data is out of reach.
    """
    with quiet():
        tasks, _ = _load_tasks(name, task_dir)
        return [
            {"protocol": f"lm-eval {LM_EVAL}", "task": task.config.task, "item_id": f"{task.config.task}/{place}"}
            | {"text": _question(task, doc)}
            for task in tasks
            for place, doc in task.doc_iterator(limit=limit)
        ]


def first_requests(name: str, tokenizer: "PreTrainedTokenizerBase", task_dir: str | None) -> "list[FirstRequest]":
    """Give what a task of lm-eval, or each of a group, asks first, as HFLM gives it to a model; without a model.

    Args:
        name: a task of lm-eval, or of task_dir.
        task_dir: folder with task files of one's own.

    Raises:
        SdpoError: there is no such task, or its data is out of reach.
    """
    from lm_eval.models.huggingface import HFLM

    class Encoder(HFLM):
        def _loglikelihood_tokens(self, requests: list, *_: Any, **__: Any) -> list:
            return requests

    encoder: Any = object.__new__(Encoder)  # HFLM's own tokens, without the model that its __init__ wants
    as_prefix_lm = dict.fromkeys(("add_bos_token", "custom_prefix_token_id", "enable_thinking"))
    vars(encoder).update(tokenizer=tokenizer, backend="causal", **as_prefix_lm)
    found = []
    with quiet():
        for task in _load_tasks(name, task_dir)[0]:
            if task.config.num_fewshot is None:  # as simple_evaluate does; the seed too
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SHOTS_SEED["h4-lmeval"])
            task.build_all_requests(limit=1)
            asked = task.instances[0]
            if asked.request_type == "loglikelihood":
                [(_, context, answer)] = encoder.loglikelihood([asked], disable_tqdm=True)
            else:
                context, answer = encoder.tok_encode(asked.args[0]), None
            found.append(FirstRequest(task.config.task, f"{task.config.task}/{asked.doc_id}", context, answer))
    return found


@dataclass(frozen=True)
class FirstRequest:
    """What a model reads of a task's first question, as token ids."""

    task: str
    item_id: str
    context: list[int]
    answer: list[int] | None
    """The first choice; None: the model writes one, or all of the context is weighed."""


def _question(task: Any, doc: dict[str, Any]) -> str:
    """Write a document's question; where the choices stand within it, as winogrande's, with the first one in place."""
    text = task.doc_to_text(doc)
    return text if isinstance(text, str) else str(task.doc_to_choice(doc)[0])


@dataclass(frozen=True)
class Evaluated:
    """What a task gave: the columns of RESULTS and of ITEMS that do not say which model it was; DOCUMENTS."""

    results: list[dict[str, Any]]
    items: list[dict[str, Any]]
    questions: list[dict[str, Any]]


def _load_tasks(name: str, task_dir: str | None) -> "tuple[list[Any], TaskManager]":
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=task_dir, include_defaults=False) if task_dir else None
    if manager is None or name not in manager.all_tasks:
        manager = TaskManager(include_path=task_dir)  # reads all of lm-eval's own, about 10 s
    if name not in manager.all_tasks:
        close = difflib.get_close_matches(name, manager.all_tasks, n=3)
        raise SdpoError(
            f"eval.tasks has {name!r}, which is neither of H4 nor of lm-eval {LM_EVAL}"
            f"{' nor in ' + task_dir if task_dir else ''}. Close to it: {', '.join(close) or 'nothing'}."
        )
    try:
        return list(manager.load([name])["tasks"].values()), manager
    except (OSError, ValueError, HTTPError) as error:
        raise SdpoError(
            f"The data of {name} cannot be had: {' '.join(str(error).split())[:200]}. Reach the hub once, so that it "
            "is cached, or name a folder with a task file on your own data in eval.task_dir, or do without the task."
        ) from None


def _result_rows(task: str, protocol: str, metrics: dict[str, Any], counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    for key, value in metrics.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = metrics.get(f"{metric}_stderr,{kind}")
        scale = 100 if metric in SHARES else 1
        known = isinstance(stderr, int | float) and math.isfinite(stderr) and stderr > 0
        yield {
            "protocol": protocol, "task": task, "metric": metric if kind == "none" else f"{metric} ({kind})",
            "value": scale * float(value), "stderr": scale * stderr if known else None,
            "n": counts["effective"], "n_full": counts["original"], "subset": "all",
        }  # fmt: skip


def _item_rows(task: str, protocol: str, sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    score = sample.get(sample["metrics"][0]) if sample["metrics"] else None
    if isinstance(score, int | float):  # a perplexity's parts are no score of a question
        said = sample["filtered_resps"]
        item_id = f"{task}/{sample['doc_id']}"
        weighed = [float(one[0]) for one in said if isinstance(one, list | tuple) and isinstance(one[0], int | float)]
        yield {
            "protocol": protocol, "task": task, "item_id": item_id, "subject": task, "cluster": item_id,
            "correct": float(score) if score in (0, 1) else None, "score": float(score), "gold_logp": None,
            "choice_logps": weighed,
        }  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
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
