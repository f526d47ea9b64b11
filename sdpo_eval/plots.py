"""One figure per question: frames in, an altair chart out.

A step keeps its colour (viridis), shape and dash from figure to figure, so none of them needs
colour vision; bars are 95 % intervals wherever a standard error exists.
"""

import math
from collections.abc import Mapping
from typing import Any

import altair as alt
import polars as pl

from sdpo_data.tables import LOGP_MARGIN, TOKEN_DIFFERENCE

Figure = alt.Chart | alt.LayerChart | alt.FacetChart

WIDTH, HEIGHT = 640, 260  # pixels
LOG_2 = math.log(2)
NORMAL_95 = 1.959964
MOST_POINTS = 2000  # marks in one figure
DOTS = [2, 3]  # dash of the lines that only guide the eye
QUANTILES = 201  # points of a cumulative curve
VIRIDIS = alt.Scale(scheme=alt.SchemeParams(name="viridis", extent=[0, 0.9]))  # its yellow end is lost on white


def plot_h4(results: pl.DataFrame) -> Figure:
    """Draw H4 from the base model through every step, one line per arm and seed.

    Args:
        results: RESULTS of one protocol and subset, with rows of task "h4".
    """
    title = alt.Title("H4 from the base model through every step", subtitle=f"Mean of the four tasks. {_BARS}")
    chains = _chains(results.filter(pl.col("task") == "h4"))
    chart = alt.layer(*_lines_by_step(chains, "H4, points of 100"), data=_rows(chains))
    return _styled(chart.properties(width=WIDTH, height=HEIGHT), title)


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
    guess = alt.Chart().mark_rule(strokeDash=DOTS, color=_GREY).encode(y="mean(chance):Q")
    lines = _lines_by_step(chains, "points of 100")
    order = [names.get(task, task) for task in (*names, *results["task"].unique(maintain_order=True))]
    chart = _panels([guess, *lines], chains, alt.Facet("task:N", title=None, sort=order)).resolve_scale(y="independent")
    drawn = any(task in chance for task in results["task"])
    subtitle = f"{_BARS}{' Dotted: what guessing scores.' if drawn else ''} Each panel has its own scale."
    return _styled(chart, alt.Title("Each task from the base model through every step", subtitle=subtitle))


def plot_reference_margins(references: pl.DataFrame) -> Figure:
    """Draw what the reference thinks of each part: the paper's Figure 2, for this run.

    Args:
        references: arm, seed, step, reference (which model judges), mean, stderr (nats), n:
            one row per part and model.

    Source: arXiv 2403.19270, Figure 2: mean gamma under the reference. There all models judge
        one set; here each judges the pairs of the step it is the reference of.
    """
    table = _interval(references, "mean")
    x = alt.X("step:O", title="step", axis=alt.Axis(labelAngle=0, grid=False))
    dodge = alt.XOffset("reference:N", scale=alt.Scale(paddingOuter=1))
    base = alt.Chart().encode(x=x, xOffset=dodge)
    tooltip = _tooltip("arm", "seed", "step", "reference", ("mean", ".2f", "mean margin [nats]"), *_BOUNDS, "n")
    y = alt.Y("low:Q", title="mean margin [nats]")
    bars = base.mark_rule(strokeWidth=1.5).encode(_stroke("reference"), y=y, y2="high:Q")
    points = base.mark_point(filled=True, size=80, opacity=1).encode(
        *_marks("reference", "judged by"), y="mean:Q", tooltip=tooltip
    )
    chart = _panels([_guide(y=alt.datum(0)), bars, points], table, alt.Facet("arm:N", title=None))
    title = alt.Title(
        "How far each step's reference prefers the chosen answers of the step's pairs",
        subtitle=f"Mean of log p(chosen) − log p(rejected). {_BARS}",
    )
    return _styled(chart, title)


def plot_margin_curves(scores: pl.DataFrame, partition: pl.DataFrame) -> Figure:
    """Draw how far the base model prefers the chosen answer, one cumulative curve per step.

    Where a curve crosses 0 is the share of the step's pairs the base model gets wrong.

    Args:
        scores: SCORES under the base model.
        partition: PARTITION frame.
    """
    table = scores.join(partition.select("pair_id", "step"), on="pair_id").with_columns(margin=LOGP_MARGIN)
    curves = []
    for (step,), part in table.sort("margin").group_by("step", maintain_order=True):
        at = pl.Series([round(q * (part.height - 1) / (QUANTILES - 1)) for q in range(QUANTILES)]).unique()
        share = (at + 1) / part.height
        curves.append(pl.DataFrame({"step": step, "margin": part["margin"][at].round(3), "share": share.round(4)}))
    curves = pl.concat(curves).sort("step", "margin")
    chart = (
        alt.Chart(_rows(curves))
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=alt.X("margin:Q", title="log p(chosen) − log p(rejected) under the base model [nats]"),
            y=alt.Y("share:Q", title="share of the step's pairs below", axis=alt.Axis(format="%")),
            color=alt.Color("step:N", scale=VIRIDIS),
            strokeDash=alt.StrokeDash("step:N"),
            tooltip=_tooltip("step", ("margin", ".2f", "margin [nats]"), ("share", ".1%", "share below")),
        )
    )
    title = alt.Title(
        "Margins of each step's pairs under the base model",
        subtitle="Cumulative shares; where a curve crosses 0 is the share the base model gets wrong.",
    )
    return _styled(
        alt.layer(_guide(x=alt.datum(0)), chart, data=_rows(curves)).properties(width=WIDTH, height=HEIGHT), title
    )


def plot_length_confound(scores: pl.DataFrame, partition: pl.DataFrame) -> Figure:
    """Draw each pair's difficulty against how much longer its chosen answer is.

    Args:
        scores: SCORES under the base model.
        partition: PARTITION frame.
    """
    table = partition.select("pair_id", "step", "difficulty").join(
        scores.select("pair_id", "source", tokens=TOKEN_DIFFERENCE), on="pair_id", maintain_order="left"
    )
    shown = table if table.height <= MOST_POINTS else table.sample(MOST_POINTS, seed=0)
    definition = partition["definition"][0]
    chart = (
        alt.Chart(_rows(shown.with_columns(pl.col("difficulty").round(4))))
        .mark_point(size=30, opacity=0.7)
        .encode(
            *_marks("step"),
            x=alt.X("tokens:Q", title="chosen longer than rejected by [tokens]", axis=alt.Axis(grid=False)),
            y=alt.Y("difficulty:Q", title=f"difficulty ({definition})", scale=alt.Scale(zero=False)),
            tooltip=_tooltip(
                "pair_id", "source", "step", ("difficulty", ".4f", "difficulty"), ("tokens", ",", "longer by [tokens]")
            ),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )
    sampled = f" {MOST_POINTS:,} of {table.height:,} pairs, drawn at random." if shown.height < table.height else ""
    title = alt.Title(
        "Does the difficulty merely measure length?",
        subtitle=f"One mark per pair; a slope means that the order is partly an order of lengths.{sampled}",
    )
    return _styled(chart, title)


def plot_loss(metrics: pl.DataFrame) -> Figure:
    """Draw the training loss by update, steps one after another, one panel per arm.

    Args:
        metrics: METRICS frame with rows named "loss".
    """
    return _training_curves(
        metrics.filter(name="loss"), "DPO loss [nats]", (LOG_2, "log 2 = 0.6931"),
        "Training loss by update; a step that starts from its reference starts at log 2",
        "Policy and reference agree on every pair then, and the sigmoid loss is log 2 = 0.6931 (dotted).",
    )  # fmt: skip


def plot_reward_margins(metrics: pl.DataFrame) -> Figure:
    """Draw TRL's implicit reward margin by update, steps one after another, one panel per arm.

    Args:
        metrics: METRICS frame with rows named "rewards/margins": beta times how far the policy
            moved from its reference on the pair, which starts at 0 in every step.
    """
    return _training_curves(
        metrics.filter(name="rewards/margins"), "rewards/margins", (0.0, "0: policy = reference"),
        "How far training separated the answers, beyond the step's reference",
        "TRL's rewards/margins: beta × (margin of the policy − margin of its reference), from 0 in every step.",
    )  # fmt: skip


_GREY = "#7d8590"
_CONFIG = {
    "font": "system-ui, sans-serif",
    "background": "transparent",
    "view": {"stroke": None},
    "title": {
        "anchor": "start", "offset": 14, "fontSize": 15, "fontWeight": 600,
        "subtitleFontSize": 12, "subtitleColor": _GREY,
    },
    "axis": {
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "gridOpacity": 0.5,
        "domainColor": _GREY, "tickColor": _GREY, "labelColor": _GREY, "titleColor": _GREY,
    },
    "legend": {
        "orient": "top", "titleOrient": "left", "columnPadding": 16,
        "titleFontWeight": "normal", "titleFontSize": 12, "labelFontSize": 12,
    },
    "header": {"labelFontSize": 12.5, "labelFontWeight": 600, "labelAnchor": "start"},
}  # fmt: skip
_BARS = "Bars: 95 % intervals."
_BOUNDS = (("low", ".2f", "95 % from"), ("high", ".2f", "95 % to"))


def _chains(results: pl.DataFrame) -> pl.DataFrame:
    """Let every arm start from the base model's row, and set the arms a little apart."""
    columns = ["arm", "seed", "step", "model", "task", "value", "stderr", "n"]
    base = results.filter(arm="base").with_columns(model=pl.lit("base"))
    others = results.filter(pl.col("arm") != "base").with_columns(
        model=pl.format("{} seed {} step {}", "arm", "seed", "step")
    )
    arms = others.filter(pl.col("step") > 0).select("arm", "seed").unique()
    if arms.height:
        base = base.drop("arm", "seed").join(arms, how="cross")
    chains = pl.concat([base.select(columns), others.select(columns)]).sort("arm", "seed", "step")
    place = pl.col("arm").rank("dense") - (pl.col("arm").n_unique() + 1) / 2
    apart = pl.when(pl.col("model") == "base").then(0.0).otherwise(0.07 * place)
    return _interval(chains, "value").with_columns(x=pl.col("step") + apart)


def _lines_by_step(chains: pl.DataFrame, y_title: str) -> list[alt.Chart]:
    last = max(chains["step"].to_list())
    x = alt.X(
        "x:Q",
        title=None,
        scale=alt.Scale(domain=[-0.25, last + 0.25], nice=False),
        axis=alt.Axis(
            values=list(range(last + 1)), grid=False, labelExpr="datum.value ? 'step ' + datum.value : 'base'"
        ),
    )
    y = alt.Y("value:Q", title=y_title, scale=alt.Scale(zero=False, nice=True))
    tooltip = _tooltip("model", "task", ("value", ".2f", "points"), *_BOUNDS, ("n", ",", "questions"))
    base = alt.Chart().encode(x=x, detail="seed:N")
    bars = base.mark_rule(strokeWidth=1.5).encode(_stroke("arm"), y=alt.Y("low:Q", title=y_title), y2="high:Q")
    lines = base.mark_line(strokeWidth=2).encode(_stroke("arm"), _dash("arm"), y=y)
    points = base.mark_point(filled=True, size=75, opacity=1).encode(*_marks("arm"), y=y, tooltip=tooltip)
    return [bars, lines, points]


def _training_curves(metric: pl.DataFrame, y_title: str, start: tuple[float, str], text: str, subtitle: str) -> Figure:
    """Draw one metric over a run's updates, steps end to end, beside the value that they start from."""
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
        tooltip=_tooltip(*unit, "update", ("value", ".4f", y_title)),
    )
    lines = base.mark_line(strokeWidth=2).encode(_stroke("step"), _dash("step"))
    points = base.mark_point(filled=True, size=32, opacity=1).encode(*_marks("step"))
    rule = _guide(y=alt.datum(start[0]))
    label = _once().mark_text(text=start[1], align="right", dx=-3, dy=-6, color=_GREY).encode(
        x=alt.value("width"), y=alt.datum(start[0])
    )  # fmt: skip
    chart = _panels([rule, label, lines, points], table, alt.Facet("arm:N", title=None))
    thinned = f" One update in {every} is drawn." if every > 1 else ""
    return _styled(chart, alt.Title(text, subtitle=subtitle + thinned))


def _panels(layers: list[alt.Chart], table: pl.DataFrame, by: alt.Facet) -> alt.FacetChart:
    """Draw the layers once per value of a column, two panels beside each other."""
    several = table[str(by.shorthand).removesuffix(":N")].n_unique() > 1
    width, height = (WIDTH // 2 - 30, 200) if several else (WIDTH, HEIGHT)
    chart = alt.layer(*layers, data=_rows(table)).properties(width=width, height=height)
    return chart.facet(by, columns=2)


def _marks(column: str, title: str | None = None) -> tuple[alt.Color, alt.Shape]:
    """Tell values apart by colour and by shape, in one legend."""
    title = title or column
    return alt.Color(f"{column}:N", scale=VIRIDIS, title=title), alt.Shape(f"{column}:N", title=title)


def _stroke(column: str) -> alt.Stroke:
    """Colour a line as its marks are, without a second legend."""
    return alt.Stroke(f"{column}:N", scale=VIRIDIS, legend=None)


def _dash(column: str) -> alt.StrokeDash:
    return alt.StrokeDash(f"{column}:N", legend=None)


def _interval(table: pl.DataFrame, value: str) -> pl.DataFrame:
    """Add the ends of the 95 % interval; null, hence no bar, where there is no standard error."""
    half = NORMAL_95 * pl.col("stderr")
    return table.with_columns(low=pl.col(value) - half, high=pl.col(value) + half)


def _guide(**place: Any) -> alt.Chart:
    return _once().mark_rule(strokeDash=DOTS, color=_GREY).encode(**place)


def _once() -> alt.Chart:
    """Start a layer that is drawn once per panel, not once per row."""
    return alt.Chart().transform_aggregate(rows="count()")


def _tooltip(*columns: str | tuple[str, str, str]) -> list[alt.Tooltip]:
    tooltips = []
    for column in columns:
        if isinstance(column, str):
            tooltips.append(alt.Tooltip(f"{column}:N", title=column))
        else:
            name, format_, title = column
            tooltips.append(alt.Tooltip(f"{name}:Q", format=format_, title=title))
    return tooltips


def _rows(table: pl.DataFrame) -> alt.Data:
    """Hold the rows in the chart itself: no size limit of altair's, no type guessing."""
    return alt.InlineData(values=table.to_dicts())


def _styled(chart: Figure, title: alt.Title) -> Figure:
    return chart.properties(title=title, config=_CONFIG)
