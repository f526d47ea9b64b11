"""Every benchmark script still runs: each on ten rows or fewer, in this process, its figures not looked at."""

import gzip
import importlib
import json
import sys

import polars as pl
import pytest

from sdpo_data.tables import PAIRS, SCORES, check
from sdpo_train import dpo
from tests.conftest import QUESTIONS, ROOT
from tests.test_harness import all_shots, data, small  # noqa: F401 (fixtures)

FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Import a script by its name, as it would be found when it is run; forget it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("SDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    before = set(sys.modules)
    yield importlib.import_module
    for name in SCRIPTS:
        if name not in before:
            sys.modules.pop(name, None)


@pytest.fixture
def shared(tmp_path):
    """Benchmarks and pairs in the layout of the data folder, three lines each."""
    rows = [
        {"prompt": [{"role": "user", "content": q}], "chosen": [{"role": "assistant", "content": c}],
         "rejected": [{"role": "assistant", "content": r}]}
        for q, c, r in QUESTIONS
    ]  # fmt: skip
    decontaminate = importlib.import_module("decontaminate")
    for number, name in enumerate(decontaminate.REAL):
        lines = "".join(json.dumps(row) + "\n" for row in rows[number::3])
        (tmp_path / "prefs" / f"{name}.jsonl.gz").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "prefs" / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "benchmarks").mkdir()
    for name, column in decontaminate.BENCHMARKS.items():
        lines = "".join(json.dumps({column: f"{question} And what of {name}, if one may ask so?"}) + "\n"
                        for question, _, _ in QUESTIONS[:3])  # fmt: skip
        (tmp_path / "benchmarks" / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def test_every_script_is_tested_here():
    tested = {name.removeprefix("test_the_").removesuffix("_script_runs") for name in globals()}
    assert set(SCRIPTS) <= tested


def test_the_machine_script_runs(script):
    told = script("machine").describe_machine("polars")
    assert f"polars {pl.__version__}" in told
    assert " cores, " in told
    assert " 0 GiB" not in told


def test_the_scale_script_runs(script):
    scale = script("scale")
    check(scale.some_pairs(40, 10), PAIRS, "pairs")
    frames, before, peak, seconds = scale.score(10)
    assert 0 < frames < 1 < before <= peak
    assert seconds > 0


def test_the_partition_script_runs(script, tmp_path):
    partition = script("partition")
    partition.make_scores(tmp_path / "scores.parquet", 10)
    check(pl.read_parquet(tmp_path / "scores.parquet"), SCORES, "scores")
    for way in partition.WAYS:
        *seconds, peak = partition.run_way(way, tmp_path / "scores.parquet")
        assert min(seconds) >= 0 < peak
    partition.agree(tmp_path, list(partition.WAYS))


def test_the_decontaminate_script_runs(script, shared, capsys):
    script("decontaminate").main(shared, [10], loop=10)
    assert "both found the same" in capsys.readouterr().out


def test_the_duplicates_script_runs(script, shared, capsys):
    script("duplicates").main(shared, [10], loop=10)
    assert "ours missed 0 and added 0" in capsys.readouterr().out


def test_the_score_script_runs(script, pair_file, tiny_model, capsys):
    script("score").main([str(pair_file)], str(tiny_model), count=4, rounds=1)
    out = capsys.readouterr().out
    assert "TRL, batches of 4" in out
    assert "of the floor at the model's dense" in out


@pytest.mark.real
def test_the_score_script_makes_a_model_of_a_shape(script, pair_file, capsys, monkeypatch):
    score = script("score")
    score.main([str(pair_file)], "random:tiny", count=2, rounds=1)
    monkeypatch.setattr(score, "LlamaForCausalLM", None)  # made once
    assert score.random_model("random:tiny", "float32").endswith("random_tiny_float32")
    assert "of the floor at the model's dense" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there are random:7b, random:tiny"):
        score.random_model("random:8b", "float32")


@pytest.mark.real
def test_the_train_script_runs(script, pair_file, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(dpo, "ScoreStore", dpo.ScoreStore)  # the script puts its own there
    train = script("train")
    for way in train.WAYS:
        figures = train.run_way(way, str(pair_file), str(tiny_model), 2, 2, 512)
        assert 0 < figures["last loss"] < 2
    train.describe_floor(str(pair_file), str(tiny_model), 2, 2, 512, 1.0)
    assert "of the floor" in capsys.readouterr().out


def test_the_eval_script_runs(script, small, tiny_model, capsys):  # noqa: F811
    script("eval").main(str(small), str(tiny_model), items=(1, 1, 1), mmlu=(1, 2))
    script("eval").main(str(small), str(tiny_model), count=True)
    assert "tree floor" in capsys.readouterr().out
