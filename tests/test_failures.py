"""Memory, disk and signals: what is said, what is not taken for them, and that the next start goes on."""

import errno

import polars as pl
import pytest
import torch

from sdpo_data.tables import SdpoError
from sdpo_train import dpo
from sdpo_train.config import ROW_TOKENS, StepConfig
from sdpo_train.dpo import train_step
from sdpo_train.failures import explained
from sdpo_train.work import StepWork
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
    with pytest.raises(RuntimeError, match=text), explained(step, FAST):
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
