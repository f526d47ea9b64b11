"""One figure per question about the chain of steps: loss, references, held-out pairs, what moved underneath."""

import math

import altair as alt
import polars as pl

from sdpo_eval.canvas import (
    BARS,
    BOUNDS,
    GREY,
    HEIGHT,
    MOST_POINTS,
    WIDTH,
    Figure,
    dash,
    from_base,
    guide,
    held,
    interval,
    lines_by_step,
    marks,
    once,
    panels,
    stroke,
    styled,
    tooltip,
)

LOG_2 = math.log(2)


def plot_reference_margins(references: pl.DataFrame) -> Figure:
    """Draw what the reference thinks of each part: gamma_ref by step.

    Args:
        references: arm, seed, step, reference (which model judges), mean, stderr (nats), n:
            one row per part and model.

    Source: arXiv 2403.19270, Figure 2: mean gamma under the reference. There all models judge
        one set (as in `plot_held_out`); here each judges the pairs of the step it is the reference of.
    """
    table = interval(references, "mean")
    x = alt.X("step:O", title="step", axis=alt.Axis(labelAngle=0, grid=False))
    dodge = alt.XOffset("reference:N", scale=alt.Scale(paddingOuter=1))
    base = alt.Chart().encode(x=x, xOffset=dodge)
    shown = tooltip("arm", "seed", "step", "reference", ("mean", ".2f", "mean margin [nats]"), *BOUNDS, "n")
    y = alt.Y("low:Q", title="mean margin, gamma [nats]")
    bars = base.mark_rule(strokeWidth=1.5).encode(stroke("reference"), y=y, y2="high:Q")
    points = base.mark_point(filled=True, size=80, opacity=1).encode(
        *marks("reference", "judged by"), y="mean:Q", tooltip=shown
    )
    chart = panels([guide(y=alt.datum(0)), bars, points], table, alt.Facet("arm:N", title=None))
    return styled(
        chart,
        "How far each step's reference prefers the chosen answers of the step's pairs",
        f"Gamma, the mean of log p(chosen) − log p(rejected), beside what the base model says. {BARS}",
    )


def plot_held_out(held_out: pl.DataFrame) -> Figure:
    """Draw gamma on the pairs held out, under the base model and after every step: the paper's Figure 2, for this run.

    Args:
        held_out: arm, seed, step, mean, stderr (nats), n; step 0 of arm "base" is the base model.

    Source: arXiv 2403.19270, Figure 2, where the models judge UltraFeedback, and one was trained on it.
    """
    chains = interval(from_base(held_out.select("arm", "seed", "step", "stderr", "n", value="mean")), "value")
    lines = lines_by_step(chains, "mean margin, gamma [nats]", [("n", ",", "pairs")])
    chart = alt.layer(guide(y=alt.datum(0)), *lines, data=held(chains))
    return styled(
        chart.properties(width=WIDTH, height=HEIGHT),
        "How far each model prefers the chosen answers of pairs nobody trained on",
        f"Mean gamma of the same held-out pairs under every model, as in the paper's Figure 2. {BARS}",
    )


def plot_displacement(moved: pl.DataFrame) -> Figure:
    """Draw how far the likelihood of chosen and of rejected answers moved since the base model, on held-out pairs.

    Args:
        moved: arm, seed, step, answer ("chosen" or "rejected"), mean, stderr (nats), n.
    """
    table = interval(moved, "mean").with_columns(unit=pl.format("{}, {}", "arm", "answer"))
    base = alt.Chart().encode(
        x=alt.X("step:O", title="step", axis=alt.Axis(labelAngle=0, grid=False)),
        xOffset=alt.XOffset("answer:N", scale=alt.Scale(paddingOuter=1)),
        detail=["seed:N", "answer:N"],
    )
    y = alt.Y("low:Q", title="change since the base model [nats]")
    shown = tooltip("arm", "seed", "step", "answer", ("mean", "+.2f", "change [nats]"), *BOUNDS, "n")
    layers = [
        guide(y=alt.datum(0)),
        base.mark_rule(strokeWidth=1.5).encode(stroke("answer"), y=y, y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(stroke("answer"), dash("answer"), y="mean:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(*marks("answer"), y="mean:Q", tooltip=shown),
    ]
    return styled(
        panels(layers, table, alt.Facet("arm:N", title=None)),
        "Did the chosen answers become likelier, or only the rejected ones less likely?",
        f"Mean change of log-probabilities on held-out pairs; a falling chosen line is displacement. {BARS}",
    )


def plot_loss(metrics: pl.DataFrame, *, sigmoid: bool = True) -> Figure:
    """Draw the training loss by update, steps one after another, one panel per arm.

    Args:
        metrics: METRICS frame with rows named "loss".
        sigmoid: whether it is the sigmoid loss, which is log 2 where policy and reference agree.
    """
    said = "Where policy and reference agree on every pair the sigmoid loss is log 2 = 0.6931 (dotted)."
    return _training_curves(
        metrics.filter(name="loss"), "DPO loss [nats]" if sigmoid else "loss",
        (LOG_2, "log 2 = 0.6931") if sigmoid else None,
        "Training loss by update; a step that starts from its reference starts at log 2"
        if sigmoid else "Training loss by update",
        said if sigmoid else "Not the sigmoid loss alone: a step need not start at log 2.",
    )  # fmt: skip


def plot_gradient_norms(metrics: pl.DataFrame) -> Figure:
    """Draw the norm of the gradient by update, before it is clipped.

    Args:
        metrics: METRICS frame with rows named "grad_norm".
    """
    return _training_curves(
        metrics.filter(name="grad_norm"), "gradient norm", None,
        "The gradient's norm by update",
        "Before clipping, over all trained weights. A jump that the loss follows asks for a lower learning rate.",
    )  # fmt: skip


def plot_reward_margins(metrics: pl.DataFrame) -> Figure:
    """Draw TRL's implicit reward margin by update, steps one after another, one panel per arm.

    Args:
        metrics: METRICS frame with rows named "rewards/margins": beta times how far the policy
            moved from its reference on the pair, which starts at 0 where a step starts from its reference.
    """
    return _training_curves(
        metrics.filter(name="rewards/margins"), "rewards/margins", (0.0, "0: policy = reference"),
        "How far training separated the answers, beyond the step's reference",
        "TRL's rewards/margins: beta × (margin of the policy − margin of its reference).",
    )  # fmt: skip


def plot_reward_accuracies(metrics: pl.DataFrame) -> Figure:
    """Draw the share of an update's pairs whose reward margin is above 0.

    Args:
        metrics: METRICS frame with rows named "rewards/accuracies".
    """
    return _training_curves(
        metrics.filter(name="rewards/accuracies"), "rewards/accuracies", (0.5, "0.5: a coin"),
        "How many of an update's pairs the policy separates better than its reference",
        "TRL's rewards/accuracies, of one update's pairs. Where a step starts from its reference the first value is of "
        "margins that are 0 up to rounding, and says nothing.",
    )  # fmt: skip


def plot_weights(weights: pl.DataFrame) -> Figure:
    """Draw how much each pair pulled at the end of a step: shares of pairs by their weight in the gradient.

    Args:
        weights: arm, seed, step, weight (a range in words, such as "0.4-0.5"), share (percent of the step's pairs).
    """
    base = alt.Chart().encode(
        x=alt.X(
            "weight:O", title="sigmoid(beta (gamma_ref − gamma)) of a pair", axis=alt.Axis(labelAngle=-45, grid=False)
        ),
        y=alt.Y("share:Q", title="share of pairs [%]"),
        detail=["seed:N"],
    )
    shown = tooltip("arm", "seed", "step", "weight", ("share", ".1f", "share of pairs [%]"))
    layers = [
        base.mark_line(strokeWidth=2).encode(stroke("step"), dash("step")),
        base.mark_point(filled=True, size=60, opacity=1).encode(*marks("step"), tooltip=shown),
    ]
    return styled(
        panels(layers, weights, alt.Facet("arm:N", title=None)),
        "How hard the pairs still pull after each step",
        "A pair's weight in the gradient: 0.5 where policy and reference agree, near 0 where it is learnt.",
    )


def _training_curves(
    metric: pl.DataFrame, y_title: str, start: tuple[float, str] | None, text: str, subtitle: str
) -> Figure:
    """Draw one metric over a run's updates, steps end to end, beside a value to read it by, if there is one."""
    unit = ["arm", "seed", "step"]
    table = metric.sort(*unit, "update").select(*unit, "update", pl.col("value").round(6))
    ends = table.group_by(unit).agg(last=pl.col("update").max()).sort(unit)
    before = ends.with_columns(before=pl.col("last").cum_sum().over("arm", "seed") - pl.col("last")).drop("last")
    table = table.join(before, on=unit, maintain_order="left").with_columns(at=pl.col("update") + pl.col("before"))
    every = math.ceil(table.height / MOST_POINTS)
    table = table.filter(pl.int_range(pl.len()).over(unit) % every == 0)
    base = alt.Chart().encode(
        x=alt.X("at:Q", title="update, counted over the arm's steps", axis=alt.Axis(tickMinStep=1, grid=False)),
        y=alt.Y("value:Q", title=y_title, scale=alt.Scale(zero=False)),
        detail=["seed:N", "step:N"],
        tooltip=tooltip(*unit, "update", ("value", ".4f", y_title)),
    )
    lines = base.mark_line(strokeWidth=2).encode(stroke("step"), dash("step"))
    points = base.mark_point(filled=True, size=32, opacity=1).encode(*marks("step"))
    beside = []
    if start is not None:
        label = once().mark_text(text=start[1], align="right", dx=-3, dy=-6, color=GREY)
        beside = [guide(y=alt.datum(start[0])), label.encode(x=alt.value("width"), y=alt.datum(start[0]))]
    chart = panels([*beside, lines, points], table, alt.Facet("arm:N", title=None))
    thinned = f" One update in {every} is drawn." if every > 1 else ""
    return styled(chart, text, subtitle + thinned)
