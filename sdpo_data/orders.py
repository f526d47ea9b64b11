"""Other orders of a finished PARTITION: which pairs fill its steps, and who comes first inside a step.

Every function takes a PARTITION frame and gives a new one, sorted by rank. `difficulty` and
`definition` stay what they were: they tell how hard a pair is, not by what it was placed. The result
depends on the rows and the seed, not on the order of the rows. Single pairs are moved: where whole
prompts or sources had been cut, they may come apart.
"""

import math
from typing import Literal

import numpy as np
import polars as pl

from sdpo_data.tables import MARGIN_PER_TOKEN, PARTITION, TOKEN_DIFFERENCE, SdpoError, check

Order = Literal["easy_to_hard", "hard_to_easy", "random", "stratified", "token_difference"]
Within = Literal["shuffle", "difficulty", "length"]

GROUP = 32  # pairs of like length that stand together in the order "length"
LENGTH = pl.col("prompt_tokens") + pl.max_horizontal("chosen_tokens", "rejected_tokens")


def rearrange(
    partition: pl.DataFrame,
    order: Order,
    *,
    seed: int = 0,
    scores: pl.DataFrame | None = None,
    within: Within = "shuffle",
) -> pl.DataFrame:
    """Fill the steps with other pairs: step t has as many as before, every pair is in one step again.

    easy_to_hard: by rising difficulty; ties by the step they were in, then by pair_id. It changes
        nothing in a partition that rises already.
    hard_to_easy: by falling difficulty; ties by the step they were in, the last first, then by pair_id.
    random: drawn by the seed, each pair with the same chance of each place.
    stratified: drawn by the seed so that every step gets the mix of the whole: of each source,
        and of each range of difficulty within it, step t gets its share n_t / n up to a few pairs
        (at most 2 + 2 T n_t / n of any such range, for T steps).
    token_difference: by rising chosen_tokens - rejected_tokens, ties by pair_id: what cutting by
        length alone would give, rising because a longer chosen answer has the lower summed logp.

    Args:
        partition: PARTITION frame, its steps disjoint.
        order: what fills the steps.
        seed: of random and stratified, and of the order inside the steps.
        scores: SCORES of at least its pairs: needed by token_difference and by within="length".
        within: order inside the steps, see `order_within`.

    Returns:
        PARTITION frame, sorted by rank.

    Raises:
        SdpoError: a pair is in several steps, or scores are needed and missing (or some are).

    Source: random is "sDPO Rand." of arXiv 2403.19270, section 4. Deviation: the paper does not say
        how it was drawn; here single pairs are, and the sizes of the steps stay.
    """
    partition = _disjoint(partition)
    sizes = partition.group_by("step").len().sort("step")
    if order == "stratified":
        placed = partition.sort("source", "difficulty", "pair_id").with_columns(step=_dealt(sizes, seed))
    else:
        if order == "random":
            sorted_ = _drawn(partition, [seed, 2]).sort("_drawn").drop("_drawn")
        elif order == "token_difference":
            sorted_ = _measured(partition, TOKEN_DIFFERENCE, scores, order).sort("_measure", "pair_id")
        else:
            hardest_first = order == "hard_to_easy"
            keys, falling = ["difficulty", "step", "pair_id"], [hardest_first, hardest_first, False]
            sorted_ = partition.sort(keys, descending=falling)
        placed = sorted_.with_columns(step=_repeated(sizes))
    return order_within(placed.select(list(PARTITION)), within, seed=seed, scores=scores)


def order_within(
    partition: pl.DataFrame,
    within: Within,
    *,
    seed: int = 0,
    scores: pl.DataFrame | None = None,
    group: int = GROUP,
) -> pl.DataFrame:
    """Order the pairs inside each step anew; every pair stays in its step.

    shuffle: drawn by the seed.
    difficulty: easiest first, ties by pair_id.
    length: pairs of like length together, so that batches are padded little: the step's pairs are
        sorted by prompt + longer answer, tokens, ties drawn by the seed; cut into groups of
        `group` pairs, the last one shorter; the groups come in an order drawn by the seed.

    Args:
        partition: PARTITION frame; a pair may be in several steps.
        scores: SCORES of at least its pairs: needed by length.
        group: pairs per group; a batch's size or a multiple of it.

    Returns:
        PARTITION frame, sorted by rank.

    Raises:
        SdpoError: length without scores, or a pair has none.
    """
    return ordered_within(check(partition, PARTITION, "partition"), within, seed, scores, group)


def ordered_within(
    partition: pl.DataFrame, within: Within, seed: int, scores: pl.DataFrame | None, group: int = GROUP
) -> pl.DataFrame:
    """Do what `order_within` does, to a frame that was checked already."""
    if within == "difficulty":
        ordered = sort_by_difficulty(partition, "pair_id", "step").sort("step", maintain_order=True)
    elif within == "shuffle":
        place = pl.col("step") * partition.height + pl.col("_drawn")  # one key: half the time that two take
        ordered = _drawn(partition, seed).with_columns(_place=place).sort("_place")
    else:
        drawn = _measured(_drawn(partition, seed), LENGTH, scores, "length").sort("step", "_measure", "_drawn")
        grouped = drawn.with_columns(_group=pl.int_range(pl.len()).over("step") // group)
        first = pl.col("_drawn").min().over("step", "_group")  # a draw of its own for every group
        ordered = grouped.with_columns(_first=first).sort("step", "_first", "_measure", "_drawn")
    return ordered.with_columns(rank=pl.int_range(pl.len(), dtype=pl.Int64)).select(list(PARTITION))


def sort_by_difficulty(frame: pl.DataFrame, *ties: str) -> pl.DataFrame:
    """Sort by difficulty, ties by the columns named: where ties are few, much faster than sorting ids.

    Args:
        frame: any frame with a column difficulty without nulls; `ties` together are a key of it.
    """
    ranked = frame.sort("difficulty")
    hard = ranked["difficulty"]
    tied = ((hard == hard.shift(1)) | (hard == hard.shift(-1))).fill_null(value=False)
    if not tied.any():
        return ranked
    placed = ranked.with_row_index("_at")
    among = placed.filter(tied)
    ordered = among.drop("_at").sort("difficulty", *ties).with_columns(_at=among["_at"])
    return pl.concat([placed.filter(~tied), ordered.select(placed.columns)]).sort("_at").drop("_at")


def accumulate(partition: pl.DataFrame, *, seed: int = 0) -> pl.DataFrame:
    """Let step t train on the pairs of steps 1 to t: a pair of step s is in every step from s on.

    The pairs of a step are shuffled together by the seed, old and new.

    Args:
        partition: PARTITION frame, its steps disjoint.

    Returns:
        PARTITION frame, sorted by rank; a pair_id repeats across steps, never within one.

    Raises:
        SdpoError: a pair is in several steps already.

    Source: cumulative curricula, as in Bengio et al., ICML 2009, section 4.
    """
    partition = _disjoint(partition)
    steps = partition["step"].unique().sort().to_list()
    upto = [partition.filter(pl.col("step") <= step).with_columns(step=pl.lit(step, pl.Int64)) for step in steps]
    return order_within(pl.concat([partition.clear(), *upto]), "shuffle", seed=seed)


def merge_steps(partition: pl.DataFrame, *, seed: int = 0) -> pl.DataFrame:
    """Put all pairs into step 1, each once, in one shuffle drawn by the seed: plain DPO.

    Args:
        partition: PARTITION frame; a pair may be in several steps.

    Returns:
        PARTITION frame, sorted by rank.
    """
    merged = check(partition, PARTITION, "partition").with_columns(step=pl.lit(1, pl.Int64), rank=pl.lit(0, pl.Int64))
    return order_within(merged.unique("pair_id", keep="any"), "shuffle", seed=seed)


def drop_hardest(partition: pl.DataFrame, share: float, *, seed: int = 0) -> pl.DataFrame:
    """Leave the hardest floor(share * n) of n pairs out; of equally hard ones those with the last pair_id.

    What is left keeps its order (by step, in it by difficulty, then pair_id) and is cut into as many
    steps anew, their sizes in the old proportions: the pair in place r of m, from 0, goes to the step
    that had place floor(r * n / m) of n. Inside the steps it is shuffled by the seed. So for another
    order of what is left, drop first and `rearrange` then.

    Args:
        partition: PARTITION frame, its steps disjoint.
        share: of all pairs, at least 0 and below 1.

    Returns:
        PARTITION frame, sorted by rank; what is not in it was dropped.

    Raises:
        SdpoError: share is outside, a pair is in several steps, or a step would be empty.

    Source: Selective DPO, arXiv 2502.09650 (share 0.5). Deviation: theirs is the validation loss of
        models trained on other halves of the data, this any definition of difficulty.
    """
    return _drop_extreme(partition, share, seed, hardest=True)


def drop_easiest(partition: pl.DataFrame, share: float, *, seed: int = 0) -> pl.DataFrame:
    """Leave the easiest floor(share * n) of n pairs out, of equals those with the first pair_id; see `drop_hardest`."""
    return _drop_extreme(partition, share, seed, hardest=False)


def drop_suspect(partition: pl.DataFrame, scores: pl.DataFrame, below: float, *, seed: int = 0) -> pl.DataFrame:
    """Leave pairs out whose margin per token is under `below`: the model is so sure of the rejected answer that
    the label may be wrong.

    What is left is cut anew as by `drop_hardest`.

    Args:
        partition: PARTITION frame, its steps disjoint.
        scores: SCORES of at least its pairs.
        below: nats per token, such as -1; a pair at exactly `below` stays.

    Returns:
        PARTITION frame, sorted by rank; what is not in it was dropped.

    Raises:
        SdpoError: a pair has no scores or is in several steps, or a step would be empty.
    """
    partition = _disjoint(partition)
    measured = _measured(partition, MARGIN_PER_TOKEN, scores, "drop_suspect")
    return _refilled(partition, measured.filter(pl.col("_measure") >= below).drop("_measure"), seed)


def _drop_extreme(partition: pl.DataFrame, share: float, seed: int, *, hardest: bool) -> pl.DataFrame:
    if not 0 <= share < 1:
        raise SdpoError(f"The share of pairs to drop is {share}. Give one of at least 0 and below 1.")
    partition = _disjoint(partition)
    left = partition.height - math.floor(share * partition.height + 1e-9)
    ranked = partition.sort("difficulty", "pair_id")
    return _refilled(partition, ranked.head(left) if hardest else ranked.tail(left), seed)


def _refilled(partition: pl.DataFrame, kept: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Cut what is kept into the steps of the partition, in the old proportions."""
    before, after = partition["step"].sort(), kept.sort("step", "difficulty", "pair_id")
    places = pl.int_range(after.height, eager=True) * before.len() // max(after.height, 1)
    placed = after.with_columns(step=before.gather(places))
    if empty := sorted(set(before.unique()) - set(placed["step"].unique())):
        raise SdpoError(
            f"Of {before.len()} pairs {after.height} are left, and step {empty[0]} would have none. Drop fewer pairs."
        )
    return order_within(placed, "shuffle", seed=seed)


def _disjoint(partition: pl.DataFrame) -> pl.DataFrame:
    partition = check(partition, PARTITION, "partition")
    repeated = partition.filter(pl.col("pair_id").is_duplicated())["pair_id"].unique().sort()
    if repeated.len():
        raise SdpoError(
            f"partition has {repeated.len()} pair(s) in several steps, e.g. {repeated[0]!r}. "
            "Rearrange and drop before steps are accumulated."
        )
    return partition


def _measured(partition: pl.DataFrame, by: pl.Expr, scores: pl.DataFrame | None, what: str) -> pl.DataFrame:
    """Put a number of SCORES beside every row, as `_measure`."""
    if scores is None:
        raise SdpoError(f"{what!r} looks at the tokens of the answers: give the scores.")
    joined = partition.join(scores.select("pair_id", _measure=by), on="pair_id", how="left")
    without = joined.filter(pl.col("_measure").is_null())["pair_id"]
    if without.len():
        raise SdpoError(
            f"{without.len()} pair(s) of the partition have no scores, e.g. {without.min()!r}. "
            "Give the scores it was made from."
        )
    return joined


def _drawn(partition: pl.DataFrame, seed: int | list[int]) -> pl.DataFrame:
    """Put a draw without ties beside every row, as `_drawn`; it depends on the rows, not on their order."""
    drawn = np.random.default_rng(seed).permutation(partition.height)
    return sort_by_difficulty(partition, "pair_id", "step").with_columns(_drawn=drawn)


def _repeated(sizes: pl.DataFrame) -> pl.Series:
    """Give each step as often as it has pairs, the first step first."""
    return sizes.select(pl.col("step").repeat_by("len").explode()).to_series()


def _dealt(sizes: pl.DataFrame, seed: int) -> pl.Series:
    """Deal places in a list to steps so that every stretch of it has each step about n_t / n of the time.

    Step t draws one point in each of its n_t equal stretches of [0, 1); the places get the steps
    in the order of all points.
    """
    draw = np.random.default_rng([seed, 3])
    points = [(np.arange(count) + draw.random(count)) / count for count in sizes["len"]]
    return _repeated(sizes).gather(np.argsort(np.concatenate(points), kind="stable"))
