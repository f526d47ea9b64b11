"""The only file that imports lm_eval: it has lm-eval write questions, and gives it a model on the prefix engine."""

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdpo_data.prefix import score_completions
from sdpo_eval.documents import SHOTS_SEED, Documents
from sdpo_eval.h4 import Task
from sdpo_eval.questions import Item

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
