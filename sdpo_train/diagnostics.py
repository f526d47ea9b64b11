"""What a step did to its pairs: METRICS rows from SCORES under S, start, reference and the trained model. No torch.

A mean over pairs carries its standard error, clustered by prompt, as `<name>/stderr`, unless all prompts gave the same
or there is but one: then the spread is unknown. Values before the first update stand at update 0, all others at the
step's last.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import polars as pl

from sdpo_data.difficulty import difficulty_named
from sdpo_data.intervals import clustered_means, effective_size, wilson_interval
from sdpo_data.tables import LOGP_MARGIN, MARGIN_PER_TOKEN, METRICS, PARTITION, SCORES, SdpoError, check

SIDES = ("chosen", "rejected")
BINS = 10  # of the weight histogram, over 0 to 1
TOO_FAR = 0.5
"""Where the alarm rings: median rise of gamma over S, in robust standard deviations of S's gamma.

The paper's warning (arXiv 2403.19270, section 4.3) is of mean gamma on UltraFeedback: S -38.6, M_1 -25.1 nats (not
trained on it), M_2 +84.35 (trained on it). It prints no spread. A rise of 13.5 stays below 0.5 and one of 122.95 above
it for any spread of S from 27 to 246 nats.
"""
TOO_RIGHT = 0.9
"""Where it rings without another S: lower end of the 95 % interval of the share of pairs right by sum and per token.

Even strong references have gamma < 0 on about 45 % of preference pairs (HyPO, arXiv 2602.11902). Both measures are
asked, as one of them alone is high wherever one side of the pairs is the longer one.
"""


def diagnose_step(
    arm: str,
    seed: int,
    step: int,
    update: int,
    *,
    beta: float,
    base: pl.DataFrame,
    before: pl.DataFrame,
    after: pl.DataFrame,
    start: pl.DataFrame | None = None,
    definition: str = "margin_per_token",
    held_out: tuple[pl.DataFrame, pl.DataFrame] | None = None,
    earlier: Mapping[int, tuple[pl.DataFrame, pl.DataFrame]] | None = None,
) -> pl.DataFrame:
    """Measure what one step did, over all its pairs.

    Names, all in nats unless said: `margin_base`, `margin_ref_before`, `margin_ref_after` (mean gamma
    under S, the step's reference and the trained model; the paper's figure 2), `reward_accuracy_*`
    likewise (share of pairs); `step_rewards/*` (TRL's, beta included, but at the end and over all
    pairs, where TRL's own are of one batch during an update); `displacement/*` (change of an answer's
    log-probability, share of chosen answers that lost some); `log_ratio_base/*`, `log_ratio_ref/*`
    (per token; of the pairs' own answers, so no KL divergence: for that see `kl_estimate`);
    `flipped/*` (share and number of pairs whose gamma changed sign); `drift/*` (rank correlation of
    the difficulties); `weight/0.0-0.1` ... (share of pairs by sigma(beta (gamma_ref - gamma_theta)),
    the weight of a pair's gradient in the sigmoid loss); `held_out/*`, `forgetting/part_<t>/*`.

    Args:
        update: the step's last update.
        beta: of the DPO loss.
        base: SCORES of the step's pairs under S.
        before: SCORES of them under the step's reference.
        after: SCORES of them under the trained model.
        start: SCORES of them under the model the step started from; None where that is the
            reference. What changed is told from there.
        definition: the difficulty whose drift is measured; where it ranks no single pairs,
            logp_margin stands for it.
        held_out: SCORES of held-out pairs under the start and under the trained model.
        earlier: part -> the same two of the held-out pairs of that part: see `split_held_out`.

    Returns:
        METRICS frame.

    Raises:
        SdpoError: two frames are not of the same pairs and tokens, a log-probability is not
            finite, or the difficulty cannot be measured under a model.

    Source: gamma and figure 2, arXiv 2403.19270; gradient weight, arXiv 2305.18290 section 4;
        likelihood displacement, arXiv 2410.08847.
    """
    frames = {"base": base, "before": before, "start": before if start is None else start, "after": after}
    wide = _side_by_side(frames)
    first, last = _at_the_start(wide, beta), _at_the_end(wide, beta)
    rows = [(0, *row) for row in _means(first)] + [(update, *row) for row in _means(last)]
    flips = last.select(pl.col("^flipped/.*$").sum().name.suffix("/pairs"))
    rows += [(update, name, float(count)) for name, count in flips.row(0, named=True).items()]
    rows += [(update, *row) for row in _drift(frames["start"], after, base, definition)]
    compared = {"held_out": held_out} if held_out else {}
    compared |= {f"forgetting/part_{part}": both for part, both in sorted((earlier or {}).items())}
    for name, both in compared.items():
        rows += [(0 if "_before" in what else update, f"{name}/{what}", value) for what, value in _change(*both)]
    table = [(arm, seed, step, *row) for row in rows]
    return pl.DataFrame(table, METRICS, orient="row")


def split_held_out(scores: pl.DataFrame, partition: pl.DataFrame, *, falling: bool = False) -> dict[int, pl.DataFrame]:
    """Tell held-out pairs by the part they would have been in.

    Where every source is in one part, that of its source; else the first part with a pair at least as
    hard under S, or the last.

    Args:
        scores: SCORES of held-out pairs under S.
        partition: PARTITION of the pairs, from easy to hard.
        falling: it goes from hard to easy: the first part with a pair at most as hard, or the last.

    Returns:
        Part -> SCORES rows, in their order; parts that none falls into are left out.

    Raises:
        SdpoError: a held-out pair is of a source without a part, or has no such difficulty.
    """
    scores, partition = check(scores, SCORES, "held-out scores"), check(partition, PARTITION, "partition")
    sources = partition.group_by("source").agg(pl.col("step").n_unique().alias("parts"), pl.col("step").first())
    if sources["parts"].max() == 1:
        parts = scores.join(sources, on="source", how="left", maintain_order="left")["step"]
        if parts.null_count():
            alien = scores.filter(parts.is_null())["source"][0]
            raise SdpoError(f"held-out pairs of source {alien!r} have no part: the partition has none of that source.")
    else:
        sign = -1 if falling else 1
        tops = partition.group_by("step").agg((pl.col("difficulty") * sign).max()).sort("step")
        hardness = sign * difficulty_named(partition["definition"][0]).measure(scores)
        places = tops["difficulty"].cum_max().search_sorted(hardness, side="left").clip(upper_bound=tops.height - 1)
        parts = tops["step"].gather(places)
    placed = scores.with_columns(parts.alias("_part"))
    return {int(part): rows.drop("_part") for (part,), rows in sorted(placed.group_by("_part", maintain_order=True))}


def kl_estimate(
    logps_policy: Sequence[float], logps_reference: Sequence[float], prompts: Sequence[str] | None = None
) -> dict[str, float]:
    """Estimate KL(policy || reference) per answer, from answers that the policy itself wrote.

    Only for answers sampled from the policy at temperature 1, without top-k or top-p; the pairs' own
    answers give no KL divergence. Answers cut at a length give that of answers cut there.

    Args:
        logps_policy: log-probability of each whole answer under the policy, nats.
        logps_reference: of the same tokens under the reference, nats.
        prompts: prompt of each answer; answers of one prompt are no independent draws. None where each has its own.

    Returns:
        `k1` (mean log ratio: unbiased, may be negative), `k3` (never negative, less noisy where the two
        models are near; where they differ by several nats an answer it misses up to 1 nat, as no
        sample shows what only the reference writes), each with `/stderr` if there are two prompts
        or more, and `samples`.

    Raises:
        SdpoError: there is no answer, the lists differ in length, or a value is not finite.

    Source: k1 and k3 of J. Schulman, "Approximating KL divergence", 2020.
    """
    prompts = [str(place) for place in range(len(logps_policy))] if prompts is None else prompts
    if not len(logps_policy) == len(logps_reference) == len(prompts) > 0:
        counts = f"{len(logps_policy)} of the policy, {len(logps_reference)} of the reference, {len(prompts)} prompts"
        raise SdpoError(f"A KL divergence needs one log-probability of each model per answer; there are {counts}.")
    ratio = pl.Series(logps_policy, dtype=pl.Float64) - pl.Series(logps_reference, dtype=pl.Float64)
    if not ratio.is_finite().all():
        raise SdpoError(f"Answer {ratio.is_finite().not_().arg_true()[0]} has a log-probability that is not finite.")
    values = pl.DataFrame({"prompt_id": list(prompts), "k1": ratio, "k3": (-ratio).exp() - 1 + ratio})
    return dict(_means(values)) | {"samples": float(values.height)}


def contamination_alarm(reference: pl.DataFrame, base: pl.DataFrame | None = None) -> str | None:
    """Say so where a reference looks as if it had been trained on the very pairs it is to judge.

    Such a reference sets a margin that no policy can learn beyond. Two signs, each by its own
    threshold (see TOO_FAR, TOO_RIGHT): gamma stands far above S's, which needs another S; or it is
    right about nearly every pair, by sum and per token. Strong training on pairs of the same kind
    looks the same, so this is a reason to look, no proof.

    Args:
        reference: SCORES of pairs it should not have seen, under the reference.
        base: SCORES of the same pairs under S; None, or of the same weights, where the reference is S.

    Returns:
        A sentence; None where nothing is out of the ordinary.

    Raises:
        SdpoError: the two frames are not of the same pairs and tokens.

    Source: arXiv 2403.19270, section 4.3. The rule is ours: the paper gives three means.
    """
    right = reference.select("prompt_id", both=(LOGP_MARGIN > 0) & (MARGIN_PER_TOKEN > 0)).with_columns(of=pl.lit(0))
    low, _ = wilson_interval(pl.col("both"), effective_size("both"))
    share, least = clustered_means(right, ["of"]).select("both", low.alias("least")).row(0)
    mean = reference.select(LOGP_MARGIN.mean()).item()
    what = "It looks trained on these pairs or on their like; take a reference that was not"
    if base is not None and reference["model_key"][0] != base["model_key"][0]:
        wide = _side_by_side({"base": base, "ref": reference})
        gamma, rise = _gamma("base"), _gamma("ref") - _gamma("base")
        spread = 1.4826 * (gamma - gamma.median()).abs().median()
        moved, width, was = wide.select(rise.median(), spread.alias("spread"), gamma.mean().alias("was")).row(0)
        if moved > TOO_FAR * width > 0:
            return (
                f"The reference prefers the chosen answers by {mean:+.1f} nats on average over {wide.height} pairs, S "
                f"by {was:+.1f}: a median rise of {moved:.1f}, {moved / width:.2f} times the spread of S's margins "
                f"(the alarm is at {TOO_FAR:g}). {what}."
            )
    if least > TOO_RIGHT:
        return (
            f"The reference is right about {share:.1%} of {reference.height} pairs, by sum and per token (mean margin "
            f"{mean:+.1f} nats); the alarm is where the 95 % interval ends above {TOO_RIGHT:.0%}. {what}."
        )
    return None


def _side_by_side(frames: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Join SCORES of the same pairs under several models: <side>_<model> for every model."""
    frames = {name: check(frame, SCORES, f"scores ({name})") for name, frame in frames.items()}
    one, wide = next(iter(frames)), None
    for name, frame in frames.items():
        logps = [pl.col(f"{side}_logp").alias(f"{side}_{name}") for side in SIDES]
        columns = frame.select("pair_id", *(f"{side}_tokens" for side in SIDES), *logps)
        bad = columns.filter(~pl.all_horizontal(pl.col(pl.Float64).is_finite()))
        if bad.height:
            raise SdpoError(
                f"scores ({name}) of pair_id {bad['pair_id'][0]!r} and {bad.height - 1} more are not finite."
            )
        if wide is None:
            wide = frame.select("pair_id", "prompt_id").join(columns, on="pair_id", maintain_order="left")
            continue
        joined = wide.join(columns, on=["pair_id", "chosen_tokens", "rejected_tokens"], maintain_order="left")
        if not joined.height == wide.height == columns.height:
            raise SdpoError(
                f"scores ({name}) and scores ({one}) share {joined.height} pairs of the same tokens, of "
                f"{columns.height} and {wide.height}. Score the same pairs with the same max_length under both models."
            )
        wide = joined
    assert wide is not None
    if wide.is_empty():
        raise SdpoError("There are no scored pairs to diagnose a step by.")
    return wide


def _gamma(model: str) -> pl.Expr:
    return pl.col(f"chosen_{model}") - pl.col(f"rejected_{model}")


def _at_the_start(wide: pl.DataFrame, beta: float) -> pl.DataFrame:
    weight = _weight(beta, "start")
    return wide.select(
        "prompt_id",
        margin_base=_gamma("base"),
        reward_accuracy_base=_gamma("base") > 0,
        margin_ref_before=_gamma("before"),
        reward_accuracy_before=_gamma("before") > 0,
        **_histogram(weight),
    )


def _at_the_end(wide: pl.DataFrame, beta: float) -> pl.DataFrame:
    rewards = {side: beta * (pl.col(f"{side}_after") - pl.col(f"{side}_before")) for side in SIDES}
    rewards |= {"margins": rewards["chosen"] - rewards["rejected"]}
    moved = {side: pl.col(f"{side}_after") - pl.col(f"{side}_start") for side in SIDES}
    ratios = {
        f"log_ratio_{name}/{side}": (pl.col(f"{side}_after") - pl.col(f"{side}_{model}")) / pl.col(f"{side}_tokens")
        for name, model in (("base", "base"), ("ref", "before"))
        for side in SIDES
    }
    was, is_ = _gamma("start") > 0, _gamma("after") > 0
    return wide.select(
        "prompt_id",
        margin_ref_after=_gamma("after"),
        margin_change=_gamma("after") - _gamma("start"),
        reward_accuracy_after=is_,
        **{f"step_rewards/{name}": value for name, value in rewards.items()},
        **{"step_rewards/accuracies": rewards["margins"] > 0},
        **{f"displacement/{side}": value for side, value in moved.items()},
        **{"displacement/chosen_fell": moved["chosen"] < 0},
        **ratios,
        **{"flipped/to_right": ~was & is_, "flipped/to_wrong": was & ~is_},
        **_histogram(_weight(beta, "after")),
    )


def _weight(beta: float, model: str) -> pl.Expr:
    """sigma(beta (gamma_ref - gamma_model)): exactly 1/2 where the model is the reference."""
    return 1 / (1 + (beta * (_gamma(model) - _gamma("before"))).exp())


def _histogram(weight: pl.Expr) -> dict[str, pl.Expr]:
    """One column per bin, left end included; the last holds 1 too."""
    place = (weight * BINS).floor().clip(upper_bound=BINS - 1)
    return {f"weight/{low / BINS:.1f}-{(low + 1) / BINS:.1f}": place == low for low in range(BINS)}


def _means(values: pl.DataFrame) -> Iterable[tuple[str, float]]:
    """Average every column but prompt_id; each with its standard error, where there is a spread to tell it from."""
    table = clustered_means(values.with_columns(_all=pl.lit(0)), ["_all"]).row(0, named=True)
    for name in values.columns:
        if name != "prompt_id":
            yield name, table[name]
            if table[f"{name}_stderr"]:
                yield f"{name}/stderr", table[f"{name}_stderr"]


def _drift(
    start: pl.DataFrame, after: pl.DataFrame, base: pl.DataFrame, definition: str
) -> Iterable[tuple[str, float]]:
    """Rank correlations of the pairs' difficulties; none where one of the two does not vary."""
    import scipy.stats  # takes a second

    difficulty = difficulty_named(definition)
    difficulty = difficulty if difficulty.single_pairs else difficulty_named("logp_margin")
    kept = [name for name in SCORES if name.startswith(("against_", "rating_"))]  # of the pair, not of the model
    of_pairs = base.select("pair_id", *kept)
    both = [
        difficulty.measure(frame.drop(kept).join(of_pairs, on="pair_id").sort("pair_id")).to_numpy()
        for frame in (start, after)
    ]
    yield "drift/pairs", float(len(both[0]))
    for name, measure in (("kendall_tau", scipy.stats.kendalltau), ("spearman_rho", scipy.stats.spearmanr)):
        if all(len(set(values.tolist())) > 1 for values in both):
            correlation = float(measure(*both).statistic)
            if not math.isnan(correlation):
                yield f"drift/{name}", correlation


def _change(before: pl.DataFrame, after: pl.DataFrame) -> Iterable[tuple[str, float]]:
    """Margin and reward accuracy of the same pairs before and after, and their paired differences."""
    wide = _side_by_side({"before": before, "after": after})
    values = {"margin": _gamma, "reward_accuracy": lambda model: (_gamma(model) > 0).cast(pl.Float64)}
    columns = {f"{name}_{model}": value(model) for name, value in values.items() for model in ("before", "after")}
    columns |= {f"{name}_change": value("after") - value("before") for name, value in values.items()}
    yield from _means(wide.select("prompt_id", **columns))
    yield "pairs", float(wide.height)
