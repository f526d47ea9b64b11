"""H4 on the prefix engine against lm-eval's HFLM: the same requests, the same model, one run.

A stratified sample (the first items of the order that limits and budgets use, MMLU's spread over some
subjects), the two ways in turn. Prints for each task the tokens each computes, seconds, the ratio, and how far
the log-probabilities and decisions differ. Nothing else should be at work on the machine.

    python benchmarks/eval.py --data-dir my/benchmarks --items 8 --mmlu-subjects 2 --mmlu-items 16
"""

import os
import platform
import tempfile
import time
from pathlib import Path

import polars as pl
import torch
import tyro

import sdpo_data as data
from sdpo_data.console import print_table
from sdpo_data.run import Run
from sdpo_data.tree import count_tokens
from sdpo_eval.answers import answer_requests, score_answers
from sdpo_eval.harness import quiet
from sdpo_eval.plan import EvalConfig, plan_questions
from sdpo_eval.questions import sequences_of


def main(
    data_dir: str = "embedded:h4",
    model: str = "embedded:smollm2-135m",
    items: int = 8,
    mmlu_subjects: int = 2,
    mmlu_items: int = 16,
    batch_size: int = 8,
    token_budget: int = 4096,
) -> None:
    """Compare.

    Args:
        items: of ARC, HellaSwag and TruthfulQA each.
        mmlu_items: of each of the MMLU subjects taken: sharing shows only where a subject has many.
        batch_size: HFLM's.
    """
    from lm_eval.models.huggingface import HFLM

    loaded, tokenizer = data.load_model(model)
    with quiet():
        hflm = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size)
    questions = plan_questions(EvalConfig(data_dir=data_dir), Run(tempfile.mkdtemp()))
    rows = []
    for asked in questions.values():
        if asked.documents is None:
            continue
        requests = asked.encode(sample(asked, items, mmlu_subjects, mmlu_items), tokenizer, Path(tempfile.mkdtemp()))
        flat = [sequence for question in sequences_of(requests) for sequence in question]
        pairs = [(("", ""), ids[:start], ids[start:]) for ids, start in flat]
        with Computed(loaded) as theirs, quiet():
            started = time.perf_counter()
            said = hflm._loglikelihood_tokens(pairs, disable_tqdm=True)
            their_seconds = time.perf_counter() - started
        with Computed(loaded) as ours:
            started = time.perf_counter()
            answers = [
                row for part in answer_requests(loaded, asked.task, requests, token_budget, unseen) for row in part
            ]
            our_seconds = time.perf_counter() - started
        scores, gap = [], 0.0
        by_id, left = {row["item_id"]: row for row in answers}, iter(said)
        for row in requests.select("item_id", "lengths", "gold").iter_rows(named=True):
            logps = [next(left)[0] for _ in row["lengths"]]
            mine = by_id[row["item_id"]]
            gap = max(gap, *(abs(a - b) for a, b in zip(logps, mine["choice_logps"], strict=True)))
            scores.append(abs(score_answers(asked.task, **row, logps=logps)["score"] - mine["score"]))
        rows.append(
            {
                "task": asked.task.title, "items": requests.height, "alone": sum(len(ids) - 1 for ids, _ in flat),
                "HFLM tokens": theirs[0], "our tokens": ours[0], "tree floor": count_tokens(flat),
                "HFLM s": their_seconds, "our s": our_seconds, "times faster": their_seconds / our_seconds,
                "largest gap, nats": gap, "largest score gap": max(scores),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    table = pl.DataFrame(rows)
    total = table.select(pl.col(pl.Int64).sum(), pl.col("HFLM s", "our s").sum(), pl.col("largest gap, nats").max(),
                         pl.col("largest score gap").max())  # fmt: skip
    total = total.with_columns((pl.col("HFLM s") / pl.col("our s")).alias("times faster"), task=pl.lit("all"))
    print_table(pl.concat([table, total.select(table.columns)]), f"{model}, float32, HFLM at batches of {batch_size}")
    print(f"machine: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
          f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}")  # fmt: skip


def sample(asked, items: int, subjects: int, each: int) -> list[str]:
    if asked.task.name != "mmlu":
        return asked.chosen[:items]
    taken: dict[str, list[str]] = {}
    for item_id in asked.chosen:
        taken.setdefault(item_id.rpartition("/")[0], []).append(item_id)
    return [item_id for subject in list(taken)[:subjects] for item_id in taken[subject][:each]]


def unseen(_: int) -> None:
    """Progress that nobody watches."""


class Computed:
    """Counts the tokens that go through a model's forward pass, padding included."""

    def __init__(self, model):
        self.model, self.count = model, [0]

    def __enter__(self):
        def note(_, args, kwargs):
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self.count[0] += ids.numel()

        self.hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        return self.count

    def __exit__(self, *_):
        self.hook.remove()


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    tyro.cli(main, description=__doc__)
