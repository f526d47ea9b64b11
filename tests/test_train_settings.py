"""What single settings of training do to a small run on the tiny model."""

import importlib.util
from pathlib import Path

import huggingface_hub
import polars as pl
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from sdpo_data import PartitionConfig, partition_pairs, score_pairs
from sdpo_data.models import load_model
from sdpo_data.run import Run
from sdpo_data.tables import RESULTS, SdpoError
from sdpo_train.config import NOT_NUMBERS_OF_TRL, StepConfig, TrainConfig
from sdpo_train.steps import run_sdpo
from sdpo_train.trainer import PairTrainer
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


def learning_rates(folder) -> list[float]:
    rates = Run(folder).metrics.filter(pl.col("name") == "learning_rate").sort("step", "update")
    return rates["value"].to_list()


@pytest.mark.real
def test_a_whole_run_schedule_warms_up_once(inputs, tmp_path):
    """Two steps of two updates, half of them warm-up, then down linearly to 0 at the end.

    Over each step: up from 0 in one update, and down from 1 in one: 0, 1. Over the four: up in two,
    0 and 1/2, and down in two, 1 and 1/2.
    """
    settings = {"learning_rate": 8e-4, "warmup": 0.5, "lr_scheduler_type": "linear"}
    train(inputs, tmp_path / "each", **settings)
    assert learning_rates(tmp_path / "each") == pytest.approx([0, 8e-4, 0, 8e-4])
    train(inputs, tmp_path / "whole", schedule="whole_run", **settings)
    assert learning_rates(tmp_path / "whole") == pytest.approx([0, 4e-4, 8e-4, 4e-4])


@pytest.mark.real
def test_moments_are_those_that_the_step_before_ended_with(inputs, tmp_path, monkeypatch):
    """Adam's moments as they lie in the optimizer: at the end of step 1, before the first update of step 2."""
    create, save, at_start, at_end = PairTrainer.create_optimizer, PairTrainer.save_moments, [], []

    def state(trainer) -> dict:
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        parts = {name: optimizer.state.get(one, {}) for name, one in trainer.model.named_parameters()}
        return {f"{part}/{name}": value.clone() for name, kept in parts.items() for part, value in kept.items()}

    def created(trainer, *args):
        made = create(trainer, *args)
        at_start.append(state(trainer))
        return made

    def saved(trainer, folder):
        at_end.append(state(trainer))
        save(trainer, folder)

    monkeypatch.setattr(PairTrainer, "create_optimizer", created)
    monkeypatch.setattr(PairTrainer, "save_moments", saved)
    train(inputs, tmp_path / "run", optimizer="carry")
    assert (len(at_start), len(at_end), at_start[0]) == (2, 2, {})
    assert {name.split("/")[0] for name in at_end[0]} == {"step", "exp_avg", "exp_avg_sq"}
    assert at_start[1].keys() == at_end[0].keys()
    assert all(torch.equal(at_start[1][name], value) for name, value in at_end[0].items())
    assert {float(value) for name, value in at_end[1].items() if name.startswith("step/")} == {4.0}  # updates in all
    kept = load_file(tmp_path / "run/arms/sdpo/seed_0/step_1/optimizer/moments.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in at_end[0].items())


@pytest.mark.real
def test_steps_with_nothing_reset_between_them_are_one_step(inputs, tmp_path):
    """The reference fixed at S, the schedule over all, moments carried: what is left is plain DPO in this order."""
    unbroken = train(inputs, tmp_path / "one", arms=["dpo_sorted"], warmup=0.5)
    carried = {"schedule": "whole_run", "optimizer": "carry", "warmup": 0.5}
    last = train(inputs, tmp_path / "steps", arms=["sdpo_fixed"], **carried)["model"][-1]
    for way in ({"schedule": "per_step"}, {"optimizer": "reset"}, {}):
        last = train(inputs, tmp_path / "_".join(["steps", *way]), arms=["sdpo_fixed"], **carried | way)["model"][-1]
        both = zip(load_model(unbroken["model"][0])[0].parameters(), load_model(last)[0].parameters(), strict=True)
        apart = max((one - other).abs().max().item() for one, other in both)
        assert (apart > 1e-5) if way else (apart < 1e-7)


@pytest.mark.real
def test_adapters_that_are_kept_are_those_that_were_merged(inputs, tiny_model, tmp_path):
    steps = train(inputs, tmp_path / "run", lora_rank=4, keep_adapters=True)
    ids = torch.arange(40)[None]
    for start, end in zip([tiny_model, steps["model"][0]], steps["model"], strict=True):
        base = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        merged = transformers.AutoModelForCausalLM.from_pretrained(end, dtype=torch.float32)
        with torch.inference_mode():
            without, expected = base(ids).logits, merged(ids).logits
            adapted = PeftModel.from_pretrained(base, Path(end) / "adapter")(ids).logits
        assert (adapted - expected).abs().max() < 1e-5
        assert (without - expected).abs().max() > 1e-4


@pytest.mark.real
def test_what_is_published_is_the_last_model_rounded(inputs, tmp_path):
    last = train(inputs, tmp_path / "run", export_dtype="bfloat16")["model"][-1]
    folder = tmp_path / "run/arms/sdpo/seed_0/published"
    published = transformers.AutoModelForCausalLM.from_pretrained(folder)
    whole = transformers.AutoModelForCausalLM.from_pretrained(last)
    assert (published.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
    for one, rounded in zip(whole.parameters(), published.parameters(), strict=True):
        assert torch.equal(one.bfloat16(), rounded)
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template
    assert (folder / "README.md").read_text() == (Path(last) / "README.md").read_text()


def evaluate_as(folder, value):
    """Write results in which the last model has this H4."""
    key = Run(folder).steps["model_key"][-1]
    row = ("sdpo", 0, 2, key, "h4-lmeval@1", "h4", "mean", value, 1.4, 26073, 26073, "all")
    pl.DataFrame([row], RESULTS, orient="row").write_parquet(folder / "results.parquet")


@pytest.mark.real
def test_only_where_asked_is_anything_uploaded(inputs, tmp_path, monkeypatch, run_command):
    called = []

    class Hub:
        def __getattr__(self, name):
            return lambda *args, **given: called.append((name, args, given))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    last = train(inputs, tmp_path / "run", export_dtype="bfloat16")["model"][-1]
    assert called == []
    for _ in range(2):  # asked for when all was trained and published: it is uploaded, once
        train(inputs, tmp_path / "run", export_dtype="bfloat16", push_to_hub="me/model")
    folder = tmp_path / "run/arms/sdpo/seed_0/published"
    assert called == [
        ("create_repo", ("me/model",), {"private": True, "exist_ok": True}),
        ("upload_folder", (), {"repo_id": "me/model", "folder_path": str(folder)}),
    ]
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {name for name in names if name.endswith((".parquet", ".bin", ".pt"))}
    assert Path(last).exists()
    assert "| h4 |" not in (folder / "README.md").read_text()
    (tmp_path / "run/config.yaml").write_text("train: {push_to_hub: me/model}\n")
    evaluate_as(tmp_path / "run", 41.5)
    for told in (2, 0):  # evaluated since: the cards beside the weights and published say so; that alone is uploaded
        code, out, err = run_command("sdpo_train.card", tmp_path / "run")
        assert (code, out.count("README.md"), out.startswith("up to date: ")) == (0, told, not told), err
    assert "| h4 | mean | 41.50" in (folder / "README.md").read_text() == (Path(last) / "README.md").read_text()
    card = {"repo_id": "me/model", "path_or_fileobj": str(folder / "README.md"), "path_in_repo": "README.md"}
    assert called[2:] == [("upload_file", (), card)]
    train(inputs, tmp_path / "run", export_dtype="bfloat16", push_to_hub="me/model")
    assert len(called) == 3
    evaluate_as(tmp_path / "run", 43.5)  # training's own end does the same
    train(inputs, tmp_path / "run", export_dtype="bfloat16", push_to_hub="me/model")
    assert [name for name, *_ in called[3:]] == ["upload_file"]
    assert "| h4 | mean | 43.50" in (folder / "README.md").read_text() == (Path(last) / "README.md").read_text()
    del called[2:]
    train(inputs, tmp_path / "run", force=True, push_to_hub="me/other")
    assert [given.get("repo_id", args) for _, args, given in called[2:]] == [("me/other",), "me/other"]
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    with pytest.raises(SdpoError, match="push_to_hub 'me/model' names one repository, but several arms or seeds"):
        train(inputs, tmp_path / "two", push_to_hub="me/model", seeds=[0, 1])
    assert len(called) == 4
