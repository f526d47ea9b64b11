"""What figures share: size, style, intervals, and marks that tell values apart without colour vision."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import polars as pl

Figure = alt.Chart | alt.LayerChart | alt.FacetChart

WIDTH, HEIGHT = 640, 260  # pixels
NORMAL_95 = 1.959964
MOST_POINTS = 2000  # marks in one figure
DOTS = [2, 3]  # dash of the lines that only guide the eye
VIRIDIS = alt.Scale(scheme=alt.SchemeParams(name="viridis", extent=[0, 0.9]))  # its yellow end is lost on white
GREY = "#7d8590"
CONFIG = {
    "font": "system-ui, sans-serif",
    "background": "transparent",
    "view": {"stroke": None},
    "title": {
        "anchor": "start", "offset": 14, "fontSize": 15, "fontWeight": 600,
        "subtitleFontSize": 12, "subtitleColor": GREY,
    },
    "axis": {
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "gridOpacity": 0.5,
        "domainColor": GREY, "tickColor": GREY, "labelColor": GREY, "titleColor": GREY,
    },
    "legend": {
        "orient": "top", "titleOrient": "left", "columnPadding": 16,
        "titleFontWeight": "normal", "titleFontSize": 12, "labelFontSize": 12,
    },
    "header": {"labelFontSize": 12.5, "labelFontWeight": 600, "labelAnchor": "start"},
}  # fmt: skip
BARS = "Bars: 95 % intervals."
BOUNDS = (("low", ".2f", "95 % from"), ("high", ".2f", "95 % to"))


def panels(layers: list[alt.Chart], table: pl.DataFrame, by: alt.Facet) -> alt.FacetChart:
    """Draw the layers once per value of a column, two panels beside each other."""
    several = table[str(by.shorthand).removesuffix(":N")].n_unique() > 1
    width, height = (WIDTH // 2 - 30, 200) if several else (WIDTH, HEIGHT)
    chart = alt.layer(*layers, data=held(table)).properties(width=width, height=height)
    return chart.facet(by, columns=2)


def marks(column: str, title: str | None = None) -> tuple[alt.Color, alt.Shape]:
    """Tell values apart by colour and by shape, in one legend."""
    title = title or column
    return alt.Color(f"{column}:N", scale=VIRIDIS, title=title), alt.Shape(f"{column}:N", title=title)


def stroke(column: str, table: pl.DataFrame | None = None) -> alt.Stroke:
    """Colour a line as its marks are, without a second legend.

    Args:
        table: what is drawn, where a value may have no line at all, such as an interval that is not known: the
            colours are then of all its values, as those of the marks are.
    """
    if table is None:
        return alt.Stroke(f"{column}:N", scale=VIRIDIS, legend=None)
    values = sorted(table[column].drop_nulls().unique().to_list())
    return alt.Stroke(f"{column}:N", scale=alt.Scale(scheme=VIRIDIS.scheme, domain=values), legend=None)


def dash(column: str) -> alt.StrokeDash:
    """Dash a line by the value of a column, without a second legend."""
    return alt.StrokeDash(f"{column}:N", legend=None)


def interval(table: pl.DataFrame, value: str) -> pl.DataFrame:
    """Add the ends of the 95 % interval; null, hence no bar, where there is no standard error."""
    half = NORMAL_95 * pl.col("stderr")
    return table.with_columns(low=pl.col(value) - half, high=pl.col(value) + half)


def guide(**place: Any) -> alt.Chart:
    """Draw a dotted line that only guides the eye."""
    return once().mark_rule(strokeDash=DOTS, color=GREY).encode(**place)


def once() -> alt.Chart:
    """Start a layer that is drawn once per panel, not once per row."""
    return alt.Chart().transform_aggregate(rows="count()")


def tooltip(*columns: str | tuple[str, str, str]) -> list[alt.Tooltip]:
    """List what hovering shows: columns by name, or (column, number format, title)."""
    tooltips = []
    for column in columns:
        if isinstance(column, str):
            tooltips.append(alt.Tooltip(f"{column}:N", title=column))
        else:
            name, format_, title = column
            tooltips.append(alt.Tooltip(f"{name}:Q", format=format_, title=title))
    return tooltips


def held(table: pl.DataFrame) -> alt.Data:
    """Hold the rows in the chart itself: no size limit of altair's, no type guessing."""
    return alt.InlineData(values=table.to_dicts())


def styled(chart: Figure, text: str, subtitle: str) -> Figure:
    """Give a figure its title, which says what it shows, and the house's style."""
    return chart.properties(title=alt.Title(text, subtitle=subtitle), config=CONFIG)


def minus(value: float, format_: str) -> str:
    """Write a number for a title, with a true minus sign, and none before a zero."""
    text = f"{value:{format_}}"
    return (text if float(text) else f"{0.0:{format_}}").replace("-", "−")


def main_arm(table: pl.DataFrame) -> str:
    """Name the arm that a title speaks of: sdpo where it is there, else the first by name."""
    arms = sorted(table["arm"].unique().to_list(), key=lambda arm: (arm.rpartition(": ")[2] != "sdpo", arm))
    return arms[0]


def say_ends(chains: pl.DataFrame, what: str, format_: str) -> str:
    """Say where a value ends for each arm (mean over its seeds), and where it began.

    Args:
        chains: of `from_base`, with value.
        what: the value's name, such as "H4".
    """
    base = chains.filter(model="base")["value"].to_list()
    last = chains.filter(pl.col("step") == pl.col("step").max().over("arm", "seed"))
    ends = last.group_by("arm").agg(pl.col("value").mean()).sort("value", "arm", descending=[True, False]).rows()
    said = ", ".join(f"{minus(value, format_)} for {arm}" for arm, value in ends[:3])
    others = f", {len(ends) - 3} more below" if ends[3:] else ""
    return f"{what} ends at {said}{others}{f', from {minus(base[0], format_)} before step 1' if base else ''}"


def drawn_at_random(table: pl.DataFrame, what: str) -> tuple[pl.DataFrame, str]:
    """Keep at most MOST_POINTS rows, the same every time, and the sentence that says so."""
    if table.height <= MOST_POINTS:
        return table, ""
    return table.sample(MOST_POINTS, seed=0), f" {MOST_POINTS:,} of {table.height:,} {what}, drawn at random."


def from_base(table: pl.DataFrame) -> pl.DataFrame:
    """Let every arm and seed start from the base model's row, name the models, and set the arms a little apart.

    Args:
        table: arm, seed, step and more; step 0 of arm "base" is the base model.

    Returns:
        The same columns, with model (its name) and x (its place: the step, moved a little by arm).
    """
    base, others = (table.filter(is_base) for is_base in (pl.col("arm") == "base", pl.col("arm") != "base"))
    base, named = base.with_columns(model=pl.lit("base")), pl.format("{} seed {} step {}", "arm", "seed", "step")
    others = others.with_columns(model=named)
    arms = others.filter(pl.col("step") > 0).select("arm", "seed").unique()
    if arms.height:
        base = base.drop("arm", "seed").join(arms, how="cross")
    chains = pl.concat([base.select(others.columns), others]).sort("arm", "seed", "step")
    place = pl.col("arm").rank("dense") - (pl.col("arm").n_unique() + 1) / 2
    apart = pl.when(pl.col("model") == "base").then(0.0).otherwise(0.07 * place)
    return chains.with_columns(x=pl.col("step") + apart)


def lines_by_step(
    chains: pl.DataFrame, y_title: str, shown: Sequence[str | tuple[str, str, str]] = ()
) -> list[alt.Chart]:
    """Draw value, low and high by step, a line per arm and seed: bars, lines, and points that tell on hovering.

    Args:
        chains: of `from_base`, with value, low and high.
        shown: more columns to show on hovering.
    """
    last = max(chains["step"].to_list())
    x = alt.X(
        "x:Q",
        title=None,
        scale=alt.Scale(domain=[-0.25, last + 0.25], nice=False),
        axis=alt.Axis(
            values=list(range(last + 1)), grid=False, labelExpr="datum.value ? 'step ' + datum.value : 'base'"
        ),
    )
    y: Any = alt.Y("value:Q", title=y_title, scale=alt.Scale(zero=False, nice=True))
    tooltips = tooltip("model", ("value", ".2f", y_title), *BOUNDS, *shown)
    base = alt.Chart().encode(x=x, detail="seed:N")
    known = {end: f"isValid(datum.{end}) ? datum.{end} : datum.value" for end in ("low", "high")}  # else no bar at all
    bars = base.transform_calculate(**known).mark_rule(strokeWidth=1.5)
    bars = bars.encode(stroke("arm"), y=alt.Y("low:Q", title=y_title), y2="high:Q")
    lines = base.mark_line(strokeWidth=2).encode(stroke("arm"), dash("arm"), y=y)
    points = base.mark_point(filled=True, size=75, opacity=1).encode(*marks("arm"), y=y, tooltip=tooltips)
    return [bars, lines, points]
