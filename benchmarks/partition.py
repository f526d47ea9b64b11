"""Scored rows cut into steps and written as Parquet: ours against pandas and `datasets`, in one run.

Every way reads the same scores.parquet (as the score command writes it), ranks by the margin per token, ties by
pair_id, cuts into two halves, shuffles inside them with a seed, and writes the ordered table. Each runs in a
process of its own, libraries imported before the clock starts; peak memory is the process's VmHWM. Ours is
`read_parquet`, `partition_pairs`, `write_parquet`, its checks included. `datasets` sorts twice, as it sorts by
columns alone, and has no check at all. The steps of all ways must agree. A way is
given up after --limit seconds.

    python benchmarks/partition.py --sizes 1000000 10000000
"""

import itertools
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

from sdpo_data.console import print_table
from sdpo_data.tables import SCORES

WAYS = ("ours", "pandas", "datasets")
BLOCK = 1_000_000


def main(
    sizes: list[int] = [1_000_000, 10_000_000],  # noqa: B006
    ways: list[str] = list(WAYS),  # noqa: B006
    limit: float = 900.0,
    only: Annotated[tuple[str, Path] | None, tyro.conf.arg(help="Run one way on one file here.")] = None,
) -> None:
    if only is not None:
        print(*run_way(*only))
        return
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "scores.parquet"
            make_scores(path, size)
            ours = None
            for way in ways:
                child = [sys.executable, __file__, "--only", way, str(path)]
                try:
                    done = subprocess.run(child, capture_output=True, text=True, check=True, timeout=limit)
                except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
                    (path.parent / f"{way}.parquet").unlink(missing_ok=True)
                    print(f"{way}, {size:,} rows: no figure ({error})\n{error.stderr or ''}"[-600:])
                    continue
                read, cut, write, peak = map(float, done.stdout.split()[-4:])
                total = read + cut + write
                ours = ours or total
                figures = {"read, s": read, "partition, s": cut, "write, s": write, "whole, s": total}
                rows.append({"rows": size, "way": way, **figures, "times ours": total / ours, "peak, MiB": peak})
                print_table(pl.DataFrame(rows), "scored rows, two steps by margin per token")
            agree(Path(folder), ways)
    print(describe_machine("polars", "pandas", "datasets"))


def agree(folder: Path, ways: list[str]) -> None:
    """Refuse figures of ways that did not do the same."""
    made = [folder / f"{way}.parquet" for way in ways if (folder / f"{way}.parquet").exists()]
    easy = [
        pl.scan_parquet(file).filter(pl.col("step") == 1).select(pl.col("pair_id").sort()).collect() for file in made
    ]
    assert all(other.equals(easy[0]) for other in easy), "the ways put different pairs into step 1"


def run_way(way: str, path: Path) -> tuple[float, float, float, float]:
    """Do it one way; give the seconds of reading, partitioning and writing, and the peak in MiB."""
    clock = {"ours": ours, "pandas": with_pandas, "datasets": with_datasets}[way](path, path.parent / f"{way}.parquet")
    moments = list(clock)
    seconds = [later - earlier for earlier, later in itertools.pairwise(moments)]
    return seconds[0], seconds[1], seconds[2], peak_mib()


def ours(path: Path, out: Path):
    from sdpo_data.partition import partition_pairs

    yield time.perf_counter()
    scores = pl.read_parquet(path)
    yield time.perf_counter()
    partition = partition_pairs(scores)
    yield time.perf_counter()
    partition.write_parquet(out, compression_level=1)  # as a run folder's tables are
    yield time.perf_counter()


def with_pandas(path: Path, out: Path):
    import pandas as pd

    columns = ["pair_id", "source", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"]
    yield time.perf_counter()
    scores = pd.read_parquet(path, columns=columns)
    yield time.perf_counter()
    scores["difficulty"] = -(
        scores["chosen_logp"] / scores["chosen_tokens"] - scores["rejected_logp"] / scores["rejected_tokens"]
    )
    ranked = scores[["pair_id", "source", "difficulty"]].sort_values(["difficulty", "pair_id"], ignore_index=True)
    ranked["step"] = 1 + np.arange(len(ranked)) * 2 // len(ranked)
    ranked["drawn"] = np.random.default_rng(0).permutation(len(ranked))
    ranked = ranked.sort_values(["step", "drawn"], ignore_index=True).drop(columns="drawn")
    ranked["rank"] = np.arange(len(ranked))
    ranked["definition"] = "margin_per_token"
    yield time.perf_counter()
    ranked.to_parquet(out, compression="zstd")
    yield time.perf_counter()


def with_datasets(path: Path, out: Path):
    import datasets

    datasets.disable_progress_bars()
    yield time.perf_counter()
    scores = datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"))
    yield time.perf_counter()

    def measure(rows):
        chosen, rejected = (np.array(rows[f"{s}_logp"]) / np.array(rows[f"{s}_tokens"]) for s in ("chosen", "rejected"))
        return {"difficulty": rejected - chosen}

    drop = [name for name in scores.column_names if name not in ("pair_id", "source")]
    ranked = scores.map(measure, batched=True, batch_size=10_000, remove_columns=drop).sort(["difficulty", "pair_id"])
    steps = 1 + np.arange(len(ranked)) * 2 // len(ranked)
    drawn = np.random.default_rng(0).permutation(len(ranked))
    ranked = ranked.flatten_indices().add_column("step", steps).add_column("drawn", drawn).sort(["step", "drawn"])
    ranked = ranked.remove_columns("drawn").flatten_indices()
    ranked = ranked.add_column("rank", np.arange(len(ranked)))
    ranked = ranked.add_column("definition", ["margin_per_token"] * len(ranked))
    yield time.perf_counter()
    ranked.to_parquet(out)
    yield time.perf_counter()


def peak_mib() -> float:
    """Peak memory of this process; getrusage would count what its parent had when it was forked."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def make_scores(path: Path, size: int) -> None:
    """Write SCORES of random log-probabilities, with ids of 32 hex digits as real ones have, block by block."""
    files = []
    for first in range(0, size, BLOCK):
        files.append(path.parent / f"block_{first}.parquet")
        some_scores(first, min(BLOCK, size - first)).write_parquet(files[-1])
    pl.scan_parquet(files).sink_parquet(path)
    for file in files:
        file.unlink()


def some_scores(first: int, count: int) -> pl.DataFrame:
    draw = np.random.default_rng(first)
    digits = draw.bytes(32 * count).hex()
    ids = [digits[at : at + 32] for at in range(0, len(digits), 32)]
    tokens = draw.integers(20, 400, (count, 3))
    logps = -tokens[:, :2] * draw.gamma(4.0, 0.3, (count, 2))
    columns = {
        "pair_id": ids[:count],
        "prompt_id": ids[count:],
        "source": draw.choice(["ultrafeedback", "orca", "helpful"], count).tolist(),
        "model_key": ["5a" * 16] * count,
        "chosen_logp": logps[:, 0],
        "rejected_logp": logps[:, 1],
        "chosen_tokens": tokens[:, 0],
        "rejected_tokens": tokens[:, 1],
        "prompt_tokens": tokens[:, 2],
        "truncated": [False] * count,
        "dtype": ["float32"] * count,
        **{name: [None] * count for name in SCORES if name.startswith(("rating", "against"))},
    }
    return pl.DataFrame(columns, SCORES)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
