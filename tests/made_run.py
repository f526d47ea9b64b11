"""TEST DATA: writes run folders of random numbers, which look like real runs and mean nothing."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from sdpo_data.tables import (
    CONTAMINATION,
    DOCUMENTS,
    DROPPED,
    FINDINGS,
    ITEMS,
    MARGIN_PER_TOKEN,
    MESSAGES,
    METRICS,
    PAIRS,
    PARTITION,
    RESULTS,
    SCORES,
    STEPS,
    TEXT,
    check,
)
from sdpo_eval.h4 import TASKS, summarise_items
from sdpo_eval.margins import HELD_OUT_SCORES
from sdpo_train.diagnostics import diagnose_step, kl_estimate

WORDS = [
    "the",
    "river",
    "quietly",
    "answer",
    "because",
    "number",
    "city",
    "light",
    "seven",
    "paper",
    "reason",
    "garden",
]
CORE_KEYS = {
    (arm, step): f"{place}{step}" * 16
    for place, arm in enumerate(("sdpo_fixed", "random", "random_fixed"), 6) for step in (1, 2)
}  # fmt: skip
KEYS = {("base", 0): "5a" * 16, ("sdpo", 1): "1d" * 16, ("sdpo", 2): "2e" * 16, ("dpo", 1): "3f" * 16}
QUESTIONS = {"arc_challenge": 60, "hellaswag": 80, "mmlu": 95, "truthfulqa_mc2": 50}


def make_run(
    path: Path, *, pairs: int = 160, tasks: Sequence[str] = tuple(TASKS), seed: int = 0, core: bool = False
) -> Path:
    """Write a finished run: arm sdpo of two steps, arm dpo of one, `tasks` evaluated.

    Args:
        core: with the other arms of the core factorial, of two steps each.
    """
    draw, models = random.Random(seed), KEYS | (CORE_KEYS if core else {})
    table = make_pairs(draw, pairs)
    scores = make_scores(draw, table)
    partition = make_partition(scores)
    reasons = [("piqa", "identical answers")] * 2 + [("alpaca-eval", "tie")] * 31 + [("alpaca-eval", "duplicate")] * 4
    dropped = [("pairs", source, row, None, reason, "{}") for row, (source, reason) in enumerate(reasons)]
    write(path / "pairs.parquet", table, PAIRS)
    held_out = write(path / "held_out.parquet", make_pairs(draw, 40, "h"), PAIRS)
    write(path / "dropped.parquet", pl.DataFrame(dropped, DROPPED, orient="row"), DROPPED)
    write(path / "scores.parquet", scores, SCORES)
    write(path / "partition.parquet", partition, PARTITION)
    make_arm(draw, path, "sdpo", scores, partition)
    make_arm(draw, path, "dpo", scores, partition.with_columns(step=pl.lit(1, pl.Int64)))
    turned = pl.Series("step", random.Random(seed).sample(partition["step"].to_list(), pairs), pl.Int64)
    for arm in ("sdpo_fixed", "random", "random_fixed") if core else ():
        order = partition if arm == "sdpo_fixed" else partition.with_columns(turned).sort("step", maintain_order=True)
        order = order.with_columns(rank=pl.int_range(pl.len(), dtype=pl.Int64))
        make_arm(draw, path, arm, scores, order, fixed=arm.endswith("fixed"))
    make_held_out(draw, path, held_out, models)
    matched = [
        ("p0003", "truthfulqa_mc2", "validation/7", rule, "what is the river") for rule in ("question", "8-gram")
    ]
    write(path / "contamination.parquet", pl.DataFrame(matched, CONTAMINATION, orient="row"), CONTAMINATION)
    found = [
        ("empty text", "fine", 0, 0.0, None, ""),
        ("swapped answers", "wrong", 2, 2 / pairs, "p0004", "decide which label is right, or drop both"),
        ("near-duplicate", "look", 7, 7 / pairs, "p0009", "drop all but one of each cluster"),
        ("length bias", "look", 90, 90 / pairs, "p0001", "the chosen answer is the longer one in 57.0 ± 4.0 % of 158"),
    ]
    write(path / "findings.parquet", pl.DataFrame(found, FINDINGS, orient="row"), FINDINGS)
    items = [make_items(draw, path, *model, task) for model in models for task in tasks]
    if items:
        asked = pl.concat(items).select("protocol", "task", "item_id", text="item_id").unique(maintain_order=True)
        write(path / "documents.parquet", asked, DOCUMENTS)
    write(path / "results.parquet", summarise_items(pl.concat(items)) if items else RESULTS.to_frame(), RESULTS)
    (path / "config.yaml").write_text("# TEST DATA\nmodel: embedded:smollm2-135m\npartition:\n  parts: 2\n")
    units = {"pairs": 6.1, "scores": 71.0, "partition": 0.2, "items/base-0-0-mmlu": 33.0}
    lineage = {unit: made(seconds) for unit, seconds in units.items()}
    for file in sorted(path.glob("arms/*/seed_0/steps.parquet")):
        for row in pl.read_parquet(file).iter_rows(named=True):
            recipe = {"beta": 0.1, "learning_rate": 5e-7, "epochs": 1, "loss": ["sigmoid"]}
            recipe |= {"start": row["start_key"], "reference": row["reference_key"]}
            unit = f"arms/{row['arm']}/seed_0/step_{row['step']}"
            lineage[unit] = made(row["seconds"] + 0.75) | {"recipe": recipe}
    (path / "lineage.json").write_text(json.dumps(lineage))
    return path


def make_pairs(draw: random.Random, count: int, prefix: str = "p") -> pl.DataFrame:
    def text(role, words, as_messages):
        said = " ".join(draw.choices(WORDS, k=draw.randint(3, words))).capitalize() + "."
        return json.dumps([{"role": role, "content": said}]) if as_messages else said

    rows = []
    for number in range(count):
        chat = number % 3 > 0
        texts = text("user", 30, chat), text("assistant", 90, chat), text("assistant", 70, chat)
        ids = f"{prefix}{number:04}", f"q{prefix}{number // 2:04}"
        rows.append((*ids, "alpaca-eval" if chat else "piqa", *texts, MESSAGES if chat else TEXT, *[None] * 4))
    return pl.DataFrame(rows, PAIRS, orient="row")


def make_scores(draw: random.Random, pairs: pl.DataFrame) -> pl.DataFrame:
    rows = []
    for pair in pairs.iter_rows(named=True):
        prompt, chosen, rejected = (len(pair[name].split()) + 3 for name in ("prompt", "chosen", "rejected"))
        easy = draw.gauss(0.15, 0.4)
        logps = -chosen * max(0.1, 1.8 - easy / 2), -rejected * max(0.1, 1.8 + easy / 2)
        ids = pair["pair_id"], pair["prompt_id"], pair["source"], KEYS["base", 0]
        rows.append((*ids, *logps, chosen, rejected, prompt, False, "float32", *[None] * 5))
    return pl.DataFrame(rows, SCORES, orient="row")


def make_partition(scores: pl.DataFrame) -> pl.DataFrame:
    ranked = scores.select("pair_id", "source", difficulty=-MARGIN_PER_TOKEN).sort("difficulty")
    rank = pl.int_range(pl.len(), dtype=pl.Int64)
    placed = ranked.with_columns(rank=rank, step=1 + rank * 2 // pl.len(), definition=pl.lit("margin_per_token"))
    return placed.with_columns(pl.col("step").cast(pl.Int64)).select(list(PARTITION))


def make_arm(
    draw: random.Random, path: Path, arm: str, scores: pl.DataFrame, partition: pl.DataFrame, *, fixed: bool = False
) -> None:
    """Write one arm: each step from and towards the one before (fixed: towards S), its loss falling from log 2.

    What a step says of its pairs is measured by the very functions that training calls, so it has their names.
    """
    folder, rows, start = path / f"arms/{arm}/seed_0", [], KEYS["base", 0]
    write(folder / "partition.parquet", partition, PARTITION)
    for step in sorted(partition["step"].unique()):
        ids = partition.filter(step=step).select("pair_id")
        towards, lift = (KEYS["base", 0], 0.0) if fixed else (start, 4.0 * (step - 1))
        lifted = (pl.col("chosen_logp") + lift).clip(upper_bound=-0.1)
        reference = ids.join(scores, on="pair_id").with_columns(model_key=pl.lit(towards), chosen_logp=lifted)
        moves = [0.3 * (1 - math.exp(-update / 4)) / step + update * draw.gauss(0, 0.003) for update in range(8)]
        values = {"loss": [math.log(2) - move for move in moves], "rewards/margins": [2 * move for move in moves]}
        values |= {"rewards/accuracies": [0.0, 0.5, *[0.75] * 6], "rewards/chosen": [-move for move in moves]}
        values |= {"rewards/rejected": [-3 * move for move in moves], "grad_norm": [2.5 - move for move in moves]}
        values |= {"learning_rate": [5e-7] * 8, "logps/chosen": [-60.0] * 8, "logps/rejected": [-50.0] * 8}
        values |= {"num_tokens": [2400.0 * (1 + update) for update in range(8)], "mean_token_accuracy": [0.6] * 8}
        metrics = [(arm, 0, step, 1 + i, name, value) for name, row in values.items() for i, value in enumerate(row)]
        key, margin = (KEYS | CORE_KEYS)[arm, step], (reference["chosen_logp"] - reference["rejected_logp"]).mean()
        moved = pl.col("rejected_logp") - 2.0 - 2.0 * (pl.col("chosen_tokens") % 7)  # margins rise by 1.5 to 13.5 nats
        after = reference.with_columns(
            model_key=pl.lit(key), chosen_logp=pl.col("chosen_logp") - 0.5, rejected_logp=moved
        )
        base = ids.join(scores, on="pair_id")
        held_out = reference.head(12), after.head(12)
        earlier = {1: held_out} if step > 1 else None
        told = diagnose_step(
            arm, 0, step, 8, beta=0.1, base=base, before=reference, after=after, held_out=held_out, earlier=earlier
        )
        kl = [
            (arm, 0, step, 8, f"kl_{of}/{what}", value)  # as divergence.py writes them
            for of, far in (("ref", 0.5), ("base", 0.5 * step))
            for what, value in kl_estimate([-60.0 + far, -50.0 + 2 * far], [-60.0, -50.0]).items()
        ]
        seconds = {"reference": 30.0 * (step - 1), "train": 220.0 - 30.0 * step, "diagnose": 24.5}
        kl += [(arm, 0, step, 8, f"cost/{name}_seconds", value) for name, value in seconds.items()]
        kl += [(arm, 0, step, 8, "cost/peak_memory_mib", 2525.0)]
        rows_of = pl.concat([told, pl.DataFrame(metrics + kl, METRICS, orient="row")])
        write(folder / f"step_{step}/reference_scores.parquet", reference, SCORES)
        write(folder / f"step_{step}/metrics.parquet", rows_of, METRICS)
        losses = values["loss"][0], values["loss"][-1]
        tokens = int(
            reference.select(pl.sum_horizontal("prompt_tokens", "chosen_tokens", "rejected_tokens").sum()).item()
        )
        cost = reference.height, tokens, 8, 214.5
        rows.append((arm, 0, step, start, towards, key, f"{folder}/step_{step}", *cost, *losses, 2.1e-5, margin, None))
        start = key
    write(folder / "steps.parquet", pl.DataFrame(rows, STEPS, orient="row"), STEPS)


def make_held_out(draw: random.Random, path: Path, pairs: pl.DataFrame, models: Mapping[tuple[str, int], str]) -> None:
    """Write what every model says of the pairs held out: each step likes both answers less, the rejected ones most."""
    base = make_scores(draw, pairs)
    for (arm, step), key in models.items():
        moved = [pl.col(f"{side}_logp") - step * by for side, by in (("chosen", 0.5), ("rejected", 2.0))]
        unit = {"arm": pl.lit(arm), "seed": pl.lit(0, pl.Int64), "step": pl.lit(step, pl.Int64)}
        scores = base.with_columns(*moved, model_key=pl.lit(key), **unit).select(list(HELD_OUT_SCORES))
        write(path / f"held_out_scores/{arm}-0-{step}.parquet", scores, HELD_OUT_SCORES)


def make_items(draw: random.Random, path: Path, arm: str, step: int, task: str) -> pl.DataFrame:
    rows, luck = [], random.Random(task)  # luck: the same questions are hard for every model
    for number in range(QUESTIONS[task]):
        subject = f"subject_{number % 5}" if task == "mmlu" else task
        chance = luck.random() + draw.gauss(0, 0.05)
        score = chance if task == "truthfulqa_mc2" else float(chance < 0.3 + 0.02 * step)
        score, correct = min(1.0, max(0.0, score)), None if task == "truthfulqa_mc2" else score
        head = arm, 0, step, (KEYS | CORE_KEYS)[arm, step], f"h4-lmeval@{task[:4]}", task
        item_id, gold = f"{subject}/{number}", -12.5 + 0.2 * step + draw.gauss(0, 0.3 * step)
        rows.append((*head, item_id, subject, item_id, correct, score, gold, [gold, -13.0]))
    return write(path / f"items/{arm}-0-{step}-{task}.parquet", pl.DataFrame(rows, ITEMS, orient="row"), ITEMS)


def made(seconds: float) -> dict:
    """One entry of lineage.json."""
    return {
        "recipe": {}, "inputs": {}, "outputs": [], "sha256": {"pairs.parquet": "ab" * 32}, "seconds": seconds,
        "finished": "2026-01-02T03:04:05Z", "host": "test-host (x86_64, 2 cores)", "commit": "c0ffee" + "0" * 34,
        "versions": {"python": "3.11.7", "polars": "2.1.0", "torch": "2.9.0", "trl": "1.16.0"},
    }  # fmt: skip


def write(path: Path, frame: pl.DataFrame, schema: pl.Schema) -> pl.DataFrame:
    path.parent.mkdir(parents=True, exist_ok=True)
    check(frame, schema, path.name).write_parquet(path)
    return frame
