"""TRL's DPOTrainer, fed with our tokens and reference log-probabilities: the only file that imports trl and peft.

TRL computes the loss and the updates. What is replaced: its tokenisation (the pairs are token ids, the
very ones that were scored) and its reference pass (the log-probabilities come with the pairs, so no
second model is in memory). What is added: proof before the first update, checkpoints that count only
when whole, a schedule or moments that go on from the step before, and an orderly end on a signal.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
import time
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import polars as pl
import pydantic
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from sdpo_data import workers
from sdpo_data.console import progress
from sdpo_data.tables import METRICS, SdpoError
from sdpo_train import handoff
from sdpo_train.checkpoints import newest, seal
from sdpo_train.config import StepConfig, TrainConfig
from sdpo_train.failures import Interrupted, explained, noted_signals
from sdpo_train.forward import WholeUpdates
from sdpo_train.work import StepWork, count_updates

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MOMENTS = "optimizer"  # folder: beside the weights, a safetensors file would count as some of them
OURS = {  # fields of DPOConfig that a setting of ours decides
    "beta": "beta", "learning_rate": "learning_rate", "lr_scheduler_type": "lr_scheduler_type",
    "warmup_steps": "warmup", "warmup_ratio": "warmup", "num_train_epochs": "epochs", "loss_type": "loss",
    "per_device_train_batch_size": "batch_pairs", "gradient_accumulation_steps": "batch_pairs",
    "max_length": "max_length", "bf16": "dtype", "fp16": "dtype", "seed": "seeds",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing", "push_to_hub": "push_to_hub", "hub_model_id": "push_to_hub",
}  # fmt: skip
NEVER = {  # and fields that would break the chain, the order, or the resume
    "precompute_ref_log_probs": "the reference log-probabilities come with the pairs",
    "precompute_ref_batch_size": "the reference log-probabilities come with the pairs",
    "sync_ref_model": "the reference of a step is frozen",
    "ld_alpha": "the reference log-probabilities are sums over all tokens",
    "train_sampling_strategy": "the partition's order is the curriculum",
    "group_by_length": "the partition's order is the curriculum",
    "dataloader_drop_last": "no pair is dropped silently",
    "max_steps": "a step ends when its pairs have been seen; set train.epochs",
    "auto_find_batch_size": "the plan says what an update is",
    "remove_unused_columns": "the pairs come as token ids",
    "trust_remote_code": "no code of a model is run",
    "model_init_kwargs": "the model is loaded before TRL sees it",
    "output_dir": "the run folder has its place for everything",
    "padding_free": "TRL 1.16 ignores it",
    "use_liger_kernel": "it would replace the forward that reads the log-probabilities",
    "resume_from_checkpoint": "the newest whole checkpoint is found by itself",
    "ignore_data_skip": "a resumed step goes on at its own pair",
    "disable_dropout": "with dropout the policy is not its reference at the start",
}
NEVER_STARTS = ("save_", "eval_", "logging_nan", "logging_st", "fsdp", "hub_", "load_best", "do_")


@dataclasses.dataclass(frozen=True)
class Trained:
    """What the trainer gives back."""

    model: "PreTrainedModel"
    """The policy, float32, adapters merged."""
    metrics: pl.DataFrame
    """METRICS of every update."""
    updates: int
    start_gap: float | None
    """Largest |policy - reference| before the first update, nats."""


def train_pairs(
    work: StepWork,
    config: StepConfig,
    encoded: pl.DataFrame,
    reference: pl.DataFrame,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    scratch: Path,
) -> Trained:
    """Run the updates of one step, from its newest whole checkpoint if there is one.

    Args:
        encoded: ENCODED frame in training order, without problems.
        reference: SCORES of the same pairs under the step's reference.
        model: the policy at its start, float32; changed in place.
        scratch: folder for checkpoints, and for what the step leaves beside its weights; the caller's to remove.

    Raises:
        SdpoError: the start is not the reference; a loss or gradient is not finite; memory or disk ran out.
        Interrupted: a signal asked to stop; a checkpoint was written first.
    """
    key = work.key(config)
    told = {name: getattr(model.config, name, None) for name in ("use_cache", "pad_token_id")}
    found = newest(scratch, key) if workers.is_main() else None
    found = workers.share(found)
    events = work.out.parent / "runs" / work.out.name
    if found is None and workers.is_main():
        shutil.rmtree(events, ignore_errors=True)  # of updates that are made again
    watch = _Watch(work, config, key, scratch, reference)
    watch.facts = found[1] if found else {}
    bar = progress(
        f"train {work.arm} seed {work.seed} step {work.step}", count_updates(encoded.height, config), "updates"
    )
    with bar as advance, explained(work, config, "training", _longest(encoded)), noted_signals() as asked:
        watch.advance, watch.asked = advance, asked
        with _event_files(events):
            watch.trainer = trainer = _trainer(work, config, encoded, reference, model, tokenizer, scratch, watch)
        trainer._total_train_tokens = watch.facts.get("tokens", 0)  # which TRL counts from zero after a resume
        if found:
            log.info("%s step %d goes on from %s", work.arm, work.step, found[0].name)
            advance(int(found[0].name.rsplit("-", 1)[-1]))
        trainer.train(resume_from_checkpoint=str(found[0]) if found else None)
        if watch.stopped:
            raise Interrupted(f"stopped at update {trainer.state.global_step} of {work.arm} step {work.step}")
        if config.optimizer == "carry":  # for the step after
            trainer.save_moments(scratch / MOMENTS)
        trained: Any = trainer.accelerator.unwrap_model(trainer.model)
        if config.keep_adapters and workers.is_main():
            trained.save_pretrained(scratch / "adapter")
        if config.lora_rank:
            trained = trained.merge_and_unload()  # in float32: a bf16 merge loses small updates
    metrics = _metrics(work, trainer.state.log_history)
    handoff.check_losses(work, config, metrics.filter(pl.col("name") == "loss").sort("update")["value"], reference)
    vars(trained).pop("forward", None)  # what TRL put there
    trained.config.update(told)  # as it came: TRL turns the cache off, and a model saved so would write slowly
    return Trained(trained.eval(), metrics, trainer.state.global_step, watch.facts.get("start_gap"))


def check_trl_section(config: TrainConfig) -> None:
    """Check the settings under train.trl against DPOConfig: names, types, and what must not be set there.

    Raises:
        SdpoError: one of them is not a field, has another type, or is decided elsewhere.
    """
    hints = typing.get_type_hints(DPOConfig)
    for name, value in config.trl.items():
        if name in OURS:
            raise SdpoError(f"train.trl.{name} is decided by train.{OURS[name]}: set that instead.")
        if name in NEVER or name.startswith(NEVER_STARTS):
            why = NEVER.get(name, "the run folder decides when and where something is kept")
            raise SdpoError(f"train.trl.{name} cannot be set here: {why}.")
        if name not in hints:
            raise SdpoError(f"train.trl.{name} is not a field of TRL's DPOConfig.")
        try:
            pydantic.TypeAdapter(hints[name]).validate_python(value)
        except pydantic.ValidationError as error:
            raise SdpoError(f"train.trl.{name} is {value!r}: {error.errors()[0]['msg']}.") from None
        except pydantic.PydanticSchemaGenerationError:
            continue  # a type only TRL can judge
    try:
        _arguments(StepConfig(loss=config.loss, trl=config.trl), Path("unused"), 0)
    except (TypeError, ValueError) as error:
        raise SdpoError(f"train.trl is not a DPOConfig: {' '.join(str(error).split())[:300]}") from None


class PairTrainer(WholeUpdates, DPOTrainer):
    """TRL's trainer on pairs that are tokens already and carry their reference log-probabilities."""

    reference_given = False

    def __init__(self, work: StepWork, config: StepConfig, **given: Any):
        self.work, self.config = work, config
        with _no_hash():
            super().__init__(**given)
        if not self.reference_given or self.ref_model is not None:
            raise SdpoError(
                f"{work.arm} step {work.step}: TRL did not take the reference log-probabilities that come with the "
                "pairs, but would use a model of its own. Install the versions in constraints.txt."
            )

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self.reference_given = {"ref_chosen_logps", "ref_rejected_logps"} <= set(dataset.column_names)
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Leave the checkpoints without one: the finished model has its own."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Place this step on a schedule over all updates of the arm, where the settings say so."""
        if self.config.schedule == "per_step" or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        total, before = self.work.updates_in_all or num_training_steps, self.work.updates_before
        whole: Any = super().create_scheduler(total, optimizer)
        factor = whole.lr_lambdas[0]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(whole.optimizer, lambda update: factor(update + before))
        return self.lr_scheduler

    def create_optimizer(self, model: Any = None) -> Any:
        """Start with the moments of the step before, where the settings say so."""
        optimizer = super().create_optimizer(model)
        if self.work.moments is not None:
            kept = load_file(self.work.moments / MOMENTS / "moments.safetensors")
            for name, parameter in self._trained():
                state = {part: kept[f"{part}/{name}"] for part in ("step", "exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {part: value.to(parameter.device) for part, value in state.items()}
        return optimizer

    def save_moments(self, folder: Path) -> None:
        """Write Adam's moments under the parameters' names, in the main process."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        kept = {
            f"{part}/{name}": value.detach().cpu().contiguous().clone()
            for name, parameter in self._trained()
            for part, value in optimizer.state[parameter].items()
        }
        if workers.is_main():
            folder.mkdir(exist_ok=True)
            save_file(kept, folder / "moments.safetensors")

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        model: Any = self.model
        return [(name, one) for name, one in model.named_parameters() if one.requires_grad]


@contextlib.contextmanager
def _event_files(folder: Path) -> Iterator[None]:
    """Have a trainer made now write TensorBoard's files there, not among its checkpoints, which go.

    transformers 5 takes the place from the environment alone; what the user says there goes first.
    """
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        del os.environ[name]


@contextlib.contextmanager
def _no_hash() -> Iterator[None]:
    """Keep TRL from hashing all weights for a cache of reference log-probabilities that is not used here."""
    hash_module = dpo_trainer.hash_module
    dpo_trainer.hash_module = lambda module: ""
    try:
        yield
    finally:
        dpo_trainer.hash_module = hash_module


class _Watch(transformers.TrainerCallback):
    """Looks at every update: proves the start, stops at what is not finite, writes checkpoints, obeys signals."""

    def __init__(self, work: StepWork, config: StepConfig, key: str, scratch: Path, reference: pl.DataFrame):
        self.work, self.config, self.key, self.scratch = work, config, key, scratch
        self.facts: dict[str, Any] = {}
        self.saved = time.monotonic()
        self.advance: Callable[[int], None] = lambda _: None
        self.asked: list[int] = []
        self.stopped = False
        self.reference = reference
        self.trainer: Any = None

    def saw(self, gap: float) -> None:
        """Judge the largest |policy - reference| of the first update, before its optimiser step."""
        self.facts["start_gap"] = handoff.check_start(self.work, self.config, gap, self.reference)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(1)
        config = self.config
        due = time.monotonic() - self.saved > 60 * config.checkpoint_minutes
        stop = workers.share([bool(due), bool(self.asked)])  # one process's clock and signals count for all
        done = state.global_step >= state.max_steps
        self.stopped = stop[1]
        control.should_save = self.stopped or (stop[0] and not done)  # of the last update too: diagnosis may be long
        control.should_training_stop = control.should_training_stop or self.stopped

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        for name in ("loss", "grad_norm"):
            if logs and name in logs:
                handoff.check_finite(self.work, self.config, state.global_step, name, float(logs[name]))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        workers.wait()
        if workers.is_main():
            facts = self.facts | {"tokens": self.trainer._total_train_tokens}
            seal(self.scratch / f"checkpoint-{state.global_step}", self.key, facts)
        self.saved = time.monotonic()


def _trainer(
    work: StepWork,
    config: StepConfig,
    encoded: pl.DataFrame,
    reference: pl.DataFrame,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    scratch: Path,
    watch: _Watch,
) -> PairTrainer:
    rows = encoded.join(reference, on="pair_id", maintain_order="left").select(
        "prompt_ids", "chosen_ids", "rejected_ids", ref_chosen_logps="chosen_logp", ref_rejected_logps="rejected_logp"
    )
    adapters = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha or 2 * config.lora_rank, target_modules="all-linear"
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # TRL 1.16 on transformers 5.23
    transformers.set_seed(work.seed)
    trainer = PairTrainer(
        work,
        config,
        model=model,
        args=_arguments(config, scratch, work.seed),
        train_dataset=datasets.Dataset(rows.to_arrow()),
        processing_class=tokenizer,
        peft_config=adapters if config.lora_rank else None,
        callbacks=[watch],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.share_prefixes(_longest(encoded), config.token_budget)
    trainer.check_start = watch.saw
    return trainer


def _longest(encoded: pl.DataFrame) -> int:
    """Tokens of the longest prompt + answer."""
    answers = pl.max_horizontal(pl.col("chosen_ids", "rejected_ids").list.len())
    return encoded.select((pl.col("prompt_ids").list.len() + answers).max()).item()


def _arguments(config: StepConfig, scratch: Path, seed: int) -> DPOConfig:
    given: dict[str, Any] = {"report_to": "none", "disable_tqdm": True} | config.trl
    return DPOConfig(
        output_dir=str(scratch),
        beta=config.beta,
        loss_type=list(config.loss),
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup,  # below 1 it is a share
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_pairs,  # of all devices: see WholeUpdates
        train_sampling_strategy="sequential",  # the partition's order is the curriculum
        precompute_ref_log_probs=True,  # they come with the rows: see _precompute_ref_logps
        max_length=None,  # encode_pairs has cut already
        bf16=config.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=config.gradient_checkpointing,  # transformers' new name; the old one yields to it
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # else a NaN loss is logged as the last good one
        save_strategy="no",  # _Watch says when
        **given,
    )


def _metrics(work: StepWork, history: list[dict[str, float]]) -> pl.DataFrame:
    rows = [
        (work.arm, work.seed, work.step, entry["step"], name, float(value))
        for entry in history
        if "loss" in entry
        for name, value in entry.items()
        if name not in ("step", "epoch")
    ]
    return pl.DataFrame(rows, METRICS, orient="row")
