"""Killed at any moment and started again, training ends where an unbroken run does, to the bit."""

import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import polars as pl
import pytest
from conftest import QUESTIONS

from sdpo_data import PartitionConfig, partition_pairs, read_pairs, score_pairs
from sdpo_data.run import Run
from sdpo_train import TrainConfig, checkpoints, run_sdpo
from sdpo_train.checkpoints import SEAL, newest, seal

CONFIG = TrainConfig(
    learning_rate=1e-3, batch_pairs=2, epochs=2, checkpoint_minutes=1e-6, kl_samples=2, optimizer="carry"
)  # a checkpoint after every update
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["sdpo_train.dpo"])


@pytest.fixture(scope="module")
def inputs(tiny_model, tmp_path_factory):
    rows = [{"prompt": question, "chosen": good, "rejected": bad} for question, good, bad in QUESTIONS]
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    pl.DataFrame(rows).write_ndjson(file)
    pairs = read_pairs(file)
    scores = score_pairs(pairs, tiny_model)
    return pairs, partition_pairs(scores, PartitionConfig(parts=2)), str(tiny_model)


def train(inputs, out: Path, config: TrainConfig) -> None:
    """Train a run with a score store of its own, so that scoring is cut off too; in a process of its own."""
    logging.basicConfig(filename=f"{out}.log", level=logging.INFO)
    os.environ["OMP_NUM_THREADS"] = "1"
    pairs, partition, model = inputs
    try:
        run_sdpo(pairs, partition, model, out, config=config, store=f"{out}.store")
    except KeyboardInterrupt as interrupted:
        Path(f"{out}.stopped").write_text(str(interrupted))
        raise SystemExit(130) from None


def start(inputs, out, config=CONFIG):
    process = PROCESSES.Process(target=train, args=(inputs, out, config))
    process.start()
    return process


def finished(out: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """All that a run must end with: steps with the keys of their weights, metrics, and the scores it made."""
    run = Run(out)
    metrics = run.metrics.filter(~pl.col("name").str.starts_with("cost/")).sort(pl.all())
    files = sorted(out.glob("arms/*/*/step_*/*scores.parquet"))
    return run.steps.drop("seconds", "model"), metrics, pl.concat([pl.read_parquet(file) for file in files])


def same(left, right) -> bool:
    return all(one.equals(other) for one, other in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def unbroken(inputs, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("runs")
    started = time.monotonic()
    process = start(inputs, tmp_path / "unbroken")
    process.join()
    assert process.exitcode == 0, (tmp_path / "unbroken.log").read_text()
    return finished(tmp_path / "unbroken"), time.monotonic() - started


@pytest.mark.real
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_where_an_unbroken_run_does(inputs, tmp_path, unbroken, kills):
    expected, seconds = unbroken
    moments, done, number = random.Random(kills), 0, 0
    while done < kills:
        number += 1
        out = tmp_path / f"killed_{number}"
        while True:
            process = start(inputs, out)
            process.join(moments.uniform(0.05, 0.5) * seconds if done < kills else None)
            if process.exitcode is not None:
                assert process.exitcode == 0, Path(f"{out}.log").read_text()
                break
            process.kill()
            process.join()
            done += 1
        assert same(finished(out), expected), f"run {number}"
        assert not list(out.rglob("*.unfinished"))
        assert not list(out.rglob(".step_*.tmp"))  # a model that a kill left half written


@pytest.mark.real
def test_a_clusters_sigterm_leaves_a_checkpoint_and_the_next_start_goes_on(inputs, tmp_path, unbroken):
    out = tmp_path / "stopped"
    process = start(inputs, out)
    while not (checkpoint := sorted(out.rglob(SEAL))) and process.is_alive():
        time.sleep(0.01)
    assert checkpoint
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 130
    assert "stopped at update" in Path(f"{out}.stopped").read_text()
    assert sorted(out.rglob(SEAL))
    process = start(inputs, out)
    process.join()
    assert process.exitcode == 0
    assert "goes on from checkpoint-" in Path(f"{out}.log").read_text()
    assert same(finished(out), unbroken[0])


@pytest.mark.real
def test_a_damaged_checkpoint_and_one_of_other_settings_are_not_resumed(inputs, tmp_path, unbroken):
    out = tmp_path / "damaged"
    process = start(inputs, out)
    while len(sorted(out.rglob(SEAL))) < 1 and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    [sealed] = sorted(out.rglob(SEAL))
    weights = sealed.parent / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    process = start(inputs, out)
    process.join()
    assert "is not resumed: model.safetensors is damaged" in Path(f"{out}.log").read_text()
    assert same(finished(out), unbroken[0])


@pytest.fixture
def checkpoint(tmp_path):
    """Write a sealed checkpoint of update 4, and give its folder."""

    def make(update=4, key="work"):
        folder = tmp_path / f"checkpoint-{update}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        seal(folder, key, {"start_gap": 1e-4})
        return folder

    return make


def test_only_a_whole_checkpoint_of_the_same_work_is_taken(tmp_path, checkpoint, caplog):
    caplog.set_level(logging.INFO, "sdpo_train")
    folder = checkpoint()
    assert newest(tmp_path, "work") == (folder, {"start_gap": 1e-4})
    (tmp_path / "checkpoint-9").mkdir()  # a kill while it was written
    (tmp_path / "checkpoint-9" / "model.safetensors").write_bytes(b"half")
    assert newest(tmp_path, "work") == (folder, {"start_gap": 1e-4})
    assert "checkpoint-9 is not resumed: it was not finished" in caplog.text
    assert not (tmp_path / "checkpoint-9").exists()
    assert newest(tmp_path, "other work") is None
    assert "it belongs to other settings, pairs or weights" in caplog.text
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["changed", "removed", "seal"])
def test_a_damaged_checkpoint_is_not_taken(tmp_path, checkpoint, damage):
    folder = checkpoint()
    if damage == "changed":
        (folder / "model.safetensors").write_bytes(b"Weights")
    elif damage == "removed":
        (folder / "model.safetensors").unlink()
    else:
        (folder / SEAL).write_text("{")
    assert newest(tmp_path, "work") is None


def test_a_new_seal_removes_what_is_older(tmp_path, checkpoint):
    checkpoint(4)
    later = checkpoint(10)
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-10"]
    assert newest(tmp_path, "work") == (later, {"start_gap": 1e-4})
    shutil.rmtree(later)
    assert newest(tmp_path, "work") is None
    assert checkpoints._checkpoints(tmp_path) == []
