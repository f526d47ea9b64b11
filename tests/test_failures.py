"""Memory, disk and signals: what is said, what is not taken for them, and that the next start goes on."""

import errno
import logging
import os
import signal

import polars as pl
import pytest
import torch
from accelerate import Accelerator

from sdpo_data.run import Run
from sdpo_data.tables import SdpoError
from sdpo_train import dpo, trainer
from sdpo_train.config import ROW_TOKENS, StepConfig
from sdpo_train.dpo import train_step
from sdpo_train.failures import Interrupted, explained, noted_signals
from sdpo_train.work import StepWork
from tests.conftest import ready_to_train
from tests.test_dpo import FAST, work  # noqa: F401 (a fixture)


def said_of(error: Exception, config: StepConfig = FAST, phase="training", longest=None) -> str:
    out = pl.DataFrame()  # nothing is read of what is not named
    step = StepWork("sdpo", 0, 2, out, "s", "k", "s", "k", None, dpo.Path("runs/step_2"))
    with pytest.raises(SdpoError) as caught, explained(step, config, phase, longest):
        raise error
    return str(caught.value)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
)
def test_memory_that_ran_out_is_told(error):
    assert said_of(error).startswith("sdpo step 2: memory ran out in training. Set ")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos"),
    ],
)
def test_a_full_disk_is_told(error):
    assert said_of(error).startswith("sdpo step 2: the disk is full (runs). Free some space")


@pytest.mark.parametrize(
    "text", ["size mismatch", "CUDA error: an illegal memory access was encountered", "expected a memory_format"]
)
def test_a_bug_is_not_explained_away(text):
    step = StepWork("sdpo", 0, 2, pl.DataFrame(), "s", "k", "s", "k", None, dpo.Path("runs/step_2"))
    with pytest.raises(RuntimeError, match=text), explained(step, FAST, "training"):
        raise RuntimeError(text)


def test_advice_starts_from_what_the_device_does(gpu):
    """A GPU takes rows of 8,192 tokens: down to one pair of the longest, 2 x 300, then what costs more."""
    assert ROW_TOKENS["cuda"] == 8192
    assert said_of(MemoryError(), longest=300).removeprefix("sdpo step 2: memory ran out in training. ") == (
        "Set train.token_budget to 600, or train.gradient_checkpointing to true, or train.lora_rank to 16, or "
        "train.max_length to 150 (and score.max_length with it); what was saved is kept."
    )


def test_advice_leaves_out_what_is_set_already():
    """A CPU takes rows of 256 tokens: to set them to 256 would change nothing, and one pair of 300 has more."""
    made = FAST.model_copy(update={"gradient_checkpointing": True, "lora_rank": 8})
    assert "Set train.max_length to 150 (" in said_of(MemoryError(), made, longest=300)
    assert "Set train.token_budget to 100, or train.max_length to 25 (" in said_of(MemoryError(), made, longest=50)
    low = made.model_copy(update={"token_budget": 80})
    assert "Set train.max_length to 25 (" in said_of(MemoryError(), low, longest=50)
    carried = FAST.model_copy(update={"optimizer": "carry"})
    assert "lora_rank" not in said_of(MemoryError(), carried)
    least = made.model_copy(update={"token_budget": 2})
    assert "Take a smaller model" in said_of(MemoryError(), least, longest=1)


def test_advice_for_what_is_no_training():
    text = said_of(MemoryError(), StepConfig(kl_samples=8), "diagnosis")
    assert "Set score.token_budget lower, or train.kl_samples to 4, or train.diagnose to false" in text
    text = said_of(MemoryError(), StepConfig(kl_samples=0, diagnose=False), "scoring")
    assert text.startswith("sdpo step 2: memory ran out in scoring. Set score.token_budget lower; what was")


@pytest.mark.parametrize(
    ("where", "phase"),
    [("_encode", "scoring"), ("_diagnosis", "diagnosis"), ("measure_divergence", "diagnosis"), ("_write", "diagnosis")],
)
def test_every_phase_of_a_step_is_watched(work, monkeypatch, where, phase):  # noqa: F811
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(dpo, where, run_out)
    with pytest.raises(SdpoError, match=f"memory ran out in {phase}"):
        train_step(work(), FAST)
    assert not work().out.exists()


EVERY = FAST.model_copy(update={"batch_pairs": 2, "diagnose": False, "kl_samples": 0, "checkpoint_minutes": 1e-6})
"""Four updates of two pairs, each in one forward pass, and a checkpoint after each."""


@pytest.fixture
def goes_on(work, tmp_path, caplog):  # noqa: F811
    """Check that a step goes on from a checkpoint and ends with the bits of the unbroken one."""

    def goes_on(update: int) -> None:
        caplog.set_level(logging.INFO, "sdpo_train")
        ended = train_step(work(), EVERY)
        assert f"goes on from checkpoint-{update}" in caplog.text
        unbroken = train_step(work(out=tmp_path / "unbroken"), EVERY)
        assert {**ended, "model": "", "seconds": 0} == {**unbroken, "model": "", "seconds": 0}
        both = [pl.read_parquet(folder / "metrics.parquet") for folder in (work().out, tmp_path / "unbroken")]
        told = [one.filter(~pl.col("name").str.starts_with("cost/")).sort(pl.all()) for one in both]
        assert told[0].equals(told[1])

    return goes_on


@pytest.mark.real
def test_a_disk_that_is_full_at_a_checkpoint(work, goes_on, monkeypatch):  # noqa: F811
    """The second checkpoint has its weights, and no room for the optimizer's state."""
    save = torch.save

    def full(content, path, *args, **given):
        if "checkpoint-2" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return save(content, path, *args, **given)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(SdpoError, match=r"sdpo step 1: the disk is full"):
            train_step(work(), EVERY)
    assert not work().out.exists()
    goes_on(1)


@pytest.mark.real
def test_memory_that_runs_out_in_update_2(work, goes_on, monkeypatch):  # noqa: F811
    backward, passes = Accelerator.backward, []

    def run_out(self, loss, **given):
        passes.append(loss)
        if len(passes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return backward(self, loss, **given)

    with monkeypatch.context() as patched:
        patched.setattr(Accelerator, "backward", run_out)
        with pytest.raises(SdpoError, match=r"memory ran out in training\. Set train"):
            train_step(work(), EVERY)
    goes_on(1)


@pytest.mark.real
@pytest.mark.parametrize("update", [2, 4], ids=["inside", "at the last update"])
def test_a_sigterm_in_training(work, goes_on, monkeypatch, update):  # noqa: F811
    """At the last update too: what comes after it may take longer than a cluster waits."""
    end = trainer._Watch.on_step_end

    def told(watch, args, state, control, **given):
        if state.global_step == update:
            os.kill(os.getpid(), signal.SIGTERM)
        end(watch, args, state, control, **given)

    rare = EVERY.model_copy(update={"checkpoint_minutes": 10.0})
    with monkeypatch.context() as patched:
        patched.setattr(trainer._Watch, "on_step_end", told)
        with pytest.raises(Interrupted, match=f"stopped at update {update} of sdpo"):
            train_step(work(), rare)
    assert not work().out.exists()
    goes_on(update)


def test_a_signal_that_nothing_looked_at_is_not_lost():
    def overlook():
        with noted_signals() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked == [signal.SIGTERM]

    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        overlook()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.fixture
def run(pairs, tiny_model, tmp_path) -> Run:
    run = ready_to_train(tmp_path / "run", pairs, tiny_model, parts=2)
    (run.path / "config.yaml").write_text(f"model: {tiny_model}\ntrain: {{learning_rate: 1.0e-3, kl_samples: 2}}\n")
    return run


@pytest.mark.real
@pytest.mark.parametrize("where", ["_reference_scores", "_diagnosis", "measure_divergence"])
def test_a_sigterm_elsewhere_ends_as_in_training(run, run_command, monkeypatch, where):
    """In step 2, while pairs are scored, diagnosed or answered: the sentence and exit code of Ctrl-C."""
    whole = getattr(dpo, where)

    def told(work, *args):  # noqa: F811
        if work.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(work, *args)

    with monkeypatch.context() as patched:
        patched.setattr(dpo, where, told)
        code, _, err = run_command("sdpo_train", run.path)
    assert (code, err.splitlines()[-1]) == (
        130, "interrupted: what is finished is kept; the same command goes on from there."
    )  # fmt: skip
    assert run.steps["step"].to_list() == [1]
    assert run_command("sdpo_train", run.path)[0] == 0
    assert run.steps["step"].to_list() == [1, 2]
