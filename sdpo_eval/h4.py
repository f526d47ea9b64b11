"""H4 as a protocol: which tasks, documents and items, and what the mean is. No torch, no lm-eval.

H4 is the mean of four tasks (arXiv 2403.19270, table 2). Protocol `h4-lmeval` is those tasks as
lm-eval 0.4.13 builds them with the shots of its `openllm` group; harness.py has lm-eval build
them. Two runs ask the same only where their protocol, which ends in a fingerprint, is the same.
"""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from sdpo_data import assets
from sdpo_data.tables import RESULTS, SdpoError
from sdpo_eval import stats

log = logging.getLogger(__name__)

LM_EVAL = "0.4.13"
SHOTS_SEED = 1234  # of lm-eval's sampler: simple_evaluate(fewshot_random_seed=1234), its default
BOS = "tokenizer"  # BOS where the tokenizer adds one by default, as HFLM(add_bos_token=None) does
MEAN = "h4"  # the task name of the mean

Documents = dict[str, dict[str, list[dict[str, Any]]]]
"""subject -> split -> documents in file order. MMLU has 57 subjects, the other tasks one: themselves."""


@dataclass(frozen=True)
class Task:
    """One of the four tasks: what is asked, where it comes from, what is averaged."""

    name: str
    title: str
    shots: int
    metric: str
    """What is averaged over items (MMLU: over subjects)."""
    chance: float
    """What guessing scores, points."""
    n_full: int
    """Documents of a full run."""
    split: str
    """Where the evaluated documents are; the other split of `files` gives the shots."""
    files: Mapping[str, str]
    """Split -> file in a data folder."""
    hub: tuple[str, str | None]
    """Hub id and configuration."""
    fields: tuple[str, ...]
    """What the task reads of a document."""
    yaml: str
    """The task's definition in lm-eval; {subject} where there is one for each."""
    sources: tuple[str, ...]
    """Every file of lm-eval that says what is asked."""


TASKS = {
    task.name: task
    for task in (
        Task(
            name="arc_challenge", title="ARC-Challenge", shots=25, metric="acc_norm", chance=25.0, n_full=1172,
            split="test", files={"train": "ARC-Challenge-train.jsonl.gz", "test": "ARC-Challenge-test.jsonl.gz"},
            hub=("allenai/ai2_arc", "ARC-Challenge"), fields=("question", "choices", "answerKey"),
            yaml="arc/arc_challenge.yaml", sources=("arc/arc_challenge.yaml", "arc/arc_easy.yaml"),
        ),
        Task(
            name="hellaswag", title="HellaSwag", shots=10, metric="acc_norm", chance=25.0, n_full=10042,
            split="validation",
            files={"train": "hellaswag_train_processed.jsonl.gz", "validation": "hellaswag_val.jsonl.gz"},
            hub=("Rowan/hellaswag", None), fields=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
            yaml="hellaswag/hellaswag.yaml", sources=("hellaswag/hellaswag.yaml", "hellaswag/utils.py"),
        ),
        Task(
            name="mmlu", title="MMLU", shots=5, metric="acc", chance=25.0, n_full=14042,
            split="test", files={"dev": "mmlu_dev.jsonl.gz", "test": "mmlu_test.jsonl.gz"},
            hub=("cais/mmlu", "all"), fields=("subject", "question", "choices", "answer"),
            yaml="mmlu/default/mmlu_{subject}.yaml",
            sources=("mmlu/default/_default_template_yaml", "mmlu/default/mmlu_*.yaml"),
        ),
        Task(  # chance: the mean over its questions of the share of true choices, 0.4484
            name="truthfulqa_mc2", title="TruthfulQA", shots=0, metric="mc2", chance=44.84, n_full=817,
            split="validation", files={"validation": "truthfulqa_mc.jsonl.gz"},
            hub=("truthfulqa/truthful_qa", "multiple_choice"), fields=("question", "mc2_targets"),
            yaml="truthfulqa/truthfulqa_mc2.yaml",
            sources=("truthfulqa/truthfulqa_mc2.yaml", "truthfulqa/truthfulqa_mc1.yaml", "truthfulqa/utils.py"),
        ),
    )
}  # fmt: skip
PROCESSED = ("query", "choices", "gold")  # HellaSwag's train file, which lm-eval's preprocess has been through


def load_documents(task: Task, data_dir: str, truthfulqa: str = "truthfulqa/truthful_qa") -> Documents | None:
    """Read a task's documents, shots included, with the fields that the task reads.

    Args:
        task: one of TASKS.
        data_dir: "hub", embedded:NAME, or a folder that holds `task.files`.
        truthfulqa: where TruthfulQA comes from if not from `data_dir`: a file, or a hub id.

    Returns:
        The documents; None, with a warning, for TruthfulQA on a hub that does not answer.

    Raises:
        SdpoError: a file is missing, cannot be read, or does not hold the whole task.
    """
    folder = None if data_dir == "hub" else assets.benchmark_folder(data_dir)
    if task.name == "truthfulqa_mc2" and not (folder and (folder / task.files[task.split]).exists()):
        return _truthfulqa(task, truthfulqa)
    if folder is None:
        return _grouped(task, _from_hub(task, task.hub[0]), task.hub[0])
    return _grouped(task, {split: _read(folder / file, task) for split, file in task.files.items()}, str(folder))


def _truthfulqa(task: Task, source: str) -> Documents | None:
    if Path(source).suffix in (".gz", ".jsonl") or Path(source).is_file():
        return _grouped(task, {task.split: _read(Path(source), task)}, source)
    try:
        return _grouped(task, _from_hub(task, source), source)
    except SdpoError:
        try:
            assets.require_hub(f"TruthfulQA ({source})")
        except SdpoError as silence:
            log.warning("TruthfulQA is not asked, and H4 needs it. %s For it, name a file in eval.truthfulqa.", silence)
            return None
        raise  # the hub answers: it is the name that is wrong


def _from_hub(task: Task, repo: str) -> dict[str, list[dict[str, Any]]]:
    return {split: assets.hub_dataset(repo, task.hub[1], split).to_list() for split in task.files}


def _read(path: Path, task: Task) -> list[dict[str, Any]]:
    if not path.exists():
        raise SdpoError(f"{path} does not exist; {task.title} is read from it. See eval.data_dir and eval.truthfulqa.")
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return [json.loads(line) for line in text.splitlines()]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise SdpoError(f"{path} cannot be read as JSON lines: {error}. Fetch it again.") from None


def _grouped(task: Task, splits: dict[str, list[dict[str, Any]]], place: str) -> Documents:
    """Keep what the task reads, sort documents under their subjects, and refuse half a task."""
    documents: Documents = {}
    for split, rows in splits.items():
        for number, row in enumerate(rows):
            if all(field in row for field in task.fields):
                document = {field: row[field] for field in task.fields}
            elif task.name == "hellaswag" and all(field in row for field in PROCESSED):
                document = {"query": row["query"], "choices": row["choices"], "label": str(row["gold"])}
            else:
                raise SdpoError(
                    f"{place}: row {number} of {task.title}'s {split} documents lacks one of {', '.join(task.fields)}."
                )
            subject = document.get("subject", task.name)
            documents.setdefault(subject, {name: [] for name in task.files})[split].append(document)
    found = sum(len(splits[task.split]) for splits in documents.values())
    if found != task.n_full:
        raise SdpoError(
            f"{place} holds {found:,} {task.split} documents of {task.title}, the task has {task.n_full:,}. "
            "Its scores would be those of another test; fetch the whole of it."
        )
    return documents


def fingerprint(protocol: str, task: Task, documents: Documents, dtype: str) -> str:
    """Name what a task asks and how it is scored, as `protocol@hash`: the same name, the same question.

    The hash is over lm-eval's version and its files that define the task, the shots and their
    seed, the documents as they are read, the BOS rule and the dtype; it needs no import of lm-eval.

    Raises:
        SdpoError: lm-eval is missing, or not the protocol's version.
    """
    spec = importlib.util.find_spec("lm_eval")
    version = importlib.metadata.version("lm_eval") if spec else "missing"
    if not spec or not spec.origin or version != LM_EVAL:
        raise SdpoError(f"{protocol} is defined by lm-eval {LM_EVAL}; here it is {version}. pip install 'sdpo[eval]'.")
    folder = Path(spec.origin).parent / "tasks"
    text = [
        (str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest())
        for source in task.sources
        for path in sorted(folder.glob(source))
    ]
    content = hashlib.sha256()
    for subject, splits in sorted(documents.items()):
        content.update(json.dumps([subject, splits], sort_keys=True, ensure_ascii=False).encode())
    rule = [protocol, LM_EVAL, text, task.shots, SHOTS_SEED, task.metric, content.hexdigest(), BOS, dtype]
    return f"{protocol}@{hashlib.sha256(json.dumps(rule).encode()).hexdigest()[:12]}"


def select_items(sizes: Mapping[str, int], limit: int | None) -> list[str]:
    """Choose a task's items: all of them, or the first `limit` of an order that never changes.

    Subjects take turns, so that each gives floor or ceil of limit / subjects items until one is
    used up; the order of items in a subject, and of subjects, is that of their ids' sha256. So a
    smaller limit chooses a subset, and an item's place does not depend on the data.

    Args:
        sizes: subject -> its documents.

    Returns:
        Item ids, "subject/row" with the row counted from 0 in its subject.
    """
    order = []
    for subject, size in sizes.items():
        items = sorted((f"{subject}/{row}" for row in range(size)), key=_drawn)
        order += [(turn, _drawn(subject), item) for turn, item in enumerate(items)]
    return [item for _, _, item in sorted(order)[:limit]]


def _drawn(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def summarise_items(items: pl.DataFrame) -> pl.DataFrame:
    """Average items into RESULTS: a row per model and task, and the mean where all four are there.

    MMLU is the plain mean over the subjects that have items, each a stratum; the other tasks are
    means over items. H4's standard error takes the four as independent.

    Args:
        items: ITEMS frame, with one protocol per task.

    Returns:
        RESULTS frame, points of 100; the base model (step 0) first, tasks in the order of TASKS.
    """
    rows = []
    for key, own in items.group_by("arm", "seed", "step", "model_key", maintain_order=True):
        tasks = {}
        for name, task in TASKS.items():
            group = own.filter(task=name)
            if group.height:
                value, stderr = stats.macro_mean_stderr((100 * group["score"]).to_list(), group["subject"].to_list())
                tasks[name] = (group["protocol"][0], name, task.metric, value, stderr, group.height, task.n_full)
        rows += [(*key, *row, "all") for row in tasks.values()]
        if tasks.keys() == TASKS.keys():
            protocols, _, _, values, stderrs, counts, full = zip(*tasks.values(), strict=True)
            value, stderr = stats.mean_of_means(values, stderrs)
            rows.append((*key, _joint(protocols), MEAN, "mean", value, stderr, sum(counts), sum(full), "all"))
    results = pl.DataFrame(rows, RESULTS, orient="row")
    place = pl.col("task").replace_strict({name: place for place, name in enumerate([*TASKS, MEAN])})
    return results.sort(pl.col("step") > 0, "arm", "seed", "step", place)


def _joint(protocols: tuple[str, ...]) -> str:
    name = protocols[0].split("@")[0]
    return f"{name}@{hashlib.sha256(' '.join(protocols).encode()).hexdigest()[:12]}"
