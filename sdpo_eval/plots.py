"""One figure per question about scores: frames in, an altair chart out.

plots_pairs.py has the figures of the pairs, plots_chain.py those of the training.

A step keeps its colour (viridis), shape and dash from figure to figure, so none of them needs
colour vision; bars are 95 % intervals wherever a standard error exists.
"""

from collections.abc import Mapping, Sequence

import altair as alt
import polars as pl

from sdpo_eval.arms import say_effects
from sdpo_eval.canvas import (
    BARS,
    BOUNDS,
    DOTS,
    GREY,
    HEIGHT,
    WIDTH,
    Figure,
    drawn_at_random,
    from_base,
    guide,
    held,
    interval,
    lines_by_step,
    main_arm,
    marks,
    minus,
    once,
    panels,
    say_ends,
    stroke,
    styled,
    tooltip,
)
from sdpo_eval.stats import UNDECIDED

ASKED = ("n", ",", "questions")


def plot_h4(results: pl.DataFrame, chance: float | None = None) -> Figure:
    """Draw H4 from the base model through every step, one line per arm and seed.

    Args:
        results: RESULTS of one protocol and subset, with rows of task "h4".
        chance: points that guessing scores.
    """
    chains = _chains(results.filter(pl.col("task") == "h4"))
    guess = [] if chance is None else [_guess(chance)]
    chart = alt.layer(
        *guess, *lines_by_step(chains, "H4, points of 100", ("task", ("n", ",", "questions"))), data=held(chains)
    )
    said = "Mean of the four tasks; the base model is where every arm starts."
    return styled(
        chart.properties(width=WIDTH, height=HEIGHT),
        say_ends(chains, "H4", ".1f"),
        f"{said} {BARS}{' Dotted: what guessing scores.' if guess else ''}",
    )


def plot_tasks(results: pl.DataFrame, chance: Mapping[str, float], names: Mapping[str, str]) -> Figure:
    """Draw each task from the base model through every step, with the score of guessing.

    Args:
        results: RESULTS of one protocol and subset.
        chance: task -> points that guessing scores; a task without one gets no line.
        names: task -> what to call it.
    """
    chains = _chains(results.filter(pl.col("task") != "h4")).with_columns(
        chance=pl.col("task").replace_strict(chance, default=None, return_dtype=pl.Float64),
        task=pl.col("task").replace(names),
    )
    guess = alt.Chart().mark_rule(strokeDash=DOTS, color=GREY).encode(y="mean(chance):Q")
    lines = lines_by_step(chains, "points of 100", ["task", ASKED])
    order = [names.get(task, task) for task in (*names, *results["task"].unique(maintain_order=True))]
    chart = panels([guess, *lines], chains, alt.Facet("task:N", title=None, sort=order)).resolve_scale(y="independent")
    drawn = any(task in chance for task in results["task"])
    subtitle = f"{BARS}{' Dotted: what guessing scores.' if drawn else ''} Each panel has its own scale."
    return styled(chart, _task_changes(chains, order), subtitle)


def plot_contrasts(contrasts: pl.DataFrame, title: str) -> Figure:
    """Draw every difference with its interval, the contrast named beforehand first: which side of 0, and how surely.

    Args:
        contrasts: rows of CONTRASTS of one task, with contrast (its name).
        title: what to call the task.
    """
    table = contrasts.sort(~pl.col("primary"), maintain_order=True).with_columns(
        contrast=pl.when("primary").then(pl.format("{} (primary)", "contrast")).otherwise("contrast")
    )
    decided = table.filter(pl.col("verdict") != UNDECIDED).height
    said = f"{decided or 'None'} of {table.height} differences can be told from 0"
    if table.height == 1:
        said = f"The difference can{'' if decided else 'not'} be told from 0"
    return _differences(table, title, said, "first minus second")


def plot_factorial(effects: pl.DataFrame, title: str) -> Figure:
    """Draw the effects of the core factorial: order, reference, and what they do together beyond that.

    Args:
        effects: rows of `arms.contrast_factorial` of one task and kind of verdict, with contrast (its name).
        title: what to call the task.
    """
    none = (effects["verdict"] == UNDECIDED).all()
    said = f"{', '.join(say_effects(effects))} points{': none can be told from 0' if none else ''}"
    return _differences(effects, title, f"{said[0].upper()}{said[1:]}", "means of two arms each")


def _differences(table: pl.DataFrame, title: str, text: str, of: str) -> Figure:
    """Draw rows of CONTRASTS beneath each other, each with its interval, about a line at 0."""
    y = alt.Y("contrast:N", title=None, sort=table["contrast"].to_list())
    base = alt.Chart().encode(y=y.axis(labelLimit=290, grid=True, ticks=False, domain=False))
    bars = base.mark_rule(strokeWidth=1.5).encode(
        stroke("verdict", table), x=alt.X("low:Q", title=f"difference by {title}, points"), x2="high:Q"
    )
    points = base.mark_point(filled=True, size=75, opacity=1).encode(
        *marks("verdict"), x=alt.X("effect:Q", axis=alt.Axis(grid=False, tickCount=8)),
        tooltip=tooltip("contrast", ("effect", "+.2f", "points"), *BOUNDS, ("p_holm", ".4f", "p, adjusted"),
                        ASKED, ("seeds", "d", "seeds"), "verdict_on", "verdict"),
    )  # fmt: skip
    chart = alt.layer(guide(x=alt.datum(0)), bars, points, data=held(table)).properties(
        width=WIDTH, height=30 + 22 * table.height
    )
    return styled(
        chart,
        text,
        f"{title[0].upper()}{title[1:]}: {of}, verdict on {table['verdict_on'][0]}. {BARS} "
        "Verdicts are adjusted for being several.",
    )


def plot_paper_scale(models: pl.DataFrame) -> Figure:
    """Draw H4 of this run's models among the models of the paper's Table 2.

    Args:
        models: model, of ("this run" or "the paper"), h4, stderr (points; null for the paper's).

    Source: arXiv 2403.19270, Table 2.
    """
    table = interval(models.rename({"h4": "value"}), "value")
    y = alt.Y("model:N", title=None, sort=table.sort("value", descending=True)["model"].to_list())
    base = alt.Chart().encode(y=y.axis(labelLimit=230, grid=True, ticks=False, domain=False))
    bars = base.mark_rule(strokeWidth=1.5).encode(
        stroke("of", table), x=alt.X("low:Q", title="H4, points of 100"), x2="high:Q"
    )
    points = base.mark_point(filled=True, size=75, opacity=1).encode(
        *marks("of"), x=alt.X("value:Q", scale=alt.Scale(zero=False), axis=alt.Axis(grid=False, tickCount=8)),
        tooltip=tooltip("model", "of", ("value", ".2f", "H4"), *BOUNDS),
    )  # fmt: skip
    chart = alt.layer(bars, points, data=held(table)).properties(width=WIDTH, height=17 * table.height)
    own, paper = (models.filter(pl.col("of") == of) for of in ("this run", "the paper"))
    best = own.sort("h4", descending=True).row(0, named=True)
    below = paper.filter(pl.col("h4") < best["h4"]).height
    return styled(
        chart,
        f"This run's best, {best['model']} at {best['h4']:.1f} H4, is above {below or 'none'} of the paper's "
        f"{paper.height} models",
        "Table 2 of arXiv 2403.19270 beside this run. Other sizes and another harness: for scale, not for comparison.",
    )


def plot_items(changes: pl.DataFrame, names: Sequence[str]) -> Figure:
    """Draw how every question's right answer moved between two models; hovering shows the question.

    Args:
        changes: task, item_id, question, outcome (in words), change (nats): a row per question.
        names: the two models, the first minus the second.
    """
    shown, sampled = drawn_at_random(changes, "questions")
    chart = (
        alt.Chart()
        .mark_point()
        .encode(
            *marks("outcome", ""),
            size=alt.Size("turned:O", scale=alt.Scale(range=[26, 90]), legend=None),
            opacity=alt.Opacity("turned:O", scale=alt.Scale(range=[0.5, 1]), legend=None),
            x=alt.X("change:Q", title="change of the right answer's log-probability [nats]"),
            y=alt.Y("task:N", title=None, axis=alt.Axis(grid=False, ticks=False, domain=False)),
            yOffset=alt.YOffset("spread:Q"),
            tooltip=tooltip("task", "question", "outcome", ("change", "+.2f", "change [nats]")),
        )
    )
    turned = pl.col("outcome").str.starts_with("became").cast(pl.Int64)
    spread = shown.with_row_index("row").with_columns(spread=(pl.col("row") * 7 % 11).cast(pl.Int64), turned=turned)
    spread = spread.drop("row").sort("turned", maintain_order=True)  # those that turned lie on top
    drawn = alt.layer(guide(x=alt.datum(0)), chart, data=held(spread.with_columns(pl.col("change").round(4))))
    return styled(
        drawn.properties(width=WIDTH, height=64 * changes["task"].n_unique()),
        f"{changes.filter(pl.col('change') > 0).height:,} of {changes.height:,} right answers became likelier; "
        f"{changes.filter(outcome='became right').height:,} questions became right, "
        f"{changes.filter(outcome='became wrong').height:,} wrong",
        f"{names[0]} against {names[1]}: right of 0 the right answer became likelier. "
        f"One mark per question; hover to read it.{sampled}",
    )


def _task_changes(chains: pl.DataFrame, order: Sequence[str]) -> str:
    """Say how every task moved from the base model to the last step of one arm, in the mean over its seeds."""
    arm = main_arm(chains)
    own = chains.filter(arm=arm)
    ends = (
        own.filter(pl.col("step") == pl.col("step").max().over("seed")).group_by("task").agg(end=pl.col("value").mean())
    )
    base = own.filter(model="base").group_by("task").agg(start=pl.col("value").mean())
    moved = dict(base.join(ends, on="task").select("task", pl.col("end") - pl.col("start")).rows())
    if not moved or own["step"].max() == 0:
        return "Each task, model by model"
    said = ", ".join(f"{task} {minus(moved[task], '+.1f')}" for task in dict.fromkeys(order) if task in moved)
    return f"From the base model to {arm}'s last step: {said} points"


def _guess(chance: float) -> alt.Chart:
    return once().mark_rule(strokeDash=DOTS, color=GREY).encode(y=alt.datum(chance))


def _chains(results: pl.DataFrame) -> pl.DataFrame:
    """Let every arm start from the base model's row, and set the arms a little apart."""
    columns = ["arm", "seed", "step", "task", "value", "stderr", "n"]
    return interval(from_base(results.select(columns)), "value")
