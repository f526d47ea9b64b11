"""H4 as a protocol: which tasks and items, and what the mean is. No torch, no lm-eval.

H4 is the mean of four tasks (arXiv 2403.19270, table 2). Protocol `h4-lmeval` is those tasks as
lm-eval 0.4.13 builds them with the shots of its `openllm` group (harness.py has lm-eval build
them); `h4-v1` is the Open LLM Leaderboard v1 (h4_v1.py). Two runs ask the same only where their
protocol, which ends in a fingerprint, is the same.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from sdpo_data.tables import RESULTS
from sdpo_eval import stats

MEAN = "h4"  # the task name of the mean


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
    published: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Split -> rows and checksum (see documents.py) of the published documents."""
    made_from: str = ""
    """The field that names what a document was made from, where several were made from one: no independent draws."""


TASKS = {
    task.name: task
    for task in (
        Task(
            name="arc_challenge", title="ARC-Challenge", shots=25, metric="acc_norm", chance=25.0, n_full=1172,
            split="test", files={"train": "ARC-Challenge-train.jsonl.gz", "test": "ARC-Challenge-test.jsonl.gz"},
            hub=("allenai/ai2_arc", "ARC-Challenge"), fields=("question", "choices", "answerKey"),
            yaml="arc/arc_challenge.yaml", sources=("arc/arc_challenge.yaml", "arc/arc_easy.yaml"),
            published={"train": (1119, "461a697ad56cc82f"), "test": (1172, "a35340109204931a")},
        ),
        Task(
            name="hellaswag", title="HellaSwag", shots=10, metric="acc_norm", chance=25.0, n_full=10042,
            split="validation",
            files={"train": "hellaswag_train_processed.jsonl.gz", "validation": "hellaswag_val.jsonl.gz"},
            hub=("Rowan/hellaswag", None), fields=("activity_label", "ctx_a", "ctx_b", "endings", "label", "source_id"),
            yaml="hellaswag/hellaswag.yaml", sources=("hellaswag/hellaswag.yaml", "hellaswag/utils.py"),
            published={"train": (39905, "f030e4b592e66ac8"), "validation": (10042, "d7d8aa6bba1f0a14")},
            made_from="source_id",
        ),
        Task(
            name="mmlu", title="MMLU", shots=5, metric="acc", chance=25.0, n_full=14042,
            split="test", files={"dev": "mmlu_dev.jsonl.gz", "test": "mmlu_test.jsonl.gz"},
            hub=("cais/mmlu", "all"), fields=("subject", "question", "choices", "answer"),
            yaml="mmlu/default/mmlu_{subject}.yaml",
            sources=("mmlu/default/_default_template_yaml", "mmlu/default/mmlu_*.yaml"),
            published={"dev": (285, "79677d836f37b53e"), "test": (14042, "8918e500863c6478")},
        ),
        Task(  # chance: the mean over its questions of the share of true choices, 0.4484
            name="truthfulqa_mc2", title="TruthfulQA", shots=0, metric="mc2", chance=44.84, n_full=817,
            split="validation", files={"validation": "truthfulqa_mc.jsonl.gz"},
            hub=("truthfulqa/truthful_qa", "multiple_choice"), fields=("question", "mc2_targets"),
            yaml="truthfulqa/truthfulqa_mc2.yaml",
            sources=("truthfulqa/truthfulqa_mc2.yaml", "truthfulqa/truthfulqa_mc1.yaml", "truthfulqa/utils.py"),
            published={"validation": (817, "8d9617acec484538")},
        ),
    )
}  # fmt: skip


BUDGETS: dict[str, dict[str, int]] = {  # items per task; a task that is not named is asked whole
    "full": {},
    "standard": {"hellaswag": 2000, "mmlu": 57 * 35},
    "small": {"arc_challenge": 150, "hellaswag": 200, "mmlu": 57 * 5, "truthfulqa_mc2": 400},
    "tiny": {"arc_challenge": 25, "hellaswag": 25, "mmlu": 57, "truthfulqa_mc2": 100},
}
"""Named subsets of H4, each within the next larger one: EVAL.md's noise for its cost, and smaller."""


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


def largest_stderr(sizes: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, float]:
    """Say beforehand what a choice of items can tell: standard errors, points, about the largest there can be.

    An item's score lies in 0 to 1, so its standard deviation is 50 points at most; MMLU's subjects
    are strata, each counting once; the items of a cluster are taken to have one score. Only about: a spread
    that is estimated may come out larger, and so it is where few clusters are much larger than others.

    Args:
        sizes: task -> subject -> items asked of each of its clusters.

    Returns:
        task -> standard error of its score; and of "h4" where all four are asked.
    """
    largest = {
        name: math.sqrt(sum(50**2 * sum(n**2 for n in own) / sum(own) ** 2 for own in subjects.values()))
        / len(subjects)
        for name, subjects in sizes.items()
    }
    if largest.keys() >= TASKS.keys():
        largest[MEAN] = math.hypot(*(largest[name] for name in TASKS)) / len(TASKS)
    return largest


def _drawn(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def summarise_items(
    items: pl.DataFrame, subset: str = "all", left_out: Mapping[str, int] | None = None
) -> pl.DataFrame:
    """Average items into RESULTS: a row per model and task, and the mean where all four are there.

    MMLU is the plain mean over the subjects that have items, each a stratum; the other tasks are
    means over items, HellaSwag's clustered by source document. H4's standard error takes the four as independent.

    Args:
        items: ITEMS frame, with one protocol per task.
        subset: what the items are: all that were asked, or the clean ones.
        left_out: task -> questions that the subset leaves out of the whole task.

    Returns:
        RESULTS frame, points of 100; the base model (step 0) first, tasks in the order of TASKS.
    """
    rows = []
    for key, own in items.group_by("arm", "seed", "step", "model_key", maintain_order=True):
        tasks = {}
        for name, task in TASKS.items():
            group = own.filter(task=name)
            if group.height:
                value, stderr = stats.macro_mean_stderr(100 * group["score"], group["subject"], group["cluster"])
                n_full = task.n_full - (left_out or {}).get(name, 0)
                tasks[name] = (group["protocol"][0], name, task.metric, value, stderr, group.height, n_full)
        rows += [(*key, *row, subset) for row in tasks.values()]
        if tasks.keys() == TASKS.keys():
            protocols, _, _, values, stderrs, counts, full = zip(*tasks.values(), strict=True)
            value, stderr = stats.mean_of_means(values, stderrs)
            rows.append((*key, _joint(protocols), MEAN, "mean", value, stderr, sum(counts), sum(full), subset))
    results = pl.DataFrame(rows, RESULTS, orient="row")
    place = pl.col("task").replace_strict({name: place for place, name in enumerate([*TASKS, MEAN])})
    return results.sort(pl.col("step") > 0, "arm", "seed", "step", place)


def _joint(protocols: tuple[str, ...]) -> str:
    name = protocols[0].split("@")[0]
    return f"{name}@{hashlib.sha256(' '.join(protocols).encode()).hexdigest()[:12]}"
