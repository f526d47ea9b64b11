"""Reference log-probabilities: our prefix engine against TRL's own pass and against padded batches.

One run, the same pairs and model, the ways taken in turn, several rounds; prints a table of medians
and ratios. Nothing else should be at work on the machine.

    python benchmarks/score.py --pairs embedded:alpaca-eval --count 32 --rounds 3
"""

import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Annotated

import polars as pl
import torch
import tyro

import sdpo_data as data
from sdpo_data import prefix
from sdpo_data.console import print_table
from sdpo_data.encode import encode_pairs
from sdpo_data.score import completion_logps


def main(
    pairs: Annotated[str, tyro.conf.arg(help="Any source that sdpo_data.pairs reads.")] = "embedded:alpaca-eval",
    model: str = "embedded:smollm2-135m",
    count: int = 32,
    rounds: int = 3,
    max_length: int = 512,
    token_budget: int = 2048,
    trl_batch: int = 8,
) -> None:
    loaded, tokenizer = data.load_model(model)
    frame = data.read_pairs(pairs, data.PairsConfig(limit=2 * count))
    encoded = encode_pairs(frame, tokenizer, max_length, "drop").filter(pl.col("problem").is_null()).head(count)
    sides = [encoded.select("prompt_ids", f"{side}_ids").rows() for side in ("chosen", "rejected")]
    sequences = [(prompt + answer, len(prompt)) for side in sides for prompt, answer in side]
    alone = sum(len(ids) for ids, _ in sequences)
    floor = prefix.count_tokens(sequences)

    def packed() -> list[float]:
        return completion_logps(loaded, sequences, token_budget)

    def padded() -> list[float]:
        fits, prefix._packs[loaded] = prefix._packs.get(loaded), False
        try:
            return completion_logps(loaded, sequences, token_budget)
        finally:
            prefix._packs[loaded] = fits

    ways: dict[str, Callable[[], list[float]]] = {
        "prefix rows": packed,
        "padded batches, length-sorted": padded,
        f"TRL 1.16, batches of {trl_batch}, data order": trl_pass(model, encoded, trl_batch),
    }
    packed()  # warms up, and probes the model
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    sums: dict[str, list[float]] = {}
    for _ in range(rounds):
        for way, run in ways.items():
            started = time.perf_counter()
            sums[way] = run()
            seconds[way].append(time.perf_counter() - started)
    ours = statistics.median(seconds["prefix rows"])
    rows = [
        {
            "way": way,
            "seconds": statistics.median(times),
            "pairs/s": encoded.height / statistics.median(times),
            "times ours": statistics.median(times) / ours,
            "largest difference, nats": max(abs(a - b) for a, b in zip(sums["prefix rows"], sums[way], strict=True)),
        }
        for way, times in seconds.items()
    ]
    computed = sum(len(row.tokens) for row in prefix.plan_rows(sequences, range(len(sequences)), token_budget))
    print_table(pl.DataFrame(rows), f"{encoded.height} pairs of {pairs}, {model}, float32, median of {rounds}")
    print(f"tokens: {alone:,} alone, {floor:,} in one prefix tree (the floor), {computed:,} in our rows")
    print(f"machine: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
          f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}")  # fmt: skip


def trl_pass(name: str, encoded: pl.DataFrame, batch: int) -> Callable[[], list[float]]:
    """TRL's precompute pass on the very same tokens, its trainer made beforehand."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

        _precompute_ref_logps = _prepare_dataset

    warnings.simplefilter("ignore")
    rows = datasets.Dataset(encoded.select("prompt_ids", "chosen_ids", "rejected_ids").to_arrow())
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        precompute_ref_log_probs=True,
        per_device_train_batch_size=batch,
        max_length=None,
        dataloader_pin_memory=False,
    )
    model, tokenizer = data.load_model(name)  # its own: TRL replaces the forward
    trainer = Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)

    def run() -> list[float]:
        loader = torch.utils.data.DataLoader(rows, batch_size=batch, collate_fn=trainer.data_collator)
        sides = [trainer.compute_ref_log_probs(model, inputs) for inputs in loader]
        return torch.cat([torch.cat(side) for side in zip(*sides, strict=True)]).tolist()

    return run


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    tyro.cli(main, description=__doc__)
