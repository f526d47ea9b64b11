"""The whole command in two processes, as `accelerate launch -m sdpo_train RUN` starts it, against one."""

import os
import socket
import subprocess
import sys

import polars as pl
import pytest

from sdpo_data.models import load_model, model_key
from sdpo_data.run import Run
from tests.conftest import ROOT, ready_to_train

pytestmark = pytest.mark.real

SETTINGS = """
model: MODEL
train: {arms: [sdpo, sdpo_fixed], learning_rate: 1.0e-3, batch_pairs: 3, beta: 0.5, kl_samples: 2, lora_rank: RANK}
"""
BITS = ("start_key", "reference_key", "model_key", "model", "seconds")
"""Columns of STEPS that differ: the gradients of two processes are summed in another order, so weights differ in
their last bits, and keys wholly."""


@pytest.fixture
def launch(pairs, tiny_model, tmp_path):
    """Run the command on a run folder, in so many processes; torchrun, as `accelerate launch --cpu` starts one only."""

    def launch(processes: int, rank: int) -> tuple[Run, str]:
        run = Run(tmp_path / f"run_{processes}")
        if not run.path.exists():
            ready_to_train(run.path, pairs, tiny_model, parts=2)
            pairs.head(2).write_parquet(run.path / "held_out.parquet")
            text = SETTINGS.replace("MODEL", str(tiny_model)).replace("RANK", str(rank))
            (run.path / "config.yaml").write_text(text)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
                 "ACCELERATE_USE_CPU": "1", "SDPO_CACHE": str(tmp_path / f"cache_{processes}")}  # fmt: skip
        command = [sys.executable, *launcher, "-m", "sdpo_train", str(run.path)]
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return run, done.stdout

    return launch


def close(one: pl.DataFrame, other: pl.DataFrame, keys: list[str]) -> bool:
    """Whether two tables have the same rows, and values within float32 noise."""
    names = [name for name, dtype in one.schema.items() if dtype.is_float()]
    both = one.join(
        other, on=[name for name in one.columns if name not in names], how="full", suffix="_other", nulls_equal=True
    )
    apart = [(pl.col(name) - pl.col(f"{name}_other")).abs() > 1e-5 + 1e-3 * pl.col(name).abs() for name in names]
    unequal = [pl.col(name).is_null() != pl.col(f"{name}_other").is_null() for name in names]
    assert one.height == other.height == one.unique(keys).height
    return both.height == one.height and both.filter(pl.any_horizontal(*apart, *unequal)).is_empty()


@pytest.mark.parametrize("rank", [0, pytest.param(4, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_two_processes_train_two_arms_as_one_does(launch, rank):
    """Two steps of four pairs in updates of 3 and 1: one process of two has nothing to do in the second."""
    (one, out), (two, out_two) = launch(1, rank), launch(2, rank)
    assert out.count("(losses and log-probabilities in nats)") == out_two.count("(losses and") == 1
    assert one.steps["pairs"].to_list() == [4, 4, 4, 4]
    assert two.steps["shared_from"].to_list() == [None, None, "arms/sdpo/seed_0/step_1", None]
    assert close(one.steps.drop(BITS), two.steps.drop(BITS), ["arm", "seed", "step"])
    made = [run.metrics.filter(~pl.col("name").str.starts_with("cost/")) for run in (one, two)]
    assert close(*made, ["arm", "seed", "step", "update", "name"])
    assert {"loss", "held_out/margin_change", "kl_base/k1"} <= set(made[1]["name"])
    files = [{str(file.relative_to(run.path)) for file in run.path.rglob("*")} for run in (one, two)]
    assert files[0] == files[1]
    for start, end in zip(one.steps["model"], two.steps["model"], strict=True):
        for weight, other in zip(load_model(start)[0].parameters(), load_model(end)[0].parameters(), strict=True):
            assert (weight - other).abs().max() < 1e-4
    for steps in (one.steps, two.steps):
        for row in steps.to_dicts():
            assert row["model_key"] == model_key(row["model"])
            if row["step"] == 2:
                before = steps.filter(arm=row["arm"], step=1)["model_key"][0]
                assert row["start_key"] == before
    written = {file: file.stat().st_mtime_ns for file in two.path.rglob("*.parquet")}
    assert launch(2, rank)[1].count("up to date") == 1
    assert {file: file.stat().st_mtime_ns for file in two.path.rglob("*.parquet")} == written
