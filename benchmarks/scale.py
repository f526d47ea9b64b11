"""Peak memory and time of scoring up to a million synthetic pairs with a two-layer model.

Each size runs in a process of its own: pairs are made block by block into a Parquet file, then scored as any run
is. What may grow with the number of pairs is the pairs themselves and their scores, not their tokens or the plan.

    python benchmarks/scale.py --sizes 10000 100000 1000000
"""

import subprocess
import sys
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
from sdpo_data.tables import PAIRS, TEXT

WORDS = 4000  # a token each


def main(
    sizes: list[int] = [10_000, 100_000],  # noqa: B006
    only: Annotated[int | None, tyro.conf.arg(help="Score this many here and print the figures.")] = None,
) -> None:
    if only is not None:
        print(*score(only))
        return
    rows = []
    for size in sizes:
        done = subprocess.run(
            [sys.executable, __file__, "--only", str(size)], capture_output=True, text=True, check=True
        )
        frames, before, peak, seconds = map(float, done.stdout.split()[-4:])
        figures = {"pairs": size, "pairs frame, MiB": frames, "before scoring, MiB": before, "peak, MiB": peak}
        rows.append(figures | {"seconds": seconds, "pairs/s": size / seconds})
        print_table(pl.DataFrame(rows), "scoring synthetic pairs, two-layer model, one process each")
    print(describe_machine("polars", "torch", "transformers"))


def score(size: int) -> tuple[float, float, float, float]:
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model()
        path = Path(folder) / "pairs.parquet"
        pl.concat([some_pairs(first, min(50_000, size - first)) for first in range(0, size, 50_000)]).write_parquet(
            path
        )
        pairs = pl.read_parquet(path)
        before = peak_mib()
        started = time.perf_counter()
        scores = data.score_pairs(pairs, model, data.ScoreConfig(store=folder))
        seconds = time.perf_counter() - started
        assert scores.height == size
        return (
            pairs.estimated_size() / 2**20,
            before,
            peak_mib(),
            seconds,
        )


def peak_mib() -> float:
    """Peak memory of this process; getrusage would count what its parent had when it was forked."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def some_pairs(first: int, count: int) -> pl.DataFrame:
    """Prompts of 12 words, answers of 4 to 11."""
    draw = np.random.default_rng(first)
    words = draw.integers(0, WORDS, (count, 34)).astype(str)
    lengths = draw.integers(4, 12, (count, 2))
    numbers = [str(number) for number in range(first, first + count)]
    given = {
        "pair_id": numbers,
        "prompt_id": numbers,
        "source": ["synthetic"] * count,
        "prompt": [" ".join(row[:12]) + " " for row in words],
        "chosen": [" ".join(row[12 : 12 + n]) for row, n in zip(words, lengths[:, 0], strict=True)],
        "rejected": [" ".join(row[23 : 23 + n]) for row, n in zip(words, lengths[:, 1], strict=True)],
        "format": [TEXT] * count,
    }
    return pl.DataFrame(given | {name: [None] * count for name in PAIRS if name not in given}, PAIRS)


def tiny_model():
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {str(number): number for number in range(WORDS)} | {"<eos>": WORDS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
