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

LOG_2 = math.log(2)
LIGHT = 0.3  # weight of a pair in the gradient that a title counts as small


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
    bars = base.mark_rule(strokeWidth=1.5).encode(stroke("reference", table), y=y, y2="high:Q")
    points = base.mark_point(filled=True, size=80, opacity=1).encode(
        *marks("reference", "judged by"), y="mean:Q", tooltip=shown
    )
    chart = panels([guide(y=alt.datum(0)), bars, points], table, alt.Facet("arm:N", title=None))
    return styled(
        chart,
        _say_references(references),
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
        say_ends(chains, "Mean gamma on pairs nobody trained on", "+.1f"),
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
        _say_displacement(moved),
        f"Mean change of log-probabilities on held-out pairs; a falling chosen line is displacement. {BARS}",
    )


def plot_loss(metrics: pl.DataFrame, *, sigmoid: bool = True) -> Figure:
    """Draw the training loss by update, steps one after another, one panel per arm.

    Args:
        metrics: METRICS frame with rows named "loss".
        sigmoid: whether it is the sigmoid loss, which is log 2 where policy and reference agree.
    """
    said = (
        "A step that starts from its reference starts at log 2 = 0.6931 (dotted): the sigmoid loss where both agree on "
        "every pair."
    )
    return _training_curves(
        metrics.filter(name="loss"), "DPO loss [nats]" if sigmoid else "loss",
        (LOG_2, "log 2 = 0.6931") if sigmoid else None,
        _say_curve(metrics.filter(name="loss"), "Loss", ".3f"),
        said if sigmoid else "Not the sigmoid loss alone: a step need not start at log 2.",
    )  # fmt: skip


def plot_gradient_norms(metrics: pl.DataFrame) -> Figure:
    """Draw the norm of the gradient by update, before it is clipped.

    Args:
        metrics: METRICS frame with rows named "grad_norm".
    """
    top = metrics.filter(name="grad_norm").sort("value", descending=True).row(0, named=True)
    where = f"update {top['update']} of {top['arm']} step {top['step']}"
    return _training_curves(
        metrics.filter(name="grad_norm"), "gradient norm", None,
        f"The largest gradient norm is {top['value']:.3g}, at {where}",
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
        _say_curve(metrics.filter(name="rewards/margins"), "Reward margins", ".2f"),
        "How far training separated the answers beyond the step's reference. TRL's rewards/margins: "
        "beta × (margin of the policy − margin of its reference).",
    )  # fmt: skip


def plot_reward_accuracies(metrics: pl.DataFrame) -> Figure:
    """Draw the share of an update's pairs whose reward margin is above 0.

    Args:
        metrics: METRICS frame with rows named "rewards/accuracies".
    """
    return _training_curves(
        metrics.filter(name="rewards/accuracies"), "rewards/accuracies", (0.5, "0.5: a coin"),
        _say_curve(metrics.filter(name="rewards/accuracies"), "Reward accuracies", ".2f"),
        "Share of an update's pairs with a reward margin above 0. Where a step starts from its reference, margins are "
        "0 up to rounding at first.",
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
        _say_weights(weights),
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


def _say_curve(metric: pl.DataFrame, what: str, format_: str) -> str:
    """Say of each arm's last step at which value its first and its last update stand, in the mean over seeds."""
    if metric.is_empty():
        return f"{what}: no update was logged"
    last = metric.filter(pl.col("step") == pl.col("step").max().over("arm", "seed")).sort("update")
    ends = last.group_by("arm", "seed").agg(
        pl.col("value").first().alias("first"), pl.col("value").last().alias("last")
    )
    means = ends.group_by("arm").agg(pl.col("first", "last").mean())
    ordered = means.sort(pl.col("arm") != main_arm(means), "arm").rows()
    said = ", ".join(f"{minus(first, format_)} to {minus(end, format_)} ({arm})" for arm, first, end in ordered[:3])
    others = f", {len(ordered) - 3} more arms below" if ordered[3:] else ""
    return f"{what} over the last step: {said}{others}"


def _say_references(references: pl.DataFrame) -> str:
    """Say what the base model and its own reference think of the last step's pairs, of one arm."""
    own = references.filter(pl.col("arm") == main_arm(references))
    last = own.filter(pl.col("step") == pl.col("step").max())
    means = dict(last.group_by("reference").agg(pl.col("mean").mean()).rows())
    said = ", ".join(
        f"{minus(value, '+.1f')} nats by its {name}" for name, value in sorted(means.items(), reverse=True)
    )
    said = said.replace("its base model", "the base model")
    return f"Mean gamma of the pairs of {own['arm'][0]} step {last['step'][0]}: {said}"


def _say_displacement(moved: pl.DataFrame) -> str:
    """Say how far both answers moved by one arm's last step, in the mean over seeds."""
    own = moved.filter(pl.col("arm") == main_arm(moved))
    last = own.filter(pl.col("step") == pl.col("step").max())
    means = dict(last.group_by("answer").agg(pl.col("mean").mean()).rows())
    said = ", ".join(f"{answer} answers {minus(value, '+.1f')} nats" for answer, value in sorted(means.items()))
    return f"By {own['arm'][0]} step {last['step'][0]} since the base model: {said}"


def _say_weights(weights: pl.DataFrame) -> str:
    """Say how many pairs of one arm's last step weigh little: below 0.3, where each began at 0.5."""
    own = weights.filter(pl.col("arm") == main_arm(weights))
    last = own.filter(pl.col("step") == pl.col("step").max())
    light = pl.col("weight").str.extract(r"-([\d.]+)$").cast(pl.Float64) <= LIGHT
    share = last.group_by("seed").agg(pl.col("share").filter(light).sum())["share"].mean()
    return f"After {own['arm'][0]} step {last['step'][0]} {share:.0f} % of its pairs weigh below {LIGHT}, from 0.5 each"
