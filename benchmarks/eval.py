"""H4 on the prefix engine against lm-eval's HFLM: the same requests, the same model, one run.

A stratified sample, the two ways in turn: the first items of the order that limits and budgets use, MMLU's in a
few whole groups, as sharing shows only where a subject has many. Prints for each task the tokens each way
computes, the tree's floor, seconds, the ratio, and how far log-probabilities and decisions differ; and what that
speed would mean for the whole protocol. Nothing else should be at work on the machine.

With --count it counts the tokens of all 26,073 questions instead and runs no model: requests by themselves, HFLM's
(without padding, and in its batches), ours, the floor. --requests keeps the questions' tokens for the next time.

    python benchmarks/eval.py --data-dir my/benchmarks
    python benchmarks/eval.py --data-dir my/benchmarks --count
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import tyro
from machine import describe_machine

import sdpo_data as data
from sdpo_data.console import print_table
from sdpo_data.models import load_tokenizer
from sdpo_data.prefix import ROW_TOKENS
from sdpo_data.probe import read_model
from sdpo_data.run import Run
from sdpo_data.tree import count_tokens, plan_bins
from sdpo_eval.answers import answer_requests, score_answers
from sdpo_eval.harness import quiet
from sdpo_eval.plan import EvalConfig, plan_questions
from sdpo_eval.questions import sequences_of, slices


def main(
    data_dir: str = "embedded:h4",
    model: str = "embedded:smollm2-135m",
    items: tuple[int, int, int] = (4, 5, 12),
    mmlu: tuple[int, int] = (2, 30),
    batch_size: int = 8,
    count: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    requests: Path | None = None,
) -> None:
    """Compare.

    Args:
        items: of ARC, HellaSwag and TruthfulQA.
        mmlu: subjects, and items of each.
        batch_size: HFLM's.
        count: Count the tokens of the whole protocol, and run no model.
        requests: Folder that keeps the questions as tokens.
    """
    config = EvalConfig(data_dir=data_dir)
    questions = plan_questions(config, Run(tempfile.mkdtemp()))
    folder = requests or Path(tempfile.mkdtemp())
    chosen = {name: asked for name, asked in questions.items() if asked.documents}
    if count:
        tokenizer = load_tokenizer(model)
        rows = [
            count_task(asked, asked.encode(asked.chosen, tokenizer, folder), batch_size) for asked in chosen.values()
        ]
        print_table(with_total(rows), f"tokens of the whole protocol, {config.protocol}, {model}'s tokenizer")
        return
    few = dict(zip(("arc_challenge", "hellaswag", "truthfulqa_mc2"), items, strict=True))
    loaded, tokenizer = data.load_model(model)
    sampled = {}
    for name, asked in chosen.items():
        sample = asked.chosen[: few[name]] if name in few else some_subjects(asked.chosen, *mmlu)
        sampled[name] = asked.encode(sample, tokenizer, folder)
    flat = [ids for requests in sampled.values() for one in sequences_of(requests) for ids, _ in one]
    read_model(loaded, max(map(len, flat)))  # once per model: how it can be read is no part of any task
    rows = []
    for name, asked in chosen.items():
        rows.append(time_task(asked, sampled[name], loaded, tokenizer, batch_size))
        print(rows[-1], flush=True)
    print_table(with_total(rows), f"{model}, float32, HFLM at batches of {batch_size}")
    print(describe_machine("torch", "transformers", "lm-eval"))


def some_subjects(chosen: list[str], subjects: int, each: int) -> list[str]:
    taken: dict[str, list[str]] = {}
    for item_id in chosen:
        taken.setdefault(item_id.rpartition("/")[0], []).append(item_id)
    large = [own for own in taken.values() if len(own) >= each]
    return [item_id for own in large[:subjects] for item_id in own[:each]]


def count_task(asked, requests: pl.DataFrame, batch_size: int) -> dict:
    """Count what each way computes. HFLM sorts by length, and lets choices that differ in their last token share."""
    flat = [(np.asarray(ids), start) for one in sequences_of(requests) for ids, start in one]
    lengths = sorted((len(key) // 8 for key in {ids[:-1].astype(np.int64).tobytes() for ids, _ in flat}), reverse=True)
    batches = [lengths[first : first + batch_size] for first in range(0, len(lengths), batch_size)]
    ours = 0
    for part in slices(requests):
        together = [(np.asarray(ids), start) for one in sequences_of(part) for ids, start in one]
        ours += sum(bin_.tokens for bin_ in plan_bins(together, ROW_TOKENS["cpu"]))
    return {
        "task": asked.task.title, "items": requests.height, "alone": sum(len(ids) - 1 for ids, _ in flat),
        "HFLM": sum(lengths), "HFLM, padded": sum(len(batch) * batch[0] for batch in batches), "ours": ours,
        "tree floor": count_tokens(flat),
    }  # fmt: skip


def time_task(asked, requests: pl.DataFrame, loaded, tokenizer, batch_size: int) -> dict:
    from lm_eval.models.huggingface import HFLM

    with quiet():
        hflm = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size)
    pairs = [(("", ""), ids[:start], ids[start:]) for one in sequences_of(requests) for ids, start in one]
    with Computed(loaded) as theirs, quiet():
        their_seconds = Stopwatch()
        said = iter(hflm._loglikelihood_tokens(pairs, disable_tqdm=True))
        their_seconds.stop()
    with Computed(loaded) as ours:
        our_seconds = Stopwatch()
        parts = list(answer_requests(loaded, asked.task, requests, ROW_TOKENS["cpu"], lambda _: None))
        our_seconds.stop()
    by_id, gap, moved, flipped = {row["item_id"]: row for part in parts for row in part}, 0.0, 0.0, 0
    for row in requests.select("item_id", "lengths", "gold").iter_rows(named=True):
        logps = [next(said)[0] for _ in row["lengths"]]
        mine, other = by_id[row["item_id"]], score_answers(asked.task, **row, logps=logps)
        gap = max(gap, *(abs(a - b) for a, b in zip(logps, mine["choice_logps"], strict=True)))
        moved, flipped = (
            max(moved, abs(other["score"] - mine["score"])),
            flipped + (other["correct"] != mine["correct"]),
        )
    counted = count_task(asked, requests, batch_size)
    assert theirs[0] == counted["HFLM, padded"], "HFLM computes other batches than --count takes"
    return {
        "task": asked.task.title, "items": requests.height, "HFLM tokens": theirs[0], "our tokens": ours[0],
        "tree floor": counted["tree floor"], "HFLM s": their_seconds.wall, "our s": our_seconds.wall,
        "times faster": their_seconds.wall / our_seconds.wall, "HFLM CPU s": their_seconds.cpu,
        "our CPU s": our_seconds.cpu, "CPU times": their_seconds.cpu / our_seconds.cpu,
        "largest gap, nats": gap, "decisions that differ": flipped, "largest score gap": moved,
    }  # fmt: skip


def with_total(rows: list[dict]) -> pl.DataFrame:
    table = pl.DataFrame(rows)
    summed = pl.selectors.integer() | pl.selectors.ends_with(" s")
    total = table.select(summed.sum(), pl.selectors.contains("gap").max()).with_columns(task=pl.lit("all"))
    if "our s" in table.columns:
        wall, cpu = pl.col("HFLM s") / pl.col("our s"), pl.col("HFLM CPU s") / pl.col("our CPU s")
        total = total.with_columns(wall.alias("times faster"), cpu.alias("CPU times"))
    return pl.concat([table, total.select(table.columns)])


class Stopwatch:
    """Seconds on the wall, and of this process's CPU time, which other work on the machine changes less."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu


class Computed:
    """Counts the tokens that go through a model's forward pass, padding included."""

    def __init__(self, model):
        self.model, self.count = model, [0]

    def __enter__(self):
        def note(_, args, kwargs):
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self.count[0] += ids.numel()

        inner = self.model.base_model  # the engine runs the head by itself
        self.hook = inner.register_forward_pre_hook(note, with_kwargs=True)
        return self.count

    def __exit__(self, *_):
        self.hook.remove()


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    tyro.cli(main, description=__doc__)
