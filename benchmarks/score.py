"""Reference log-probabilities: the prefix engine against TRL 1.16's reference pass, lm-eval's HFLM and plain batches.

One run: the same pairs, tokens and model for all, the ways taken in turn, several rounds; prints medians,
ratios, tokens, and how far the engine is from the floor: the tokens of one prefix tree over all answers, at the
model's own dense rate (a plain causal forward without padding, the head on as large a share of its positions,
measured in the same run). --model random:7b takes random weights in that shape. With --memory each way also runs once
in a process of its own, for its peak memory. Nothing else should be at work on the machine.

    python benchmarks/score.py --pairs ../shared/data/prefs/hh_rlhf_test/helpful.jsonl.gz --count 24
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import polars as pl
import torch
import tyro
from machine import describe_machine
from transformers import LlamaConfig, LlamaForCausalLM

import sdpo_data as data
from sdpo_data import prefix
from sdpo_data.assets import cache_folder
from sdpo_data.console import print_table
from sdpo_data.encode import encode_pairs
from sdpo_data.models import save_model
from sdpo_data.run import write_atomically
from sdpo_data.tree import Request, count_tokens

OURS, SORTED, HFLM, TRL = (
    "prefix trees (ours)",
    "length-sorted batches of 8",
    "lm-eval HFLM, batches of 8",
    "TRL, batches of ",
)
TRL_BATCHES = (8, 1, 2, 4)  # the default first
SHAPES = {  # of models with random weights: how fast a shape is does not depend on what it says
    "7b": {  # Mistral 7B's, and so that of Zephyr and SOLAR's layers
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 4096,
    },
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 4096},
}  # fmt: skip


def main(
    pairs: Annotated[list[str], tyro.conf.arg(help="Sources that sdpo_data.pairs reads.")] = ["embedded:alpaca-eval"],  # noqa: B006
    model: Annotated[
        str, tyro.conf.arg(help="Also random:7b, random weights in that shape: for a GPU.")
    ] = "embedded:smollm2-135m",
    dtype: Literal["float32", "bfloat16"] = "float32",
    count: int = 24,
    rounds: int = 2,
    max_length: int = 1024,
    memory: bool = False,  # noqa: FBT001
    only: Annotated[str | None, tyro.conf.arg(help="Run this one way once and print its peak memory.")] = None,
) -> None:
    model = random_model(model, dtype)
    for source in pairs:
        loaded, tokenizer = data.load_model(model, dtype)
        encoded = some_pairs(source, tokenizer, count, max_length)
        requests = as_requests(encoded)
        if only:
            make_way(only, model, dtype, loaded, tokenizer, encoded)()
            print(peak_mib())
            return
        compare(source, model, dtype, loaded, tokenizer, encoded, requests, rounds)
        if memory:
            names = [OURS, SORTED, HFLM, f"{TRL}8", f"{TRL}1"]
            flags = [
                "--pairs",
                source,
                "--model",
                model,
                "--dtype",
                dtype,
                "--count",
                count,
                "--max-length",
                max_length,
            ]
            rows = []
            for name in names:
                child = [sys.executable, __file__, *map(str, flags), "--only", name]
                done = subprocess.run(child, capture_output=True, text=True, check=True)
                rows.append({"way": name, "peak MiB": int(done.stdout.split()[-1])})
            print_table(pl.DataFrame(rows), "peak memory of the whole process, model and libraries included")


def random_model(name: str, dtype: str) -> str:
    """Make the folder of a model of random weights for `random:7b`; another name stays as it is."""
    if not name.startswith("random:"):
        return name
    if name.removeprefix("random:") not in SHAPES:
        sys.exit(f"--model {name}: there are {', '.join(f'random:{shape}' for shape in SHAPES)}.")
    folder = cache_folder() / "benchmarks" / f"{name.replace(':', '_')}_{dtype}"
    if not (folder / "config.json").exists():
        tokenizer = data.load_model("embedded:smollm2-135m")[1]
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, dtype))  # in this dtype from the start: 7B in float32 are 28 GB
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            config = LlamaConfig(**SHAPES[name.removeprefix("random:")], vocab_size=len(tokenizer))
            made = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        write_atomically(folder, lambda part: save_model(made, tokenizer, part))
    return str(folder)


def peak_mib() -> int:
    """Peak memory of this process; getrusage would count what its parent had when it was forked."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def some_pairs(source: str, tokenizer, count: int, max_length: int) -> pl.DataFrame:
    """Take pairs in the order of the data; of AlpacaEval whole prompts, as its point is many pairs for each."""
    frame = data.read_pairs(source)
    if frame["prompt_id"].n_unique() < frame.height / 2:
        prompts = frame["prompt_id"].unique(maintain_order=True).head(max(1, count // 6))
        frame = frame.filter(pl.col("prompt_id").is_in(prompts.implode()))
    encoded = encode_pairs(frame.head(4 * count), tokenizer, max_length, "drop")
    return encoded.filter(pl.col("problem").is_null()).head(count)


def as_requests(encoded: pl.DataFrame) -> list[Request]:
    sides = [encoded.select("prompt_ids", f"{side}_ids").rows() for side in ("chosen", "rejected")]
    return [(prompt + answer, len(prompt)) for side in sides for prompt, answer in side]


def make_way(
    way: str, model: str, dtype: str, loaded, tokenizer, encoded: pl.DataFrame
) -> Callable[[], Sequence[float]]:
    requests = as_requests(encoded)
    if way == OURS:
        return lambda: summed(requests, prefix.score_completions(loaded, requests))
    if way == SORTED:
        return lambda: sorted_batches(loaded, requests)
    if way == HFLM:
        return hflm_pass(loaded, tokenizer, requests)
    return trl_pass(model, dtype, encoded, int(way.removeprefix(TRL)))


def compare(source, model, dtype, loaded, tokenizer, encoded, requests, rounds) -> None:
    names = [OURS, SORTED, HFLM, *(f"{TRL}{size}" for size in TRL_BATCHES)]
    ways = {name: make_way(name, model, dtype, loaded, tokenizer, encoded) for name in names}
    ways[OURS]()  # warms up, and probes the model
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    sums: dict[str, Sequence[float]] = {}
    rates = []
    reads = sum(len(ids) - start for ids, start in requests)
    floor = count_tokens(requests)
    for turn in range(rounds):
        for way, run in ways.items():
            started = time.perf_counter()
            sums[way] = run()
            seconds[way].append(time.perf_counter() - started)
        rates.append(dense_rate(loaded, requests, reads / floor))
        if turn == 0:  # TRL's best size goes on, and its default
            best = min((name for name in names if name.startswith(TRL)), key=lambda name: seconds[name][0])
            for name in names:
                if name.startswith(TRL) and name not in (best, f"{TRL}8"):
                    ways.pop(name)
    ours = statistics.median(seconds[OURS])
    rows = [
        {
            "way": way,
            "seconds": statistics.median(times),
            "pairs/s": encoded.height / statistics.median(times),
            "times ours": statistics.median(times) / ours,
            "largest difference, nats": max(abs(a - b) for a, b in zip(sums[OURS], sums[way], strict=True)),
            "rounds": len(times),
        }
        for way, times in seconds.items()
    ]
    print_table(pl.DataFrame(rows), f"{encoded.height} pairs of {source}, {model}, {dtype}: medians")
    computed = sum(bin_.tokens for bin_ in prefix.plan_work(loaded, requests))
    dense = statistics.median(rates)
    alone = sum(len(ids) for ids, _ in requests)
    print(
        f"tokens: {alone:,} alone, {floor:,} in one prefix tree (the floor), {computed:,} computed; {reads:,} through "
        f"the head\ntime: {ours:.2f} s, {ours * dense / floor:.2f} of the floor at the model's dense {dense:,.0f} "
        "tokens/s"
    )
    print(describe_machine("torch", "transformers", "trl", "lm-eval"), flush=True)


def summed(requests: Sequence[Request], scored) -> list[float]:
    sums = [0.0] * len(requests)
    for places, completions in scored:
        for place, completion in zip(places, completions, strict=True):
            sums[place] = float(completion.logps.sum(dtype=np.float64))
    return sums


def sorted_batches(model, requests: Sequence[Request], size: int = 8) -> list[float]:
    """Plain transformers: padded on the right, the longest first, the head on completion positions only."""
    order = sorted(range(len(requests)), key=lambda place: -len(requests[place][0]))
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    scored = ((batch, prefix.score_bin(model, [requests[p] for p in batch], 0, packed=False)) for batch in batches)
    return summed(requests, scored)


def hflm_pass(model, tokenizer, requests: Sequence[Request]) -> Callable[[], list[float]]:
    from lm_eval.models import huggingface

    lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    asked = [(("", ""), list(ids[:start]), list(ids[start:])) for ids, start in requests]
    return lambda: [logp for logp, _ in lm._loglikelihood_tokens(asked, disable_tqdm=True)]


def dense_rate(model, requests: Sequence[Request], share: float) -> float:
    """Tokens per second of a plain causal forward, the best of two lengths, the head on a share of the positions."""
    longest = max(len(ids) for ids, _ in requests)
    rates = []
    with torch.inference_mode():
        for length in {min(256, longest), min(512, longest)}:
            ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, length), device=model.device)
            keep = torch.arange(int(length * min(1.0, share)), device=model.device)
            times = []
            for _ in range(3):
                started = time.perf_counter()
                model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits.float().logsumexp(-1).sum().item()
                times.append(time.perf_counter() - started)
            rates.append(length / min(times))
    return max(rates)


def trl_pass(name: str, dtype: str, encoded: pl.DataFrame, batch: int) -> Callable[[], list[float]]:
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
    model, tokenizer = data.load_model(name, dtype)  # its own: TRL replaces the forward
    trainer = Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)

    def run() -> list[float]:
        loader = torch.utils.data.DataLoader(rows, batch_size=batch, collate_fn=trainer.data_collator)
        sides = [trainer.compute_ref_log_probs(model, inputs) for inputs in loader]
        return torch.cat([torch.cat(side) for side in zip(*sides, strict=True)]).tolist()

    return run


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    tyro.cli(main, description=__doc__)
