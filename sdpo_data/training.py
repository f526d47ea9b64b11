"""The settings of training that every trainer has: sdpo_train adds its own to them, export hands them to others."""

from typing import Any, Literal

import pydantic

from sdpo_data.config import Settings
from sdpo_data.tables import SdpoError

PER_STEP = ("beta", "learning_rate", "warmup", "epochs", "batch_pairs")


class TrainerSettings(Settings):
    """The part of config.yaml's section train that is not ours alone; a list has one value for each step."""

    beta: float | list[float] = 0.1
    """Strength of the pull towards the reference; a list has one for each step. alignment-handbook's Zephyr: 0.01."""
    learning_rate: float | list[float] = 5e-7
    """Peak learning rate; a list has one for each step. LoRA wants about ten times that of a full fine-tune."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float | list[float] = 0.1
    """Share of the updates over which the learning rate rises; a list has one for each step."""
    epochs: int | list[int] = 1
    """Passes over a step's pairs; a list has one for each step."""
    batch_pairs: int | list[int] = 32
    """Pairs per optimiser update, over all devices; a list has one for each step."""
    lora_rank: int = pydantic.Field(0, ge=0)
    """Rank of LoRA adapters on all linear layers, merged in float32 after every step; 0 trains all weights."""
    lora_alpha: int | None = pydantic.Field(None, ge=1)
    """Scale of the adapters; None is twice the rank."""
    max_length: int = pydantic.Field(1024, ge=2)
    """Longest prompt + answer, tokens; must cut nothing that score.max_length did not cut."""

    @pydantic.field_validator(*PER_STEP)
    @classmethod
    def _in_range(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise ValueError("an empty list; write one value, or one for each step")
        for one in values:
            if info.field_name == "warmup" and not 0 <= one < 1:
                raise ValueError(f"{one} is not a share of the updates from 0 to below 1")
            if info.field_name != "warmup" and not one > 0:
                raise ValueError(f"{one} is not above 0")
        return value

    @pydantic.model_validator(mode="after")
    def _alpha_of_adapters(self) -> "TrainerSettings":
        if self.lora_alpha is not None and not self.lora_rank:
            raise ValueError("lora_alpha needs a lora_rank above 0")
        return self


class StepSettings(TrainerSettings):
    """The settings of one step: of every list the step's own value."""

    beta: float = 0.1
    """Strength of the pull towards the reference."""
    learning_rate: float = 5e-7
    """Peak learning rate."""
    warmup: float = 0.1
    """Share of the updates over which the learning rate rises."""
    epochs: int = 1
    """Passes over the step's pairs."""
    batch_pairs: int = 32
    """Pairs per optimiser update, over all devices."""


def at_step(config: TrainerSettings, step: int, steps: int, who: str) -> dict[str, Any]:
    """Give all settings with, of every list that has one value for each step, the step's own.

    Args:
        who: what has so many steps, to be named in an error.

    Raises:
        SdpoError: a list has another length than there are steps.
    """
    own = config.model_dump()
    for name in PER_STEP:
        if isinstance(own[name], list):
            if len(own[name]) != steps:
                raise SdpoError(
                    f"train.{name} has {len(own[name])} values, but {who} has {steps} step(s). Write one for each "
                    "step, or a single value; what has another number of steps can be run in a call of its own."
                )
            own[name] = own[name][step - 1]
    return own
