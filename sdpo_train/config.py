"""The settings of training: what all arms share, and what one step of one arm makes of them. No torch."""

from typing import Any, Literal

import pydantic

from sdpo_data.training import StepSettings, TrainerSettings, at_step

Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
NOT_NUMBERS = {  # settings that do not change what one step computes
    "arms", "seeds", "tune", "token_budget", "checkpoint_minutes", "keep", "keep_adapters", "export_dtype",
    "push_to_hub", "diagnose", "kl_samples", "selective_share",  # which pairs are left is told by the pairs
}  # fmt: skip
NOT_NUMBERS_OF_TRL = {  # and fields of DPOConfig: where what is told goes, and how much of it
    "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node",
}  # fmt: skip
ADAMS = (
    "adamw_torch_fused",
    "adamw_torch",
)  # those of TRL's optimizers whose moments can be carried on: see `optimizer`
ROW_TOKENS = {"cpu": 256, "cuda": 8192}  # of a forward pass: dense masks in rows of 512 cost a CPU 15 % more a token


class TrainConfig(TrainerSettings):
    arms: list[str] = pydantic.Field(["sdpo"], min_length=1)
    """Which arms to run: sdpo, dpo, random, ..., core (order x reference) or all; --plan shows what each changes."""
    seeds: list[int] = pydantic.Field([0], min_length=1)
    """One run of every arm per seed: order inside the steps, random orders, LoRA initialisation."""
    schedule: Literal["per_step", "whole_run"] = "per_step"
    """A learning-rate schedule anew in every step, or one over all updates of the arm."""
    optimizer: Literal["reset", "carry"] = "reset"
    """Adam's moments anew in every step, or carried from the step before (full fine-tune only)."""
    loss: list[Loss] = pydantic.Field(["sigmoid"], min_length=1)
    """Preference losses by TRL's names; several are added up, with trl.loss_weights."""
    token_budget: int | None = pydantic.Field(None, ge=1)
    """Tokens per forward pass at most, where a pair has no more; None for what suits the device. Lower it where
    memory runs out."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward pass (autocast). Weights, their updates and what is handed on are float32 always."""
    gradient_checkpointing: bool = False
    """Compute activations again on the way back instead of keeping them: less memory, a third more time."""
    selective_share: float = pydantic.Field(0.5, gt=0, lt=1)
    """Share of the pairs, the hardest, that the arm `selective` leaves out."""
    tune: dict[Literal["beta", "learning_rate"], list[float]] = pydantic.Field({})
    """The same grid for every arm, such as {learning_rate: [1e-6, 5e-6]}: each point is an arm of its own."""
    diagnose: bool = True
    """Score a step's pairs again with the model it gave: drift, displacement, forgetting (of held-out pairs of earlier
    parts; not in arms of random or stratified steps, where no pair is of an earlier one). A forward pass more."""
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
    """Any other field of TRL's DPOConfig, such as {weight_decay: 0.01, report_to: tensorboard}; checked against it.
    TensorBoard's files go to arms/<arm>/seed_<s>/runs/step_<t>."""

    @pydantic.model_validator(mode="after")
    def _go_together(self) -> "TrainConfig":
        if self.optimizer == "carry" and self.lora_rank:
            raise ValueError("optimizer 'carry' needs lora_rank 0: a step's adapters are merged, their moments gone")
        if self.optimizer == "carry" and self.trl.get("optim", ADAMS[0]) not in ADAMS:
            raise ValueError(
                f"optimizer 'carry' hands on Adam's moments, but trl.optim is {self.trl['optim']!r}; take one of "
                f"{', '.join(ADAMS)}, or optimizer 'reset'"
            )
        if self.keep_adapters and not self.lora_rank:
            raise ValueError("keep_adapters needs a lora_rank above 0: without one there are no adapters")
        return self


class StepConfig(StepSettings, TrainConfig):
    """The settings of one step of one arm."""

    @property
    def scored_in(self) -> str:
        """What SCORES call the dtype that training computes in: float32 weights always, the forward pass in `dtype`."""
        return self.dtype if self.dtype == "float32" else f"{self.dtype}_autocast"


def step_config(config: TrainConfig, step: int, steps: int, arm: str) -> StepConfig:
    """Give the settings of one step: see `at_step`."""
    return StepConfig(**at_step(config, step, steps, f"arm {arm}"))
