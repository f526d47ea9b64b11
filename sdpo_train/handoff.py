"""Proof that a step starts from, and refers to, what its arm declares: in weights, in tokens and in nats.

Every way known to hand the wrong reference to DPO ends in one of these checks. `rewards/accuracies`
is no such proof: it counts a strict >, so it is 0 where policy and reference agree to the bit, and
anything up to 0.5 in rounding noise.
"""

import math

import polars as pl

from sdpo_data.models import model_key
from sdpo_data.tables import SdpoError
from sdpo_train.config import StepConfig
from sdpo_train.work import StepWork

START_GAP = 5e-3  # nats per answer, float32: noise was up to 2e-3 in padded batches of two pairs, 1e-4 one by one
TOKEN_GAP = 1e-4  # nats per token, float32: what two ways to compute a long answer may differ by
BF16_GAP = 0.15  # nats per root of an answer's tokens; 0.07 was most over 24 answers of SmolLM2
GROSS = 10  # times as much is no rounding, be it one pair of a million
SIDES = ("chosen", "rejected")


def check_key(work: StepWork, role: str, model: str, declared: str) -> None:
    """Compare the weights that lie in a folder with those that the arm declares.

    Raises:
        SdpoError: they are others; the sentence says so where they are S's once more.
    """
    found = model_key(model)
    if found != declared:
        why = "The folder was changed after it was trained"
        if work.base is not None and found == model_key(work.base):
            why = "Those are S's weights: what was trained is not in them, as where adapters were not merged"
        raise SdpoError(
            f"{work.arm} step {work.step}: its {role} {model} has weights {found}, but the arm declares {declared}. "
            f"{why}; --force trains its steps again."
        )


def check_same_tokens(work: StepWork, encoded: pl.DataFrame, known: pl.DataFrame) -> None:
    """Compare the tokens that are trained on with those that were scored: their number in prompt and answers.

    SCORES do not hold the tokens themselves: other ones of the same number are left to `check_same_scores`.

    Args:
        encoded: ENCODED frame of the step's pairs.
        known: SCORES of the same pairs, in any order.
    """
    parts = ("prompt", *SIDES)
    counts = [pl.col(f"{part}_ids").list.len().cast(pl.Int64).alias(f"{part}_now") for part in parts]
    both = encoded.select("pair_id", *counts).join(known, on="pair_id")
    other = both.filter(pl.any_horizontal(pl.col(f"{part}_now") != pl.col(f"{part}_tokens") for part in parts))
    if other.height:
        row = other.row(0, named=True)
        part = next(part for part in parts if row[f"{part}_now"] != row[f"{part}_tokens"])
        raise SdpoError(
            f"{other.height} pair(s) of {work.arm} step {work.step} were scored on other tokens than they would be "
            f"trained on, e.g. {row['pair_id']!r}: {row[f'{part}_tokens']} {part} tokens scored, {row[f'{part}_now']} "
            "now. Set train.max_length to score.max_length, and use the model that was scored, with its template."
        )


def check_same_scores(work: StepWork, config: StepConfig, reference: pl.DataFrame, known: pl.DataFrame) -> None:
    """Compare what the run's scores say of the reference with what it says of the tokens that are trained on.

    Where the score store has them, they are the same numbers. Computed again in other company they differ by
    rounding, whose tail among many pairs is long: so more than a hundredth of the pairs must be beyond it, or
    one of them by GROSS times.

    Args:
        reference: SCORES of exactly these tokens: found by their ids in the score store, or computed.
        known: SCORES of the run, in any order: of those of these pairs that it has of the same model and dtype.
    """
    gaps = [(pl.col(f"{side}_logp") - pl.col(f"{side}_logp_known")).abs().fill_null(math.inf) for side in SIDES]
    tokens = [pl.col(f"{side}_tokens") for side in SIDES]
    if config.dtype == "float32":
        noise = [pl.max_horizontal(START_GAP, TOKEN_GAP * count) for count in tokens]
    else:
        noise = [BF16_GAP * count.sqrt() for count in tokens]
    beyond = pl.max_horizontal(gap / most for gap, most in zip(gaps, noise, strict=True))
    both = reference.join(known, on="pair_id", suffix="_known").with_columns(gap=pl.max_horizontal(gaps), beyond=beyond)
    other = both.filter(~(pl.col("beyond") <= 1))
    if other.height > both.height / 100 or not (both["beyond"] <= GROSS).all():
        worst = other.sort("gap", descending=True).row(0, named=True)
        raise SdpoError(
            f"{other.height} pair(s) of {work.arm} step {work.step} have other scores than the reference gives the "
            f"tokens that would be trained on, e.g. {worst['pair_id']!r} by {worst['gap']:.3g} nats: they were scored "
            "under other weights, or on other tokens of the same number, as of another chat template. Score again with "
            "--force."
        )


def check_start(work: StepWork, config: StepConfig, gap: float, reference: pl.DataFrame) -> float | None:
    """Prove in nats that policy and reference say the same before the first update.

    Args:
        gap: largest |policy - reference| of an answer of the first update, nats.
        reference: SCORES from which the reference's log-probabilities came.

    Returns:
        The gap; None where the arm's start is not its reference.

    Raises:
        SdpoError: it is more than rounding can be; the sentence says which trap that looks like.
    """
    if work.start_key != work.reference_key:
        return None
    noise = allowed_noise(config, reference)
    if not gap <= noise:
        raise SdpoError(
            f"{work.arm} step {work.step}: before the first update a log-probability of the policy differs from the "
            f"reference's by {gap:.3g} nats (at most {noise:.2g} is {config.dtype} noise). "
            + _which_trap(work, reference)
        )
    return gap


def allowed_noise(config: StepConfig, reference: pl.DataFrame) -> float:
    """Give the most by which rounding moves an answer's log-probability, nats, in the dtype of the forward pass."""
    longest = int(reference.select(pl.max_horizontal("chosen_tokens", "rejected_tokens").max()).item())
    return START_GAP if config.dtype == "float32" else BF16_GAP * longest**0.5


def check_losses(work: StepWork, config: StepConfig, losses: pl.Series, reference: pl.DataFrame) -> None:
    """Check that the first loss is what a zero margin gives, where it must be."""
    start = zero_margin_loss(config)
    if work.start_key != work.reference_key or start is None:
        return
    value, slope = start
    tolerance = 2 * slope * allowed_noise(config, reference) + 1e-5 * max(1.0, abs(value))
    if abs(losses[0] - value) > tolerance:
        raise SdpoError(
            f"{work.arm} step {work.step}: the first loss is {losses[0]:.6f}, not {value:.6f} (zero margin, "
            f"{' + '.join(config.loss)}) within {tolerance:.2g}. The step does not start at its reference."
        )


def check_finite(work: StepWork, config: StepConfig, update: int, name: str, value: float) -> None:
    """Stop at the first update whose loss or gradient is not a number; what was saved before it stands."""
    if not math.isfinite(value):
        raise SdpoError(
            f"{work.arm} step {work.step}: the {name} is {value} at update {update}. "
            f"Lower train.learning_rate (now {config.learning_rate:g}) or raise train.warmup."
        )


def zero_margin_loss(config: StepConfig) -> tuple[float, float] | None:
    """Give the loss where the policy is its reference, and how fast it changes with a log-ratio there.

    Returns:
        (loss, |d loss / d nats|), None where it depends on more than the margin (sft, weighting, an
        auxiliary loss).

    Source: the losses of TRL 1.16's DPOTrainer at log-ratios of 0; sigmoid is eq. 7 of arXiv 2305.18290.
    """
    beta, eps = config.beta, float(config.trl.get("label_smoothing", 0.0))
    log2 = math.log(2)
    known = {
        "sigmoid": (log2, beta / 2),
        "sigmoid_norm": (log2, beta / 2),
        "hinge": (1.0, beta),
        "ipo": (1 / (4 * beta**2), 1 / beta),
        "exo_pair": (-log2 - 0.5 * math.log(eps * (1 - eps)), beta) if 0 < eps < 1 else None,
        "nca_pair": (2 * log2, beta / 2),
        "robust": (log2, beta / 2 / (1 - 2 * eps)) if eps < 0.5 else None,
        "bco_pair": (2 * log2, beta / 2),
        "sppo_hard": (1 / (2 * beta**2), 1 / beta),
        "aot": (log2, beta / 2),
        "aot_unpaired": (log2, beta / 2),
        "apo_zero": (1.0, beta / 4),
        "apo_down": (1.0, beta / 2),
        "discopop": ((log2 + 1) / 2, 2 * beta / float(config.trl.get("discopop_tau", 0.05))),
        "sft": None,
    }
    if config.trl.get("use_weighting") or config.trl.get("router_aux_loss_coef"):
        return None
    weights = config.trl.get("loss_weights") or [1.0] * len(config.loss)
    terms = [(known[name], float(weight)) for name, weight in zip(config.loss, weights, strict=True)]
    if any(term is None for term, weight in terms if weight):
        return None
    return sum(w * t[0] for t, w in terms if t), sum(abs(w) * t[1] for t, w in terms if t)


def _which_trap(work: StepWork, reference: pl.DataFrame) -> str:
    """Say what a false reference looks like: S once more, or log-probabilities of other weights or tokens."""
    if work.scores is not None and work.reference_key != work.scores["model_key"][0]:
        both = reference.join(work.scores, on="pair_id", suffix="_of_s")
        gaps = [(pl.col(f"{side}_logp") - pl.col(f"{side}_logp_of_s")).abs() for side in SIDES]
        if both.height and both.select(pl.max_horizontal(gaps).max()).item() <= START_GAP:
            return (
                "The reference log-probabilities are S's, not those of the step before: the reference was loaded again "
                "by the name in the config, or is the base model with its adapters switched off."
            )
    return (
        "The reference log-probabilities are not of the model the step starts from, or not of the same tokens: they "
        "were kept under other weights, another length or another template. Delete them; they are made anew."
    )
