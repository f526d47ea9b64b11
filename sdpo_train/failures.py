"""What stops a step from outside, memory, disk and signals, and how it ends then: with a sentence. No torch.

Nothing here saves anything: checkpoints, the score store and finished steps stand already.
"""

import contextlib
import errno
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

from sdpo_data.passes import is_out_of_memory
from sdpo_data.tables import SdpoError
from sdpo_train import cost
from sdpo_train.config import ROW_TOKENS, StepConfig
from sdpo_train.work import StepWork

log = logging.getLogger(__name__)

Phase = Literal["scoring", "training", "diagnosis"]
FULL = ("no space left", "file too large", "quota exceeded", "pytorchstreamwriter", "enforce fail at inline_container")


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop, and what was at work did; what is finished is kept."""


@contextlib.contextmanager
def explained(work: StepWork, config: StepConfig, phase: Phase, longest: int | None = None) -> Iterator[None]:
    """Turn what the user can mend, memory and disk, into a sentence; the last checkpoint stands.

    Args:
        phase: what is being done; what saves memory differs.
        longest: tokens of the longest prompt + answer; None where it is not known below max_length.
    """
    from safetensors import SafetensorError  # only where there is something to train

    try:
        yield
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        text = str(error).lower()
        if getattr(error, "errno", None) == errno.ENOSPC or any(sign in text for sign in FULL):
            raise SdpoError(
                f"{work.arm} step {work.step}: the disk is full ({work.out.parent}). Free some space, or set "
                "train.keep to last or train.checkpoint_minutes higher; what was saved before is kept."
            ) from error
        if is_out_of_memory(error):
            savings = _savings_of_training(config, longest) if phase == "training" else _savings_of_reading(config)
            remedy = f"Set {', or '.join(savings)}" if savings else "Take a smaller model, or a device with more memory"
            raise SdpoError(
                f"{work.arm} step {work.step}: memory ran out in {phase}. {remedy}; what was saved is kept."
            ) from error
        raise


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """End at once on a cluster's SIGTERM as on Ctrl-C: where there is no update to finish first.

    Raises:
        Interrupted: a SIGTERM came.
    """

    def stop(number: int, _frame: Any) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    with _handled(stop, signal.SIGTERM):
        yield


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM (a cluster's) instead of dying of them; a second SIGINT ends at once.

    Raises:
        Interrupted: at the end, if what was done here did not look at what was collected.
    """
    asked: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if number in asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        log.warning("stopping after this update, with a checkpoint; once more Ctrl-C stops at once")

    with _handled(note, signal.SIGINT, signal.SIGTERM):
        yield asked
    if asked:
        raise Interrupted(f"stopped by {signal.Signals(asked[0]).name}")


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None], *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _savings_of_training(config: StepConfig, longest: int | None) -> list[str]:
    """Name the settings not made yet that save memory, with values to try: those of --plan, the cheapest first."""
    import torch

    device: cost.Device = "cuda" if torch.cuda.is_available() else "cpu"
    unit = cost.Unit(
        row_tokens=config.token_budget or ROW_TOKENS[device],
        longest=longest or config.max_length,
        lora_rank=config.lora_rank,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    changes = [(name, value) for name, value, _ in cost.list_savings(unit)]
    if config.optimizer == "carry":  # whose moments adapters have not
        changes = [(name, value) for name, value in changes if name != "lora_rank"]
    noted = {"max_length": " (and score.max_length with it)"}
    return [f"train.{name} to {value}{noted.get(name, '')}" for name, value in changes]


def _savings_of_reading(config: StepConfig) -> list[str]:
    """Name those of the forward passes before and after the updates."""
    found = ["score.token_budget lower"]
    if config.kl_samples:
        found.append(f"train.kl_samples to {config.kl_samples // 2}")
    if config.diagnose:
        found.append("train.diagnose to false")
    return found
