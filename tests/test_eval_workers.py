"""Several processes evaluate as one does: launched by torchrun, on gloo, with the same bits."""

import os
import subprocess
import sys

import pytest
from polars.testing import assert_frame_equal
from test_harness import all_shots, config, data, models, other_tasks, run, small, steps_of  # noqa: F401

from sdpo_data import prefix, workers
from sdpo_data.models import load_model
from sdpo_data.run import Run
from sdpo_data.score import ScoreConfig
from sdpo_eval import evaluate, h4, score_held_out
from sdpo_eval.margins import read_held_out
from tests.conftest import ROOT

SCRIPT = """
import dataclasses, sys
from sdpo_data.console import command
from sdpo_eval import __main__, h4, held_out
for name, (count, shots) in {tasks}.items():
    h4.TASKS[name] = dataclasses.replace(h4.TASKS[name], n_full=count, shots=shots, published={{}})
for module, sys.argv in [(__main__, {first}), (__main__, {again}), (held_out, {held_out})]:
    command(module.main)
"""


@pytest.mark.real
def test_two_processes_evaluate_as_one(small, models, other_tasks, run, pairs, tmp_path):  # noqa: F811 - fixtures
    """H4, a task of choices and one that generates, of a base model and a step; then the held-out pairs."""
    two, tasks = tmp_path / "two", ["h4", "choose", "write_it"]
    for folder in (run, two):
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(f"model: {models / 'base'}\n")
        steps = folder / "arms/sdpo/seed_0/steps.parquet"
        steps.parent.mkdir(parents=True)
        steps_of(models, "one").write_parquet(steps)
        pairs.write_parquet(folder / "held_out.parquet")
    one = evaluate(Run(run).steps, config(small, tasks=tasks, task_dir=str(other_tasks), token_budget=8), run)
    scores = score_held_out(Run(run), models / "base", ScoreConfig(token_budget=8, store=str(tmp_path / "one store")))

    flags = ["--tasks", *tasks, "--task-dir", other_tasks, "--token-budget", 8, "--data-dir", small]
    calls = {"first": [two, *flags], "again": [two], "held_out": [two, "--token-budget", 8, "--store", tmp_path / "s"]}
    words = {name: ["sdpo_eval", *map(str, call)] for name, call in calls.items()}
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.format(tasks={name: (task.n_full, task.shots) for name, task in h4.TASKS.items()}, **words)
    )
    launched = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", str(29000 + os.getpid() % 300), str(script)),
    ]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    quiet["ACCELERATE_USE_CPU"] = "1"  # `accelerate launch --cpu` would start one process only
    done = subprocess.run(launched, env=quiet, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_frame_equal(Run(two).results, one, check_exact=True)
    key = ["arm", "step", "task", "item_id"]
    assert_frame_equal(Run(two).items.sort(key), Run(run).items.sort(key), check_exact=True)
    assert_frame_equal(read_held_out(Run(two)), scores, check_exact=True)
    assert done.stdout.count("H4 (n = 27)") == 1  # one of them speaks
    assert done.stdout.count(f"up to date: {two / 'results.parquet'}") == 1


@pytest.mark.parametrize(("count", "computed"), [(1, [3]), (2, [2, 1]), (4, [1, 1, 1, 0])])
def test_processes_take_turns_at_bins(count, computed, tiny_model, monkeypatch):
    model, _ = load_model(tiny_model)
    requests = [
        (list(range(3 + row, 103 + row)), 1) for row in range(9)
    ]  # 99 tokens each, in bins of 256 and what ends there
    every = dict(zip_all(prefix.score_completions(model, requests, 8)))
    bins, calls = prefix.plan_work(model, requests, 8), []
    assert len(bins) == 3
    score_bin = prefix.score_bin

    def noted(*arguments, **own):
        calls.append(1)
        return score_bin(*arguments, **own)

    monkeypatch.setattr(prefix, "score_bin", noted)
    monkeypatch.setattr(workers, "count", lambda: count)
    monkeypatch.setattr(workers, "from_main", lambda make: make())
    done, all_said = [], {}
    for rank in range(count):
        said = []

        def note(own, said=said):
            said.append(own)
            return [own or [None]] * count

        monkeypatch.setattr(workers, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(workers, "gather", note)
        calls.clear()
        list(prefix.score_together(model, requests, 8))
        done.append(len(calls))
        for turn, own in enumerate(said):
            for completions in own:
                all_said |= dict(zip(bins[turn * count + rank].sequences, completions, strict=True))
    assert done == computed
    assert {place: one.logps.tolist() for place, one in all_said.items()} == every


def zip_all(scored):
    for places, completions in scored:
        for place, one in zip(places, completions, strict=True):
            yield place, one.logps.tolist()
