"""The commands one after the other, as a user types them."""

import os
import subprocess
import sys

import polars as pl
import pytest

from sdpo_data import open_run
from tests.conftest import ROOT


def test_partition_and_train_on_the_tiny_model(run_command, pair_file, tiny_model, tmp_path):
    run = tmp_path / "run"
    code, out, err = run_command(
        "sdpo_data.partition",
        run,
        "--pairs.source",
        pair_file,
        "--pairs.hold-out",
        0.25,
        "--model",
        tiny_model,
        "--parts",
        2,
    )
    assert code == 0, err
    assert "up to date" not in out
    code, out, _ = run_command("sdpo_data.partition", run)  # settings are remembered
    assert (code, out) == (0, f"up to date: {run / 'partition.parquet'}\n")
    code, out, err = run_command("sdpo_train", run, "--batch-pairs", 2, "--learning-rate", "1e-3")
    assert code == 0, err
    code, out, _ = run_command("sdpo_train", run)
    assert (code, out) == (0, f"up to date: {run / 'arms'}\n")

    made = open_run(run)
    assert made.pairs.height + made.held_out.height == 8
    assert made.steps["step"].to_list() == [1, 2]
    trained = made.partition.group_by("step").len().sort("step")["len"].to_list()
    assert made.steps["pairs"].to_list() == trained
    assert set(made.lineage) == {"pairs", "scores", "partition", "arms/sdpo/seed_0/step_1", "arms/sdpo/seed_0/step_2"}

    before = made.lineage
    code, out, err = run_command("sdpo_data.partition", run, "--seed", 1, "--force")
    assert code == 0, err
    changed = {unit for unit, entry in made.lineage.items() if entry != before[unit]}
    assert changed == {"partition"}  # --force does not pay for pairs and scores again
    code, _, err = run_command("sdpo_train", run)
    assert code == 2
    assert "step_1 is stale: partition.parquet has changed" in err


@pytest.mark.real
def test_the_four_commands_on_the_embedded_model_and_again(tmp_path):
    run = tmp_path / "run"
    config = tmp_path / "short.yaml"
    config.write_text(
        "pairs: {source: [embedded:alpaca-eval, embedded:piqa], limit: 5, hold_out: 0.1}\n"
        "score: {max_length: 256}\n"
        "train: {learning_rate: 5e-6, batch_pairs: 2, warmup: 0, max_length: 256}\n"
        "eval: {limit: 1, mmlu_subjects: [marketing]}\n"
    )
    commands = [
        ["sdpo_data.partition", run, "--config", config],
        ["sdpo_train", run],
        ["sdpo_eval", run],
        ["sdpo_eval.report", run],
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}

    def call(command):
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = [call(command) for command in commands]
    assert "report.html" in first[-1]
    again = [call(command) for command in commands]
    assert all("up to date" in out for out in again), again

    made = open_run(run)
    tasks = set(made.results["task"])
    assert {"arc_challenge", "hellaswag", "mmlu"} <= tasks
    assert ("h4" in tasks) == ("truthfulqa_mc2" in tasks)  # TruthfulQA needs the hub
    models = made.results.filter(pl.col("task") == "mmlu").sort("step").select("arm", "step", "n").rows()
    assert models == [("base", 0, 1), ("sdpo", 1, 1), ("sdpo", 2, 1)]
    assert (made.steps["max_start_gap"] < 5e-3).all()
    page = (run / "report.html").read_text()
    assert "2403.19270" in page
    assert (run / "report.html").stat().st_size < 5_000_000
