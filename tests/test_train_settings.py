"""What single settings of training do to a small run on the tiny model."""

import importlib.util

import polars as pl
import pytest

from sdpo_data import PartitionConfig, partition_pairs, score_pairs
from sdpo_data.tables import SdpoError
from sdpo_train.config import NOT_NUMBERS_OF_TRL, StepConfig, TrainConfig
from sdpo_train.steps import run_sdpo
from sdpo_train.work import recipe
from tests.test_dpo import work  # noqa: F401 (a fixture)

SMALL = {"learning_rate": 1e-3, "batch_pairs": 2, "warmup": 0.0, "diagnose": False, "kl_samples": 0}

WRITER = """
from pathlib import Path
class SummaryWriter:
    def __init__(self, log_dir):
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self.file = (Path(log_dir) / "events.out.tfevents.1").open("a")
    def add_text(self, *_): pass
    def add_scalar(self, name, value, update): self.file.write(f"{name} {value} {update}")
    def flush(self): self.file.flush()
    def close(self): self.file.close()
"""


@pytest.fixture
def inputs(pairs, tiny_model):
    """Two steps of four pairs: two updates each."""
    scores = score_pairs(pairs, tiny_model)
    return pairs, partition_pairs(scores, PartitionConfig(parts=2)), str(tiny_model)


def train(inputs, out, *, force=False, **settings) -> pl.DataFrame:
    return run_sdpo(*inputs, out, config=TrainConfig(**SMALL | settings), force=force)


@pytest.fixture
def tensorboard(tmp_path, monkeypatch):
    """Give transformers' own callback for TensorBoard something to write with, where TensorBoard is not installed."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    if importlib.util.find_spec("tensorboard") is None:
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules" / "tensorboardX.py").write_text(WRITER)
        monkeypatch.syspath_prepend(tmp_path / "modules")


def events(folder):
    return {str(path.parent.relative_to(folder)) for path in folder.rglob("*tfevents*")}


def test_tensorboards_files_outlive_the_step(inputs, tmp_path, tensorboard):
    train(inputs, tmp_path / "run", trl={"report_to": "tensorboard"})
    assert events(tmp_path / "run") == {f"arms/sdpo/seed_0/runs/step_{step}" for step in (1, 2)}
    [file] = (tmp_path / "run/arms/sdpo/seed_0/runs/step_2").iterdir()
    assert file.read_bytes().count(b"train/loss") == 2  # updates
    assert not list((tmp_path / "run").rglob("*.unfinished"))
    train(inputs, tmp_path / "run", force=True, trl={"report_to": "tensorboard"})
    [file] = (tmp_path / "run/arms/sdpo/seed_0/runs/step_2").iterdir()  # those of the updates thrown away are gone
    assert file.read_bytes().count(b"train/loss") == 2


def test_tensorboards_files_go_where_the_environment_says(inputs, tmp_path, tensorboard, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    train(inputs, tmp_path / "run", trl={"report_to": "tensorboard"})
    assert (events(tmp_path / "run"), events(tmp_path / "mine")) == (set(), {"."})


def test_where_a_run_is_reported_does_not_change_what_it_is(inputs, tmp_path):
    steps = train(inputs, tmp_path / "run", trl={"weight_decay": 0.1})
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    named = {"report_to": "none", "run_name": "again", "disable_tqdm": False, "log_level": "error"}
    assert train(inputs, tmp_path / "run", trl={"weight_decay": 0.1, **named}).equals(steps)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")} == written
    with pytest.raises(SdpoError, match=r"made with trl = .*--force"):
        train(inputs, tmp_path / "run", trl={"weight_decay": 0.2})


def test_settings_that_change_no_number_are_in_no_recipe(work):  # noqa: F811
    plain, told = StepConfig(), StepConfig(trl=dict.fromkeys(NOT_NUMBERS_OF_TRL, "x"))
    assert recipe(plain) == recipe(told)
    assert work().key(plain) == work().key(told)
    other = StepConfig(trl={"weight_decay": 0.1})
    assert recipe(plain) != recipe(other)
    assert work().key(plain) != work().key(other)


def test_what_trl_does_not_take_is_refused_from_python_too(inputs, tmp_path):
    with pytest.raises(SdpoError, match=r"train\.trl\.learning_rate is decided by train\.learning_rate"):
        train(inputs, tmp_path / "run", trl={"learning_rate": 1e-6})
    with pytest.raises(SdpoError, match=r"train\.trl\.weight_decay is 'much'"):
        train(inputs, tmp_path / "run", trl={"weight_decay": "much"})
    assert not (tmp_path / "run/arms").exists()


def test_moments_that_cannot_be_carried_are_refused():
    with pytest.raises(ValueError, match=r"hands on Adam's moments, but trl\.optim is 'sgd'; take one of adamw_torch"):
        TrainConfig(optimizer="carry", trl={"optim": "sgd"})
    TrainConfig(optimizer="carry", trl={"optim": "adamw_torch"})
    TrainConfig(trl={"optim": "sgd"})
