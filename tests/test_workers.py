"""Several processes: the same scores as one, also where one of them is killed and all are started again."""

import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest

from sdpo_data import workers
from sdpo_data.pairs import read_pairs
from sdpo_data.score import ScoreConfig, score_pairs
from tests.conftest import QUESTIONS, ROOT


def test_one_process_is_the_main_one_and_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (workers.count(), workers.rank(), workers.is_main()) == (1, 0, True)
    assert workers.share({"a": 1}) == {"a": 1}
    workers.wait()


@pytest.fixture
def many(tmp_path):
    """160 pairs, of which a tree in rows of 8 tokens makes some 30 bins."""
    rows = [
        {"prompt": [{"role": "user", "content": f"{number}: {question}"}],
         "chosen": [{"role": "assistant", "content": chosen}], "rejected": [{"role": "assistant", "content": rejected}]}
        for number in range(20) for question, chosen, rejected in QUESTIONS
    ]  # fmt: skip
    path = tmp_path / "many.jsonl"
    pl.DataFrame(rows).write_ndjson(path)
    return path


TWO = (  # `accelerate launch --cpu --num_processes 2` starts one process only: two on a CPU would need mpirun
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
    *("--master-port", str(29300 + os.getpid() % 300)),
)


def launch(run, many, model, store):
    command = [
        *TWO,
        *("-m", "sdpo_data.score", run, "--pairs.source", many),
        *("--pairs.hold-out", 0, "--model", model, "--token-budget", 8, "--store", store),
    ]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=quiet, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.real
def test_two_processes_score_as_one_even_when_one_was_killed(many, tiny_model, tmp_path, monkeypatch):
    """Bit for bit: the bins are the same, whoever computes them. One thread, as the launched processes have."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = score_pairs(read_pairs(many), tiny_model, ScoreConfig(token_budget=8, store=str(tmp_path / "one")))
    finally:
        torch.set_num_threads(threads)
    store, run = tmp_path / "two", tmp_path / "run"
    killed = launch(run, many, tiny_model, store)
    until = time.monotonic() + 120
    while len(list(store.glob("*/*.parquet"))) < 4:
        assert killed.poll() is None, killed.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(killed.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)  # one of the two; the launcher ends the other
    killed.communicate(timeout=120)
    assert killed.returncode != 0
    assert not (run / "scores.parquet").exists()
    before = len(list(store.glob("*/*.parquet")))
    again = launch(run, many, tiny_model, store)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert out.count("reward_accuracy") == 1  # the main process speaks for both
    assert before > 0
    assert pl.read_parquet(run / "scores.parquet").select(one.columns).equals(one)
