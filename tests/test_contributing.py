"""What CONTRIBUTING.md says one adds in a few lines, done as it stands there."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import ruamel.yaml

import sdpo_data as data
from sdpo_data.difficulty import DIFFICULTIES, difficulty_named
from sdpo_eval import EvalConfig, evaluate
from tests.conftest import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))


def block(section: str, language: str) -> str:
    """The one code block of a section in a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], re.DOTALL | re.MULTILINE)
    assert found.count("\n") < 30  # what is promised
    return found


def test_a_difficulty_is_added(scores, monkeypatch):
    monkeypatch.setattr("sdpo_data.difficulty.DIFFICULTIES", known := dict(DIFFICULTIES))
    exec(block("Add a difficulty", "python"), {})  # the text under test, ours
    # margins a +1, b -3, c +1, d -9, e +4; prompt tokens 7, 8, 9, 10, 11
    got = difficulty_named("margin_per_prompt_token").measure(scores).to_list()
    assert got == pytest.approx([-1 / 7, 3 / 8, -1 / 9, 9 / 10, -4 / 11])
    assert known["margin_per_prompt_token"].unit == "nats per prompt token"
    assert known["margin_per_prompt_token"].source.startswith("an example")
    part = data.partition_pairs(scores, data.PartitionConfig(parts=2, difficulty="margin_per_prompt_token"))
    assert set(part.filter(step=1)["pair_id"]) == {"e", "a", "c"}  # the easiest three of five
    (command,) = re.findall(r"`--difficulty \"(.*?)\"`", SECTIONS["Add a difficulty"])
    assert difficulty_named(command).measure(scores).to_list() == pytest.approx(got)


def test_a_task_is_added(tiny_model, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "capitals.yaml").write_text(block("Add a task", "yaml").replace("FOLDER", str(folder)))
    (row,) = re.findall(r"`(\{\"country\".*?\})`", SECTIONS["Add a task"])
    rows = [json.loads(row) | {"gold": number % 2} for number in range(4)]
    (folder / "capitals.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    results = evaluate(str(tiny_model), EvalConfig(tasks=["capitals"], task_dir=str(folder)), tmp_path / "run")
    assert results.select("task", "metric", "n").rows() == [("capitals", "acc", 4)]
    assert results["value"][0] == 50.0  # the same question four times, right twice whatever the model says
    (command,) = re.findall(r"`python -m sdpo_eval RUN (.*?)`", SECTIONS["Add a task"])
    assert command == "--tasks h4 capitals --task-dir FOLDER"
    assert {"tasks", "task_dir"} <= set(EvalConfig.model_fields)
    assert isinstance(ruamel.yaml.YAML(typ="safe").load(block("Add a task", "yaml")), dict)


def test_an_arm_is_added(scores, monkeypatch):
    from sdpo_train import arms

    monkeypatch.setattr(arms, "ARMS", dict(arms.ARMS))
    exec(block("Add an arm", "python"), {})  # the text under test, ours
    partition = data.partition_pairs(scores, data.PartitionConfig(parts=2))
    own = arms.arm_partition(arms.arm_named("hard_to_easy_fixed"), partition, 0)
    hardest = set(partition.filter(step=2)["pair_id"])
    assert set(own.filter(step=1)["pair_id"]) >= hardest  # which has three of the five pairs now
    from sdpo_train.config import TrainConfig

    told = arms.compare_arms(arms.variants(TrainConfig(arms=["sdpo", "hard_to_easy_fixed"])), partition, scores)
    assert "reference previous -> base" in told["against sdpo"][1]


def test_a_cut_is_added(tmp_path):
    shutil.copytree(ROOT / "sdpo_data", tmp_path / "sdpo_data", ignore=shutil.ignore_patterns("__pycache__"))
    diff = block("Add a cut", "diff")
    subprocess.run(["git", "apply", "--unidiff-zero", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    code = """
import polars as pl
from sdpo_data.cuts import cut_by_rank
from sdpo_data.partition import PartitionConfig
assert PartitionConfig(cut="halves", parts=3).cut == "halves"
print(cut_by_rank(pl.DataFrame({"pairs": [1] * 8, "tokens": [1] * 8}), "halves", 3, []).to_list())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "[1, 1, 1, 1, 2, 2, 3, 3]\n", done.stderr  # 4 of 8, 2 of 4, what is left


def test_every_section_that_adds_has_a_test():
    assert {name for name in SECTIONS if name.startswith("Add ")} == {
        "Add a difficulty", "Add a task", "Add an arm", "Add a cut",
    }  # fmt: skip
