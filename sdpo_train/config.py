"""The settings of training: what all arms share, and what one step of one arm makes of them. No torch."""

from typing import Any, Literal

import pydantic

from sdpo_data.config import Settings
from sdpo_data.tables import SdpoError

Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
NOT_NUMBERS = {  # settings that do not change what one step computes
    "arms", "seeds", "tune", "token_budget", "checkpoint_minutes", "keep", "keep_adapters", "export_dtype",
    "push_to_hub", "diagnose", "kl_samples", "selective_share",  # which pairs are left is told by the pairs
}  # fmt: skip
ROW_TOKENS = {"cpu": 256, "cuda": 8192}  # of a forward pass: dense masks in rows of 512 cost a CPU 15 % more a token
PER_STEP = ("beta", "learning_rate", "warmup", "epochs", "batch_pairs")


class TrainConfig(Settings):
    arms: list[str] = pydantic.Field(["sdpo"], min_length=1)
    """Which arms to run; --plan shows what each changes: sdpo, dpo, random, ... or all."""
    seeds: list[int] = pydantic.Field([0], min_length=1)
    """One run of every arm per seed: order inside the steps, random orders, LoRA initialisation."""
    beta: float | list[float] = 0.1
    """Strength of the pull towards the reference; a list has one for each step. alignment-handbook's Zephyr: 0.01."""
    learning_rate: float | list[float] = 5e-7
    """Peak learning rate; a list has one for each step. LoRA wants about ten times that of a full fine-tune."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float | list[float] = 0.1
    """Share of the updates over which the learning rate rises; a list has one for each step."""
    schedule: Literal["per_step", "whole_run"] = "per_step"
    """A learning-rate schedule anew in every step, or one over all updates of the arm."""
    optimizer: Literal["reset", "carry"] = "reset"
    """Adam's moments anew in every step, or carried from the step before (full fine-tune only)."""
    epochs: int | list[int] = 1
    """Passes over a step's pairs; a list has one for each step."""
    batch_pairs: int | list[int] = 32
    """Pairs per optimiser update, over all devices; a list has one for each step."""
    loss: list[Loss] = pydantic.Field(["sigmoid"], min_length=1)
    """Preference losses by TRL's names; several are added up, with trl.loss_weights."""
    token_budget: int | None = pydantic.Field(None, ge=1)
    """Tokens per forward pass at most, where a pair has no more; None for what suits the device. Lower it where
    memory runs out."""
    lora_rank: int = pydantic.Field(0, ge=0)
    """Rank of LoRA adapters on all linear layers, merged in float32 after every step; 0 trains all weights."""
    lora_alpha: int | None = pydantic.Field(None, ge=1)
    """Scale of the adapters; None is twice the rank."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward pass (autocast). Weights, their updates and what is handed on are float32 always."""
    gradient_checkpointing: bool = False
    """Compute activations again on the way back instead of keeping them: less memory, a third more time."""
    max_length: int = pydantic.Field(1024, ge=2)
    """Longest prompt + answer, tokens; must cut nothing that score.max_length did not cut."""
    selective_share: float = pydantic.Field(0.5, gt=0, lt=1)
    """Share of the pairs, the hardest, that the arm `selective` leaves out."""
    tune: dict[Literal["beta", "learning_rate"], list[float]] = pydantic.Field({})
    """The same grid for every arm, such as {learning_rate: [1e-6, 5e-6]}: each point is an arm of its own."""
    diagnose: bool = True
    """Score a step's pairs again with the model it gave: drift, displacement, forgetting. A forward pass more."""
    kl_samples: int = pydantic.Field(8, ge=0)
    """Prompts per step on which the KL to S and to the reference is estimated from sampled answers; 0 for none."""
    checkpoint_minutes: float = pydantic.Field(10.0, gt=0)
    """Time between two checkpoints inside a step; a kill costs at most so much."""
    keep: Literal["all", "last"] = "all"
    """Keep the weights of every step, or of an arm's last step only (then only that can be evaluated)."""
    keep_adapters: bool = False
    """Leave a step's LoRA adapters beside its merged model, in step_<t>/adapter."""
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Write an arm's last model once more, for publishing, in this dtype: arms/<arm>/seed_<s>/published."""
    push_to_hub: str | None = None
    """Upload the published model of a single arm and seed to this hub repository, with its card."""
    trl: dict[str, Any] = pydantic.Field({})
    """Any other field of TRL's DPOConfig, such as {weight_decay: 0.01, report_to: tensorboard}; checked against it."""

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
    def _go_together(self) -> "TrainConfig":
        if self.optimizer == "carry" and self.lora_rank:
            raise ValueError("optimizer 'carry' needs lora_rank 0: a step's adapters are merged, their moments gone")
        if self.keep_adapters and not self.lora_rank:
            raise ValueError("keep_adapters needs a lora_rank above 0: without one there are no adapters")
        if self.lora_alpha is not None and not self.lora_rank:
            raise ValueError("lora_alpha needs a lora_rank above 0")
        return self


class StepConfig(TrainConfig):
    """The settings of one step of one arm: of every list the step's own value."""

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


def step_config(config: TrainConfig, step: int, steps: int, arm: str) -> StepConfig:
    """Give the settings of one step.

    Raises:
        SdpoError: a list has another length than the arm has steps.
    """
    own = config.model_dump()
    for name in PER_STEP:
        value = own[name]
        if isinstance(value, list):
            if len(value) != steps:
                raise SdpoError(
                    f"train.{name} has {len(value)} values, but arm {arm} has {steps} step(s). Write one for each "
                    "step, or a single value; arms of other lengths can be trained in a call of their own."
                )
            own[name] = value[step - 1]
    return StepConfig(**own)
