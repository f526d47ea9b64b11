"""One step of stepwise DPO: reference log-probabilities, training, diagnosis, and the model it hands on."""

import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from sdpo_data import workers
from sdpo_data.encode import encode_pairs
from sdpo_data.models import load_model, model_key, save_model
from sdpo_data.run import write_atomically
from sdpo_data.score import score_encoded
from sdpo_data.scorer import Scorer
from sdpo_data.store import ScoreStore
from sdpo_data.tables import LOGP_MARGIN, METRICS, SCORES, SdpoError
from sdpo_train import handoff
from sdpo_train.config import StepConfig
from sdpo_train.diagnostics import contamination_alarm, diagnose_step, split_held_out
from sdpo_train.divergence import measure_divergence
from sdpo_train.failures import explained
from sdpo_train.trainer import MOMENTS, Trained, train_pairs
from sdpo_train.work import StepWork

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sdpo_train.steps import Inputs

log = logging.getLogger(__name__)

WEIGHTS = "float32"  # updates of 1e-5 vanish in bfloat16, step after step


def train_step(work: StepWork, config: StepConfig) -> dict[str, Any]:
    """Run DPO on one step's pairs and write the model it gives, in float32.

    A step that was interrupted goes on from its newest whole checkpoint, and ends with the weights
    it would have had.

    Args:
        work: pairs in training order, start and reference with the keys their arm declares.
        config: settings of this step, see `config.step_config`.

    Returns:
        The step's STEPS row. work.out then holds the model, tokenizer, metrics.parquet (METRICS),
        reference_scores.parquet and, with train.diagnose, scores.parquet (SCORES of the step's pairs
        under its reference and under the model it gave).

    Raises:
        SdpoError: start or reference do not have the declared weights; the policy does not agree
            with the reference before the first update, where start is reference; the first loss
            is not that of a zero margin then; pairs are longer than what was scored; a loss or
            gradient is not finite; memory or disk ran out.

    Source: arXiv 2403.19270, section 3.2, with the loss of arXiv 2305.18290, eq. 7.
    """
    clock = _Clock()
    with explained(work, config, "scoring"):
        handoff.check_key(work, "start", work.start, work.start_key)
        handoff.check_key(work, "reference", work.reference, work.reference_key)
        model, tokenizer = load_model(work.reference, WEIGHTS)
        encoded = _encode(work.pairs, tokenizer, config)
        scorer = _scorer(work, config, model, work.reference_key)
        reference = _reference_scores(work, config, encoded, scorer)
        start = None
        if work.start_key != work.reference_key:
            del model, scorer
            model, tokenizer = load_model(work.start, WEIGHTS)
            scorer = _scorer(work, config, model, work.start_key)
            start = score_encoded(encoded, work.pairs, scorer) if config.diagnose else None
        held_out = _held_out(work, config, tokenizer)
        before = None if held_out is None else score_encoded(*held_out, scorer)
        del scorer
    clock.lap("reference")
    scratch = work.out.with_name(f"{work.out.name}.unfinished")
    trained = train_pairs(work, config, encoded, reference, model, tokenizer, scratch)
    clock.lap("train")
    key = model_key(trained.model)
    tables = {"metrics": trained.metrics, "reference_scores": reference}
    with explained(work, config, "diagnosis"):
        if config.diagnose:
            scorer = _scorer(work, config, trained.model, key)
            tables["scores"] = score_encoded(encoded, work.pairs, scorer)
            if held_out is not None and before is not None:
                tables["held_out_scores"] = score_encoded(*held_out, scorer)
                if work.step == 1:
                    tables["held_out_base"] = before
            tables["metrics"] = pl.concat([tables["metrics"], _diagnosis(work, config, trained, tables, start, before)])
        if config.kl_samples and workers.is_main():
            divergence = measure_divergence(work, config, encoded, trained.model, tokenizer, trained.updates)
            tables["metrics"] = pl.concat([tables["metrics"], divergence])
        clock.lap("diagnose")
        tables["metrics"] = pl.concat([tables["metrics"], clock.rows(work, trained.updates)])
        if workers.is_main():
            write_atomically(work.out, lambda folder: _write(folder, trained, tokenizer, tables, scratch))
    workers.wait()
    handoff.check_key(work, "result", str(work.out), key)
    losses = trained.metrics.filter(pl.col("name") == "loss").sort("update")["value"]
    lengths = reference.select(pl.col("prompt_tokens", "chosen_tokens", "rejected_tokens").sum()).row(0)
    return {
        "arm": work.arm,
        "seed": work.seed,
        "step": work.step,
        "start_key": work.start_key,
        "reference_key": work.reference_key,
        "model_key": key,
        "model": str(work.out),
        "pairs": encoded.height,
        "tokens": sum(lengths) * config.epochs,
        "updates": trained.updates,
        "seconds": clock.total(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "max_start_gap": trained.start_gap,
        "margin_ref_mean": reference.select(LOGP_MARGIN.mean()).item(),
        "shared_from": None,
    }


def rescore(pairs: pl.DataFrame, name: str, kept: "Inputs | StepWork", config: StepConfig) -> pl.DataFrame:
    """Score pairs with a model that a step gave, as training would see them.

    Args:
        pairs: PAIRS frame.
        name: folder of the model.
        kept: names the score store and its token budget.

    Returns:
        SCORES frame, in the order of the pairs.
    """
    model, tokenizer = load_model(name, WEIGHTS)
    return score_encoded(_encode(pairs, tokenizer, config), pairs, _scorer(kept, config, model, model_key(name)))


def _encode(pairs: pl.DataFrame, tokenizer: "PreTrainedTokenizerBase", config: StepConfig) -> pl.DataFrame:
    encoded = encode_pairs(pairs, tokenizer, config.max_length, "cut")
    problems = encoded.filter(pl.col("problem").is_not_null())
    if problems.height:
        raise SdpoError(
            f"{problems.height} pair(s) cannot be trained on, e.g. {problems['pair_id'][0]!r}: "
            f"{problems['problem'][0]}. Set train.max_length to score.max_length."
        )
    return encoded


def _scorer(kept: "Inputs | StepWork", config: StepConfig, model: "PreTrainedModel", key: str) -> Scorer:
    """Give a scorer that computes as training does: float32 weights, and the forward pass in train.dtype."""
    autocast = None if config.dtype == WEIGHTS else config.dtype
    return Scorer(model, key, ScoreStore(kept.store, key, config.scored_in), kept.token_budget, autocast=autocast)


def _reference_scores(work: StepWork, config: StepConfig, encoded: pl.DataFrame, scorer: Scorer) -> pl.DataFrame:
    """SCORES of the step's pairs under its reference, as the score store has them for exactly these tokens.

    What the run's scores say of the same model must agree, or they are of other tokens.
    """
    known = encoded.select("pair_id").join(SCORES.to_frame() if work.scores is None else work.scores, on="pair_id")
    handoff.check_same_tokens(work, encoded, known)
    reference = score_encoded(encoded, work.pairs, scorer)
    of_reference = known.filter(model_key=work.reference_key)
    handoff.check_same_scores(work, config, reference, of_reference.filter(dtype=scorer.dtype))
    if of_reference.height and scorer.work.computed:
        log.info(
            "%s step %d: %d answers of the reference were not in the score store %s in %s: computed",
            work.arm, work.step, scorer.work.computed, scorer.store.folder, scorer.dtype,
        )  # fmt: skip
    return reference


def _held_out(
    work: StepWork, config: StepConfig, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[pl.DataFrame, pl.DataFrame] | None:
    """Encode the held-out pairs that fit, with their PAIRS; None where there are none to look at."""
    if not config.diagnose or work.held_out is None:
        return None
    encoded = encode_pairs(work.held_out, tokenizer, config.max_length, "cut")
    fit = encoded.filter(pl.col("problem").is_null())
    if fit.height < encoded.height:
        log.info("%d of %d held-out pairs do not fit train.max_length", encoded.height - fit.height, encoded.height)
    return (fit, work.held_out) if fit.height else None


def _diagnosis(
    work: StepWork,
    config: StepConfig,
    trained: Trained,
    tables: dict[str, pl.DataFrame],
    start: pl.DataFrame | None,
    held_out_before: pl.DataFrame | None,
) -> pl.DataFrame:
    """METRICS of what the step did to its pairs and to those held out; an alarm is said, and is a row too."""
    reference, after = tables["reference_scores"], tables.get("held_out_scores")
    base = reference if work.scores is None else reference.select("pair_id").join(work.scores, on="pair_id")
    held_out = None if after is None or held_out_before is None else (held_out_before, after)
    rows = diagnose_step(
        work.arm,
        work.seed,
        work.step,
        trained.updates,
        beta=config.beta,
        base=base,
        before=reference,
        after=tables["scores"],
        start=start,
        definition=work.definition,
        held_out=held_out,
        earlier=_earlier(work, held_out),
    )
    if (alarm := contamination_alarm(reference, base)) is not None:
        log.warning("%s step %d: %s", work.arm, work.step, alarm)
        said = (work.arm, work.seed, work.step, 0, "alarm/contaminated_reference", 1.0)
        rows = pl.concat([rows, pl.DataFrame([said], METRICS, orient="row")])
    return rows


def _earlier(
    work: StepWork, held_out: tuple[pl.DataFrame, pl.DataFrame] | None
) -> dict[int, tuple[pl.DataFrame, pl.DataFrame]]:
    """Held-out pairs of the arm's parts before this one, under the start and the trained model."""
    kept = work.out.parent / "step_1" / "held_out_base.parquet"
    if held_out is None or work.partition is None or work.step == 1 or not kept.exists():
        return {}
    known, base = work.held_out_parts, pl.read_parquet(kept)
    if known is not None and work.parts == "given":
        parts = {int(str(step)): rows for (step,), rows in known.group_by("step")}
    else:
        base = base if known is None else base.join(known, on="pair_id", how="semi")
        parts = split_held_out(base, work.partition, falling=work.parts == "falling") if base.height else {}
    found = {}
    for part, rows in sorted(parts.items()):
        if part < work.step:
            before, after = (frame.join(rows, on="pair_id", how="semi") for frame in held_out)
            if before.height:
                found[part] = (before, after)
    return found


class _Clock:
    """Seconds of a step's phases, and the most memory it had, as METRICS rows named cost/*."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[f"cost/{name}_seconds"], self.last = now - self.last, now

    def total(self) -> float:
        return time.monotonic() - self.started

    def rows(self, work: StepWork, update: int) -> pl.DataFrame:
        values = self.laps | {"cost/peak_memory_mib": peak_memory()}
        rows = [(work.arm, work.seed, work.step, update, name, value) for name, value in values.items()]
        return pl.DataFrame(rows, METRICS, orient="row")


def peak_memory() -> float:
    """Most memory this process had so far, MiB: of the GPU if it has one, else of the host; 0 where unknown."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((float(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM")), 0.0)


def _write(
    folder: Path, trained: Trained, tokenizer: "PreTrainedTokenizerBase", tables: dict[str, pl.DataFrame], scratch: Path
) -> None:
    folder.mkdir()
    save_model(trained.model, tokenizer, folder)
    for name, table in tables.items():
        table.write_parquet(folder / f"{name}.parquet")
    for left in (scratch / MOMENTS, scratch / "adapter"):
        if left.exists():
            shutil.move(left, folder / left.name)
