"""What the arms of a run are, read off what they did; and the core factorial, order times reference, judged."""

from collections.abc import Callable
from typing import Any

import polars as pl

from sdpo_eval.canvas import minus
from sdpo_eval.contrasts import CONTRASTS, CompareConfig, Side, contrast_models
from sdpo_eval.stats import UNDECIDED

SETTINGS = ("beta", "learning_rate", "epochs", "batch_pairs", "loss", "schedule", "optimizer", "lora_rank")
"""Settings of training that an arm may have of its own: shown where the arms of a run differ in one."""
EFFECTS = {
    "order": {"easy to hard": ("sdpo", "sdpo_fixed"), "random": ("random", "random_fixed")},
    "reference": {"moving": ("sdpo", "random"), "fixed": ("sdpo_fixed", "random_fixed")},
    "interaction": {"both or neither": ("sdpo", "random_fixed"), "one alone": ("sdpo_fixed", "random")},
}
"""Effect of the core factorial -> its two sides, each with the two arms that are averaged; the first minus the second.
So the interaction is half of (sdpo - sdpo_fixed) - (random - random_fixed), on the scale of the main effects."""
CORE = ("sdpo", "sdpo_fixed", "random", "random_fixed")


def find_chains(steps: pl.DataFrame) -> list[tuple[str, int]]:
    """Pick of every arm the seed that got furthest, the lowest of several: arm, seed; sdpo first."""
    ends = steps.group_by("arm", "seed").agg(pl.col("step").max())
    ends = ends.sort("step", "seed", descending=[True, False]).unique("arm", keep="first", maintain_order=True)
    return ends.sort(~pl.col("arm").str.contains("(^|: )sdpo$"), "arm").select("arm", "seed").rows()


def find_place(chain: pl.DataFrame, key: str) -> str | None:
    """Say in words where the weights come from that the steps after the first start from, or are held to.

    Args:
        chain: STEPS of one arm and seed, by step.
        key: start_key or reference_key.

    Returns:
        "the step before" or "S"; "S" too of a single step; None where it is neither, or not the same in all.
    """
    written = dict(chain.select("step", "model_key").rows())
    (_, own, base), *later = chain.select("step", key, base="start_key").rows()
    if own != base:  # a first step starts from S, and is held to it
        return None
    if not later:
        return "S"
    for place, known in (("the step before", lambda step: written.get(step - 1)), ("S", lambda _: base)):
        if all(found == known(step) for step, found, _ in later):
            return place
    return None


def describe_arms(
    steps: pl.DataFrame,
    orders: pl.DataFrame,
    partition: pl.DataFrame,
    recipe: Callable[[str, int, int], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Say what each arm did, and in what it differs from the first one: of the seed that got furthest.

    Nothing is taken from an arm's name: order, start, reference, settings and sizes are those of the tables.

    Args:
        steps: STEPS frame.
        orders: arm and the PARTITION that it trained on; empty where that is not known.
        partition: PARTITION of the run.
        recipe: of arm, seed and step, the settings of training; empty where they are not known.

    Returns:
        A row per arm: arm, order, starts_from, held_to, steps, seeds, pairs, tokens (all epochs), updates, settings in
        which the arms differ, rank_with_difficulty (see `describe_order`), and differs_from_<first>.
    """
    rows: list[dict[str, Any]] = []
    for arm, seed in find_chains(steps):
        chain = steps.filter(arm=arm, seed=seed).sort("step")
        own = orders.filter(arm=arm)
        order = describe_order(own, partition) if own.height and partition.height else {}
        settings = [recipe(arm, seed, step) for step in chain["step"]]
        rows.append(
            {"arm": arm, "order": order.get("order")}
            | {"starts_from": find_place(chain, "start_key"), "held_to": find_place(chain, "reference_key")}
            | {"steps": chain.height, "seeds": steps.filter(arm=arm)["seed"].n_unique()}
            | {name: int(chain[name].sum()) for name in ("pairs", "tokens", "updates")}
            | {name: _values([one.get(name) for one in settings]) for name in SETTINGS}
            | {"rank_with_difficulty": order.get("rank_with_difficulty")}
        )
    for name in ("order", *SETTINGS, "rank_with_difficulty"):
        if len({row[name] for row in rows}) == 1 and (name in SETTINGS or rows[0][name] is None):
            for row in rows:
                del row[name]
    told = [name for name in rows[0] if name not in ("arm", "seeds", "rank_with_difficulty")] if rows else []
    for row in rows[1:]:
        differ = [name.replace("_", " ") for name in told if row[name] != rows[0][name]]
        row[f"differs_from_{rows[0]['arm']}_in"] = ", ".join(differ) or "nothing"
    return rows


def describe_order(own: pl.DataFrame, partition: pl.DataFrame) -> dict[str, Any]:
    """Say which pairs an arm trains on and in which order, beside the partition that it was made from.

    Args:
        own: PARTITION as the arm trains on it.
        partition: PARTITION of the run.

    Returns:
        order, in words; rank_with_difficulty, Spearman's rho of training order and difficulty over all steps: near 0
        the order says nothing of difficulty; None where one of the two does not vary.
    """
    parts = partition.sort("step").unique("pair_id", keep="first").select("pair_id", "difficulty", part="step")
    placed = own.select("pair_id", "step", "rank").join(parts, on="pair_id")
    steps, parted = own["step"].n_unique(), partition["step"].n_unique()
    share = own["pair_id"].n_unique() / parts.height
    if own["pair_id"].n_unique() < own.height:
        order = "growing: each step trains on its part and all before it"
    elif steps == 1 < parted:
        order = "all pairs in one step"
    elif (placed["step"] == placed["part"]).all():
        order = "the parts, easiest first"
    elif _falls(placed):
        order = "the parts, hardest first"
    else:
        same: Any = (placed["step"] == placed["part"]).mean()
        order = f"other parts ({100 * same:.0f} % of pairs as the partition has them)"
    rho = placed.select(pl.corr("rank", "difficulty", method="spearman").fill_nan(None)).item()
    return {"order": f"{order}{f', {100 * share:.0f} % of all' if share < 1 else ''}", "rank_with_difficulty": rho}


def _falls(placed: pl.DataFrame) -> bool:
    """Whether no step has a pair harder than any of the step before: its sizes may be others than the parts'."""
    ends = placed.group_by("step").agg(low=pl.col("difficulty").min(), high=pl.col("difficulty").max()).sort("step")
    return ends.height > 1 and bool((ends["high"][1:] <= ends["low"][:-1]).all())


def say_effects(effects: pl.DataFrame) -> list[str]:
    """Say of each effect how large it is, in points, and its verdict; of several seeds, from where to where.

    Args:
        effects: of `contrast_factorial`, of one task and kind of verdict.
    """
    said = []
    for (effect,), own in effects.group_by("effect_of", maintain_order=True):
        values = own["effect"].to_list()
        if own.height > 1:
            said.append(
                f"{effect} {minus(min(values), '+.1f')} to {minus(max(values), '+.1f')} over {own.height} seeds"
            )
        else:
            verdict = "" if own["verdict"][0] == UNDECIDED else f" ({own['verdict'][0]})"
            said.append(f"{effect} {minus(values[0], '+.1f')}{verdict}")
    return said


def contrast_factorial(answers: pl.DataFrame, config: CompareConfig) -> pl.DataFrame:
    """Judge the core factorial, {easy to hard, random} order x {moving, fixed} reference, over the same questions.

    A side of an effect is the mean of two arms' scores, question by question and seed by seed; the two sides are
    contrasted as any two models are, with both kinds of verdict. The effects, over all tasks, are a family of their
    own: their p-values are adjusted (Holm) among themselves, apart from the contrasts of single arms.

    Args:
        answers: ITEMS frame.

    Returns:
        effect_of ("order", "reference" or "interaction") and CONTRASTS; empty where one of the four arms has no
        answers. A seed counts where all four arms end at the same step.

    Source: effects of a two-level factorial, Box, Hunter and Hunter, Statistics for Experimenters, chapter 5.
    """
    none = CONTRASTS.to_frame().insert_column(0, pl.Series("effect_of", [], pl.String))
    ends = answers.filter(pl.col("arm").is_in(CORE)).group_by("arm", "seed").agg(pl.col("step").max())
    seeds = ends.group_by("seed").agg(pl.len().alias("arms"), pl.col("step").max(), ends=pl.col("step").n_unique())
    seeds = seeds.filter(arms=len(CORE), ends=1).filter(pl.col("step") == pl.col("step").max())
    own = answers.join(seeds.select("seed", "step"), on=["seed", "step"], how="semi")
    pairs, names = [], {}
    for effect, sides in EFFECTS.items():
        both = [_average(own, arms, name) for name, arms in sides.items()]
        if any(side.items.is_empty() for side in both):
            return none
        pairs.append((both[0], both[1]))
        names[next(iter(sides))] = effect
    table = contrast_models(pairs, config)
    first = pl.col("first").str.replace(r" seed \d+$", "")
    return table.select(first.replace_strict(names).alias("effect_of"), *CONTRASTS)


def _average(answers: pl.DataFrame, arms: tuple[str, ...], name: str) -> Side:
    """Make one side of several arms: each question's mean score, where all of them have one of it."""
    own = answers.filter(pl.col("arm").is_in(arms)).sort("arm")
    key = ["seed", "step", "protocol", "task", "item_id"]
    mean = own.group_by(key, maintain_order=True).agg(
        pl.col("model_key").str.join("+"), pl.col("subject", "cluster", "choice_logps").first(), pl.col("score").mean(),
        answered=pl.len(), arm=pl.lit(name),
    )  # fmt: skip
    nothing = pl.lit(None, pl.Float64)  # right or wrong, and a likelihood, is of one model
    items = mean.filter(answered=len(arms)).with_columns(correct=nothing, gold_logp=nothing)
    return Side(name, name, items.select(answers.columns))


def _values(found: list[Any]) -> str | None:
    """Write the values that a setting had in an arm's steps, each once."""
    known = [
        ", ".join(map(str, value)) if isinstance(value, list) else f"{value}" for value in found if value is not None
    ]
    return " then ".join(dict.fromkeys(known)) or None
