"""One step of stepwise DPO with TRL: the only file that imports it.

TRL computes the loss and the updates. Ours are the tokens (those that were scored), the reference
log-probabilities (no second model in memory) and the proof that the hand-off is what was declared.
"""

import functools
import logging
import math
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import polars as pl
import torch
import transformers
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from sdpo_data import workers
from sdpo_data.console import progress
from sdpo_data.encode import encode_pairs
from sdpo_data.models import load_model, model_key, save_model
from sdpo_data.run import write_atomically
from sdpo_data.score import score_encoded
from sdpo_data.scorer import Scorer
from sdpo_data.store import ScoreStore
from sdpo_data.tables import LOGP_MARGIN, METRICS, SCORES, SdpoError
from sdpo_train.forward import WholeUpdates
from sdpo_train.steps import StepWork, TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DTYPE = "float32"  # weights, forward pass and hand-off: updates of 1e-5 vanish in bfloat16
START_GAP = 5e-3  # nats per answer: float32 noise was up to 2e-3 in padded batches of two pairs, 1e-4 one by one


def train_step(work: StepWork, config: TrainConfig) -> dict[str, Any]:
    """Run DPO on one step's pairs and write the model it gives, in float32.

    Args:
        work: pairs in training order, start and reference with the keys their arm declares.

    Returns:
        The step's STEPS row. work.out then holds the model, tokenizer, metrics.parquet (METRICS)
        and reference_scores.parquet (SCORES of the step's pairs under its reference).

    Raises:
        SdpoError: start or reference do not have the declared weights; the policy does not agree
            with the reference before the first update, where start is reference; the first loss
            is not log 2 then; pairs are longer than what was scored; the loss is not finite.

    Source: arXiv 2403.19270, section 3.2, with the loss of arXiv 2305.18290, eq. 7.
    """
    started = time.monotonic()
    _check_key(work, "start", work.start, work.start_key)
    _check_key(work, "reference", work.reference, work.reference_key)
    model, tokenizer = load_model(work.reference, DTYPE)
    encoded = _encode(work, tokenizer, config)
    reference = _reference_scores(work, encoded, model)
    if work.start_key != work.reference_key:
        del model
        model, tokenizer = load_model(work.start, DTYPE)
    with (
        tempfile.TemporaryDirectory() as scratch,
        progress(f"train {work.arm} seed {work.seed} step {work.step}", _updates(work, config), "updates") as advance,
    ):
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # TRL 1.16 on transformers 5.23
        trainer = _trainer(work, config, encoded, reference, model, tokenizer, scratch, _Progress(advance))
        trainer.train()
        trained: Any = trainer.model
        if config.lora_rank:
            trained = trained.merge_and_unload()
    metrics = _metrics(work, trainer.state.log_history)
    losses = metrics.filter(pl.col("name") == "loss").sort("update")["value"]
    _check_losses(work, config, losses)

    def write(folder: Path) -> None:
        folder.mkdir()
        save_model(trained, tokenizer, folder)
        metrics.write_parquet(folder / "metrics.parquet")
        reference.write_parquet(folder / "reference_scores.parquet")

    if workers.is_main():
        write_atomically(work.out, write)
    workers.wait()
    lengths = reference.select(pl.col("prompt_tokens", "chosen_tokens", "rejected_tokens").sum()).row(0)
    return {
        "arm": work.arm,
        "seed": work.seed,
        "step": work.step,
        "start_key": work.start_key,
        "reference_key": work.reference_key,
        "model_key": model_key(work.out),
        "model": str(work.out),
        "pairs": encoded.height,
        "tokens": sum(lengths) * config.epochs,
        "updates": trainer.state.global_step,
        "seconds": time.monotonic() - started,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "max_start_gap": trainer.start_gap,
        "margin_ref_mean": reference.select(LOGP_MARGIN.mean()).item(),
    }


class _PairTrainer(WholeUpdates, DPOTrainer):
    """TRL's trainer on pairs that are tokens already and carry their reference log-probabilities."""

    start_gap: float | None = None

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset


class _Progress(transformers.TrainerCallback):
    def __init__(self, advance: Any):
        self.advance = advance

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.advance(1)


def _trainer(
    work: StepWork,
    config: TrainConfig,
    encoded: pl.DataFrame,
    reference: pl.DataFrame,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    scratch: str,
    callback: transformers.TrainerCallback,
) -> _PairTrainer:
    rows = encoded.join(reference, on="pair_id", maintain_order="left").select(
        "prompt_ids", "chosen_ids", "rejected_ids", ref_chosen_logps="chosen_logp", ref_rejected_logps="rejected_logp"
    )
    args = DPOConfig(
        output_dir=scratch,
        beta=config.beta,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,  # below 1 it is a share
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_pairs,  # of all devices: see WholeUpdates
        train_sampling_strategy="sequential",  # the partition's order is the curriculum
        precompute_ref_log_probs=True,  # they come with the rows: see _precompute_ref_logps
        max_length=None,  # encode_pairs has cut already
        bf16=False,
        activation_checkpointing=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=work.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # else a NaN loss is logged as the last good one
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    adapters = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    transformers.set_seed(work.seed)
    trainer = _PairTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset(rows.to_arrow()),
        processing_class=tokenizer,
        peft_config=adapters if config.lora_rank else None,
        callbacks=[callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    lengths = pl.col("prompt_ids").list.len() + pl.max_horizontal(pl.col("chosen_ids", "rejected_ids").list.len())
    trainer.share_prefixes(encoded.select(lengths.max()).item(), config.token_budget)
    if work.start_key == work.reference_key:
        trainer.check_start = functools.partial(_check_start, trainer, work)
    return trainer


def _encode(work: StepWork, tokenizer: "PreTrainedTokenizerBase", config: TrainConfig) -> pl.DataFrame:
    encoded = encode_pairs(work.pairs, tokenizer, config.max_length, "cut")
    problems = encoded.filter(pl.col("problem").is_not_null())
    if problems.height:
        raise SdpoError(
            f"{problems.height} pair(s) of {work.arm} step {work.step} cannot be trained on, e.g. "
            f"{problems['pair_id'][0]!r}: {problems['problem'][0]}. Set train.max_length to score.max_length."
        )
    return encoded


def _reference_scores(work: StepWork, encoded: pl.DataFrame, model: "PreTrainedModel") -> pl.DataFrame:
    """SCORES of the step's pairs under its reference: those at hand if they are of its weights, else new ones."""
    known = work.scores
    if known is not None:
        known = encoded.select("pair_id").join(known, on="pair_id", maintain_order="left")
        _check_same_tokens(work, encoded, known)
        same_model = known["model_key"].eq_missing(work.reference_key).all()
        if same_model and known["dtype"].eq_missing(DTYPE).all():
            return known.select(list(SCORES))
    store = ScoreStore(None, work.reference_key, DTYPE)
    return score_encoded(encoded, work.pairs, Scorer(model, work.reference_key, store))


def _check_same_tokens(work: StepWork, encoded: pl.DataFrame, known: pl.DataFrame) -> None:
    counts = [pl.col(f"{side}_ids").list.len().cast(pl.Int64).alias(f"{side}_now") for side in ("chosen", "rejected")]
    both = encoded.select("pair_id", *counts).join(known, on="pair_id")
    other = both.filter(
        (pl.col("chosen_now") != pl.col("chosen_tokens")) | (pl.col("rejected_now") != pl.col("rejected_tokens"))
    )
    if other.height:
        row = other.row(0, named=True)
        raise SdpoError(
            f"{other.height} pair(s) of {work.arm} step {work.step} were scored on other tokens than they would be "
            f"trained on, e.g. {row['pair_id']!r}: {row['chosen_tokens']} chosen tokens scored, {row['chosen_now']} "
            "now. Set train.max_length to score.max_length, and use the model that was scored."
        )


def _check_key(work: StepWork, role: str, model: str, declared: str) -> None:
    found = model_key(model)
    if found != declared:
        raise SdpoError(
            f"{work.arm} step {work.step}: its {role} {model} has weights {found}, but the arm declares {declared}. "
            "The folder was changed after it was trained; --force trains its steps again."
        )


def _check_start(trainer: _PairTrainer, work: StepWork, gap: float) -> None:
    """Prove the hand-off in nats: before the first update, policy and reference say the same."""
    trainer.start_gap = gap
    if not gap <= START_GAP:
        raise SdpoError(
            f"{work.arm} step {work.step}: before the first update a log-probability of the policy differs from the "
            f"reference's by {gap:.3g} nats (at most {START_GAP:g} is float32 noise). The reference log-probabilities "
            "are not of the model the step starts from, or not of the same tokens."
        )


def _check_losses(work: StepWork, config: TrainConfig, losses: pl.Series) -> None:
    if not losses.is_finite().all():
        update = losses.is_finite().not_().arg_true()[0] + 1
        raise SdpoError(
            f"{work.arm} step {work.step}: the loss is {losses[update - 1]} at update {update}. "
            f"Lower train.learning_rate (now {config.learning_rate:g}) or raise train.warmup."
        )
    tolerance = config.beta * START_GAP + 1e-5
    if work.start_key == work.reference_key and abs(losses[0] - math.log(2)) > tolerance:
        raise SdpoError(
            f"{work.arm} step {work.step}: the first loss is {losses[0]:.6f}, not log 2 = 0.693147 within "
            f"{tolerance:.2g}. The step does not start at its reference."
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


def _updates(work: StepWork, config: TrainConfig) -> int:
    return math.ceil(work.pairs.height / config.batch_pairs) * config.epochs
