"""The score store as a folder: whole or not at all, checked on read, merged by copying, shared by processes."""

import hashlib
import logging
import shutil
import subprocess
import sys

import polars as pl
import pytest

from sdpo_data.store import PLAN, SHARD, ScoreStore
from sdpo_data.tables import SdpoError
from tests.conftest import ROOT


def rows(*requests: str, bin_: str = "b", tokens: list[float] | None = None) -> pl.DataFrame:
    values = [(key, -1.5 - place, 3, bin_, place, 512, True, tokens) for place, key in enumerate(requests)]
    return pl.DataFrame(values, SHARD, orient="row")


def plan(bin_: str, *requests: str) -> pl.DataFrame:
    return pl.DataFrame([(bin_, place, key, True, 512, 9) for place, key in enumerate(requests)], PLAN, orient="row")


@pytest.fixture
def store(tmp_path):
    return ScoreStore(tmp_path / "store", "key", "float32")


def test_what_was_written_is_found_by_the_next_one_and_by_one_that_looks_again(store, tmp_path):
    other = ScoreStore(tmp_path / "store", "key", "float32")
    store.write(rows("a", "b"))
    assert store.find(["b", "c"])["request"].to_list() == ["b"]
    assert other.find(["a"]).is_empty()
    other.refresh()
    assert other.find(["a"])["logp"].to_list() == [-1.5]
    assert ScoreStore(tmp_path / "store", "key", "float32").find(["a", "b", "a"]).height == 2  # each once


def test_another_model_or_dtype_knows_nothing(store, tmp_path):
    store.write(rows("a"))
    assert ScoreStore(tmp_path / "store", "other", "float32").find(["a"]).is_empty()
    assert ScoreStore(tmp_path / "store", "key", "bfloat16").find(["a"]).is_empty()


def test_a_damaged_shard_is_not_believed(store, tmp_path, caplog):
    store.write(rows("a"))
    store.write(rows("b"))
    damaged = sorted(store.folder.glob("*.parquet"))[0]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    caplog.set_level(logging.WARNING)
    again = ScoreStore(tmp_path / "store", "key", "float32")
    assert again.find(["a", "b"]).height == 1
    assert f"{damaged} is damaged" in caplog.text


def test_half_a_write_is_no_shard(store, tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        store.write(rows("a"))
    monkeypatch.undo()
    assert ScoreStore(tmp_path / "store", "key", "float32").find(["a"]).is_empty()
    assert list(store.folder.glob("*.parquet")) == []


def test_stores_are_merged_by_copying_one_over_the_other(store, tmp_path):
    store.write(rows("a"))
    other = ScoreStore(tmp_path / "other", "key", "float32")
    other.write(rows("a"))  # the same content is the same file
    other.write(rows("b", bin_="c"))
    shutil.copytree(tmp_path / "other", tmp_path / "store", dirs_exist_ok=True)
    merged = ScoreStore(tmp_path / "store", "key", "float32")
    assert merged.find(["a", "b"]).height == 2
    assert len(list(merged.folder.glob("*.parquet"))) == 2


def test_of_two_rows_of_one_answer_the_fuller_is_kept(store):
    store.write(rows("a"))
    assert store.find(["a"], token_logps=True).is_empty()
    store.write(rows("a", tokens=[-1.0, -0.5, 0.0]))
    assert store.find(["a"])["token_logps"].to_list() == [[-1.0, -0.5, 0.0]]
    assert store.find(["a"], token_logps=True).height == 1


def test_many_small_shards_become_one_and_nothing_is_lost(store, tmp_path, monkeypatch):
    monkeypatch.setattr("sdpo_data.store.COMPACT_FROM", 5)
    reader = ScoreStore(tmp_path / "store", "key", "float32")
    for number in range(4):
        store.write(rows(f"r{number}", bin_=f"b{number}"))
    store.finish()
    assert len(list(store.folder.glob("*.parquet"))) == 4
    store.write(rows("r4", bin_="b4"))
    store.finish()
    assert len(list(store.folder.glob("*.parquet"))) == 1
    wanted = [f"r{number}" for number in range(5)]
    reader.refresh()
    assert [one.find(wanted).height for one in (store, reader, ScoreStore(tmp_path / "store", "key", "float32"))] == [
        5
    ] * 3


def test_a_merge_keeps_the_row_with_token_log_probabilities(store, tmp_path, monkeypatch):
    """Whichever of the two names comes first: of ten answers at two shards each, both orders occur."""
    monkeypatch.setattr("sdpo_data.store.COMPACT_FROM", 5)
    keys = [f"r{number}" for number in range(10)]
    for number, key in enumerate(keys):
        store.write(rows(key, bin_=f"b{number}"))
        store.write(rows(key, bin_=f"b{number}", tokens=[-1.0, -0.5, 0.0]))
    store.finish()
    assert len(list(store.folder.glob("*.parquet"))) == 1
    assert ScoreStore(tmp_path / "store", "key", "float32").find(keys, token_logps=True).height == 10


@pytest.mark.parametrize("damaged", [False, True])
def test_what_only_a_merge_has_read_is_found_too(store, tmp_path, monkeypatch, damaged):
    """Also where it finds too little that is whole, and leaves it as it is."""
    monkeypatch.setattr("sdpo_data.store.COMPACT_FROM", 3)
    if damaged:
        (store.folder / f"{'0' * 32}.parquet").write_bytes(b"nothing")
        monkeypatch.setattr("sdpo_data.store.COMPACT_FROM", 4)
    other = ScoreStore(tmp_path / "store", "key", "float32")
    other.write(rows("a"))
    other.write(rows("b", bin_="c"))
    store.write(rows("c", bin_="d"))
    store.finish()
    assert len(list(store.folder.glob("*.parquet"))) == (4 if damaged else 1)
    store.refresh()
    assert store.find(["a", "b", "c"]).height == 3


def test_a_shard_of_before_packed_was_kept_is_read_and_gives_way_to_one_that_says_it(store, tmp_path):
    old = ScoreStore(tmp_path / "old", "key", "float32")
    content = rows("a", "b", bin_="x", tokens=[-1.0, -0.5, 0.0]).drop("packed")
    content.write_parquet(tmp_path / "shard.parquet")
    name = hashlib.sha256((tmp_path / "shard.parquet").read_bytes()).hexdigest()[:32]
    shutil.move(tmp_path / "shard.parquet", old.folder / f"{name}.parquet")
    old.refresh()
    assert old.find(["a", "b"])["packed"].to_list() == [None, None]
    old.write(rows("b", bin_="y"))
    assert old.find(["a", "b"]).select("bin", "packed").rows() == [("x", None), ("y", True)]


def test_bins_begun_are_there_until_all_their_answers_are(store):
    store.begin(pl.concat([plan("x", "a", "b"), plan("y", "c")]))
    store.write(rows("a", "b", bin_="x"))
    store.finish()
    assert store.unfinished()["bin"].to_list() == ["x", "x", "y"]  # the plan stays whole
    store.write(rows("c", bin_="y"))
    store.finish()
    assert store.unfinished().is_empty()


def test_a_damaged_plan_is_forgotten(store):
    store.begin(plan("x", "a"))
    [path] = (store.folder / "plans").glob("*.parquet")
    path.write_bytes(b"nothing")
    assert store.unfinished().is_empty()
    store.finish()
    assert not path.exists()


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SdpoError, match=r"score\.store .*file cannot be made \(.*\)\. Name a folder"):
        ScoreStore(tmp_path / "file", "key", "float32")


def test_processes_that_write_and_merge_at_once_lose_nothing(tmp_path):
    """Four processes, 30 shards each, merging as often as they can."""
    code = """
import sys
import sdpo_data.store as module
from tests.test_store import rows
module.COMPACT_FROM = 3
store = module.ScoreStore(sys.argv[1], "key", "float32")
for number in range(30):
    store.write(rows(f"{sys.argv[2]}-{number}", bin_=f"{sys.argv[2]}-{number}"))
    store.finish()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    running = [subprocess.Popen([*command, str(process)], cwd=ROOT) for process in range(4)]
    assert [process.wait(timeout=120) for process in running] == [0] * 4
    wanted = [f"{process}-{number}" for process in range(4) for number in range(30)]
    assert ScoreStore(tmp_path / "store", "key", "float32").find(wanted).height == 120
