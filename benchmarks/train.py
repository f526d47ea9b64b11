"""One step of DPO, scoring of the reference included: ours against TRL 1.16, the same pairs, tokens and updates.

Each way runs in a process of its own, from a saved model to a saved model, so that its peak memory is its own:
train_step (the reference is scored first, no second model), TRL's defaults (reference in memory, padded batches of
8, activations computed again on the way back), the same with precompute_ref_log_probs, and, as what a patient user
of TRL arrives at on a CPU, precompute in batches of 1 without checkpointing. Prints seconds, ratios, peak memory,
the losses of the last update, and the floor: one forward pass for the reference and three for training over one
prefix tree per update, at the model's own dense rate (see benchmarks/score.py). Nothing else should be at work.

    python benchmarks/train.py --pairs ../shared/data/prefs/hh_rlhf_test/helpful.jsonl.gz --count 16
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated

import datasets
import polars as pl
import tyro
from machine import describe_machine
from score import as_requests, dense_rate, peak_mib, some_pairs
from trl import DPOConfig, DPOTrainer

import sdpo_data as data
from sdpo_data.console import print_table
from sdpo_data.models import model_key, save_model
from sdpo_data.tree import count_tokens
from sdpo_train.config import StepConfig

OURS, DEFAULT, PRECOMPUTE, PATIENT = (
    "train_step (ours)",
    "TRL, its defaults",
    "TRL, precompute",
    "TRL, precompute, batches of 1, no checkpointing",
)
WAYS = (OURS, DEFAULT, PRECOMPUTE, PATIENT)


def main(
    pairs: Annotated[list[str], tyro.conf.arg(help="Sources that sdpo_data.pairs reads.")] = ["embedded:alpaca-eval"],  # noqa: B006
    model: str = "embedded:smollm2-135m",
    count: int = 16,
    batch_pairs: int = 8,
    max_length: int = 1024,
    ways: Annotated[list[str], tyro.conf.arg(help="Some of them only, by the beginnings of their names.")] = [""],  # noqa: B006
    only: Annotated[str | None, tyro.conf.arg(help="Run this one way once and print what it took.")] = None,
) -> None:
    for source in pairs:
        if only:
            print(json.dumps(run_way(only, source, model, count, batch_pairs, max_length)))
            return
        flags = ["--pairs", source, "--model", model, "--count", count, "--batch-pairs", batch_pairs]
        flags += ["--max-length", max_length]
        asked = [way for way in WAYS if any(way.startswith(begin) for begin in ways)]
        rows = []
        for way in asked:
            rows.append({"way": way, **json.loads(child([*map(str, flags), "--only", way]))})
            print(rows[-1], file=sys.stderr, flush=True)
        table = pl.DataFrame(rows)
        ours = table.row(0, named=True)
        ratios = [(pl.col(name) / ours[name]).alias(f"{name}, times ours") for name in ("seconds", "CPU seconds")]
        memory = (ours["peak MiB"] / pl.col("peak MiB")).alias("ours/its memory")
        title = f"{count} pairs of {source}, {count // batch_pairs} updates of {batch_pairs}, {model}, float32"
        print_table(table.with_columns(*ratios, memory), title)
        if ours["way"] == OURS:
            describe_floor(source, model, count, batch_pairs, max_length, ours["seconds"])


def child(flags: list[str]) -> str:
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.splitlines()[-1]


def run_way(way: str, source: str, model: str, count: int, batch_pairs: int, max_length: int) -> dict:
    """Seconds without the loading of libraries, pairs per second, the last loss and the peak memory of the process."""
    _, tokenizer = data.load_model(model)
    encoded = some_pairs(source, tokenizer, count, max_length)
    with tempfile.TemporaryDirectory() as folder:
        started, worked = time.perf_counter(), time.process_time()
        if way == OURS:
            losses = train_ours(source, encoded, model, batch_pairs, max_length, Path(folder))
        else:
            losses = train_trl(way, encoded, model, batch_pairs, Path(folder))
        seconds, work = time.perf_counter() - started, time.process_time() - worked
    return {
        "seconds": seconds,
        "CPU seconds": work,
        "pairs/s": count / seconds,
        "peak MiB": peak_mib(),
        "last loss": losses[-1],
    }


def train_ours(source, encoded, model, batch_pairs, max_length, folder: Path) -> list[float]:
    from sdpo_data.store import ScoreStore
    from sdpo_train import dpo
    from sdpo_train.work import StepWork

    dpo.ScoreStore = lambda _, *which: ScoreStore(folder / "store", *which)  # an empty one: nothing is known
    chosen = encoded.select("pair_id").join(data.read_pairs(source), on="pair_id", maintain_order="left")
    key = model_key(model)
    work = StepWork("dpo", 0, 1, chosen, model, key, model, key, None, folder / "step_1")
    config = StepConfig(
        learning_rate=5e-6, batch_pairs=batch_pairs, max_length=max_length, diagnose=False, kl_samples=0
    )
    return [dpo.train_step(work, config)["last_loss"]]


def train_trl(way: str, encoded: pl.DataFrame, model: str, batch_pairs: int, folder: Path) -> list[float]:
    """TRL on the very same tokens, in their order."""

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    warnings.simplefilter("ignore")
    rows = datasets.Dataset(encoded.select("prompt_ids", "chosen_ids", "rejected_ids").to_arrow())
    size = 1 if way == PATIENT else 8
    args = DPOConfig(
        output_dir=str(folder),
        bf16=False,
        num_train_epochs=1,  # its default is 3
        learning_rate=5e-6,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=way != DEFAULT,
        per_device_train_batch_size=min(size, batch_pairs),
        gradient_accumulation_steps=max(1, batch_pairs // size),
        activation_checkpointing=way != PATIENT,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    loaded, tokenizer = data.load_model(model)
    trainer = Trainer(model=loaded, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    save_model(trainer.model, tokenizer, folder / "out")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def describe_floor(source: str, model: str, count: int, batch_pairs: int, max_length: int, seconds: float) -> None:
    loaded, tokenizer = data.load_model(model)
    encoded = some_pairs(source, tokenizer, count, max_length)
    requests = as_requests(encoded)
    reads = sum(len(ids) - start for ids, start in requests)
    once = count_tokens(requests)
    trees = sum(count_tokens(as_requests(part)) for part in encoded.iter_slices(batch_pairs))
    padded = sum(
        2 * part.height * max(len(ids) for ids, _ in as_requests(part)) for part in encoded.iter_slices(batch_pairs)
    )
    rate = dense_rate(loaded, requests, reads / once)
    floor = (once + 3 * trees) / rate
    alone = sum(len(ids) for ids, _ in requests)
    print(
        f"tokens: {once:,} to score, {trees:,} to train on, a tree per update ({alone:,} alone, {padded:,} padded), "
        f"{reads:,} of them through the head\n"
        f"time: {seconds:.1f} s, {seconds / floor:.2f} of the floor of {floor:.1f} s at the model's dense {rate:,.0f} "
        f"tokens/s (once for the reference, three times for training)\n"
        + describe_machine("torch", "transformers", "trl"),
        flush=True,
    )


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    tyro.cli(main, description=__doc__)
