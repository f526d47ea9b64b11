"""One figure per question about pairs: what is wrong with them, how hard they are, and what that may really be."""

import altair as alt
import polars as pl

from sdpo_data.tables import LOGP_MARGIN, TOKEN_DIFFERENCE
from sdpo_eval.canvas import (
    GREY,
    HEIGHT,
    VIRIDIS,
    WIDTH,
    Figure,
    drawn_at_random,
    guide,
    held,
    marks,
    minus,
    stroke,
    styled,
    tooltip,
)

QUANTILES = 201  # points of a cumulative curve
MOST_SOURCES = 20  # rows of the figure of difficulties
TEXTS = ("prompt", "chosen", "rejected")  # of a pair, shown on hovering


def plot_findings(findings: pl.DataFrame) -> Figure:
    """Draw which share of the pairs each check has something to say of; hovering shows the remedy.

    Args:
        findings: FINDINGS frame, as `check_pairs` gives it; what is "fine" is left out.
    """
    found = findings.filter(pl.col("severity") != "fine").with_columns(percent=100 * pl.col("share"))
    table = found.sort("share", "check", descending=[True, False])
    y = alt.Y("check:N", title=None, sort=table["check"].to_list())
    base = alt.Chart().encode(y=y.axis(labelLimit=230, grid=True, ticks=False, domain=False))
    x = alt.X("percent:Q", title="of all pairs [%]", scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=8))
    lines = base.mark_rule(strokeWidth=1.5, color=GREY).encode(x=x, x2=alt.value(0))  # from the left edge, 0 %
    told = marks("severity") if table.height else ()  # a legend of nothing has no size, and so has its figure
    points = base.mark_point(filled=True, size=75, opacity=1).encode(
        *told, x=x,
        tooltip=tooltip("check", "severity", ("pairs", ",", "pairs"), ("percent", ".2f", "%"), "remedy", "pair_id"),
    )  # fmt: skip
    chart = alt.layer(lines, points, data=held(table)).properties(width=WIDTH, height=30 + 22 * table.height)
    wrong = table.filter(severity="wrong")["check"].to_list()
    said = "Nothing is wrong with the pairs" + ("; some are worth a look" if table.height else "")
    return styled(
        chart,
        f"Not to be trained on as they are: {', '.join(wrong[:2])}{' ...' if wrong[2:] else ''}" if wrong else said,
        '"wrong": not to be trained on as it is; "look": may be meant so. Hover for what to do.',
    )  # fmt: skip


def plot_difficulties(partition: pl.DataFrame, unit: str) -> Figure:
    """Draw how difficulty is distributed in each source and step: medians, middle halves, and 90 % of the pairs.

    Args:
        partition: PARTITION frame.
        unit: of the difficulty.
    """
    kept = partition["source"].value_counts(sort=True).sort("count", "source", descending=[True, False])["source"]
    places = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
    table = (
        partition.filter(pl.col("source").is_in(kept.head(MOST_SOURCES).to_list()))
        .group_by("source", "step")
        .agg(*[pl.col("difficulty").quantile(q, "linear").round(4).alias(n) for n, q in places.items()], pairs=pl.len())
        .sort("source", "step")
    )
    axis = alt.Axis(labelLimit=200, grid=False, ticks=False, domain=False)
    base = alt.Chart().encode(y=alt.Y("source:N", title=None, axis=axis), yOffset=alt.YOffset("step:N"))
    x = alt.X("q05:Q", title=f"difficulty: {partition['definition'][0]} [{unit}], harder to the right")
    thin = base.mark_rule(strokeWidth=1.2).encode(stroke("step"), x=x, x2="q95:Q")
    thick = base.mark_rule(strokeWidth=5, opacity=0.55).encode(stroke("step"), x="q25:Q", x2="q75:Q")
    shown = [
        (name, ".4f", title) for name, title in zip(places, ("5 %", "25 %", "median", "75 %", "95 %"), strict=True)
    ]
    points = base.mark_point(filled=True, size=75, opacity=1).encode(
        *marks("step"), x="median:Q", tooltip=tooltip("source", "step", ("pairs", ",", "pairs"), *shown)
    )
    left_out = f" The {MOST_SOURCES} largest of {kept.len()} sources." if kept.len() > MOST_SOURCES else ""
    rows = table["source"].n_unique() * (14 + 15 * table["step"].n_unique())
    chart = alt.layer(thin, thick, points, data=held(table)).properties(width=WIDTH, height=max(60, rows))
    return styled(
        chart,
        _say_medians(partition),
        f"Mark: median; thick: the middle half; thin: 90 % of the pairs.{left_out}",
    )


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
        alt.Chart(held(curves))
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=alt.X("margin:Q", title="log p(chosen) − log p(rejected) under the base model [nats]"),
            y=alt.Y("share:Q", title="share of the step's pairs below", axis=alt.Axis(format="%")),
            color=alt.Color("step:N", scale=VIRIDIS),
            strokeDash=alt.StrokeDash("step:N"),
            tooltip=tooltip("step", ("margin", ".2f", "margin [nats]"), ("share", ".1%", "share below")),
        )
    )
    return styled(
        alt.layer(guide(x=alt.datum(0)), chart, data=held(curves)).properties(width=WIDTH, height=HEIGHT),
        _say_right(table),
        "Cumulative shares of margins; where a curve crosses 0 is the share the base model gets wrong.",
    )


def plot_length_confound(scores: pl.DataFrame, partition: pl.DataFrame, texts: pl.DataFrame | None = None) -> Figure:
    """Draw each pair's difficulty against how much longer its chosen answer is; hovering shows the pair.

    Args:
        scores: SCORES under the base model.
        partition: PARTITION frame.
        texts: pair_id and TEXTS, as a person reads them; without it hovering shows numbers alone.
    """
    table = partition.select("pair_id", "step", "difficulty").join(
        scores.select("pair_id", "source", tokens=TOKEN_DIFFERENCE), on="pair_id", maintain_order="left"
    )
    shown, sampled = drawn_at_random(table, "pairs")
    if texts is not None:
        shown = shown.join(texts.select("pair_id", *TEXTS), on="pair_id", how="left", maintain_order="left")
    chart = (
        alt.Chart(held(shown.with_columns(pl.col("difficulty").round(4))))
        .mark_point(size=30, opacity=0.7)
        .encode(
            *marks("step"),
            x=alt.X("tokens:Q", title="chosen longer than rejected by [tokens]", axis=alt.Axis(grid=False)),
            y=alt.Y(
                "difficulty:Q", title=f"difficulty ({partition['definition'][0]})", scale=alt.Scale(zero=False),
                axis=alt.Axis(titleLimit=HEIGHT),  # an expression may be long
            ),
            tooltip=tooltip(
                "pair_id", "source", "step", ("difficulty", ".4f", "difficulty"), ("tokens", ",", "longer by [tokens]"),
                *(TEXTS if texts is not None else ()),
            ),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )  # fmt: skip
    hover = " Hover to read it." if texts is not None else ""
    said = f"One mark per pair; a slope means that the order is partly an order of lengths.{hover}{sampled}"
    rho = table.select(pl.corr("tokens", "difficulty", method="spearman").fill_nan(None)).item()
    text = (
        "Difficulty and length" if rho is None else f"Rank correlation of difficulty with length: {minus(rho, '+.2f')}"
    )
    return styled(chart, f"{text}, {table.height:,} pairs", said)


def plot_definitions(definitions: pl.DataFrame) -> Figure:
    """Draw how far the definitions of difficulty agree, and with the length: a square per two of them.

    Args:
        definitions: of `sdpo_data.describe.describe_definitions`.
    """
    names = definitions["definition"].to_list()
    kinds = dict.fromkeys(names, "Kendall's tau") | {"length_rho": "Spearman's rho"}
    long = definitions.select("definition", "length_rho", *names).unpivot(
        index="definition", variable_name="against", value_name="agreement"
    )
    agreement = pl.col("agreement")
    long = long.drop_nulls("agreement").with_columns(
        kind=pl.col("against").replace(kinds),
        against=pl.col("against").replace({"length_rho": "how much longer chosen is"}),
        said=agreement.map_elements(lambda value: f"{value:+.2f}".replace("-", "−"), pl.String),
        agreement=agreement.round(4),
        strength=agreement.abs().round(4),
        sign=pl.when(agreement < 0).then(pl.lit("−")).otherwise(pl.lit("+")),
    )
    order = [*names, "how much longer chosen is"]
    base = alt.Chart(held(long)).encode(
        x=alt.X("against:N", title=None, sort=order, axis=alt.Axis(labelAngle=-28, grid=False, labelLimit=170)),
        y=alt.Y("definition:N", title=None, sort=names, axis=alt.Axis(grid=False, labelLimit=220)),
    )
    squares = base.mark_rect().encode(
        color=alt.Color("sign:N", scale=alt.Scale(domain=["+", "−"], range=["#3b82b8", "#d08a2e"]), legend=None),
        opacity=alt.Opacity("strength:Q", scale=alt.Scale(domain=[0, 1], range=[0.04, 0.6]), legend=None),
        tooltip=tooltip("definition", "against", ("agreement", "+.3f", "agreement"), "kind"),
    )
    numbers = base.mark_text(fontSize=12).encode(text="said:N")
    sampled = definitions["tau_pairs"][0]
    return styled(
        alt.layer(squares, numbers).properties(width=WIDTH, height=34 * len(names)),
        _say_agreement(definitions, names),
        f"1: the same order; −1: the opposite one; 0: nothing in common. {sampled:,} pairs.",
    )


def _say_medians(partition: pl.DataFrame) -> str:
    """Say from where to where the median difficulty goes, from the first step to the last."""
    (first, low), *_, (last, high) = 2 * _by_step(partition, pl.col("difficulty").median())
    if first == last:
        return f"The median pair has a difficulty of {minus(low, '.2f')}"
    moved = "rises" if high > low else "falls" if high < low else "goes"
    return f"Median difficulty {moved} from {minus(low, '.2f')} in step {first} to {minus(high, '.2f')} in step {last}"


def _say_right(table: pl.DataFrame) -> str:
    """Say how many pairs of the first and of the last step the base model has right."""
    (first, low), *_, (last, high) = 2 * _by_step(table, 100 * (pl.col("margin") > 0).mean())
    also = "" if first == last else f", and {high:.0f} % of step {last}'s"
    return f"The base model already has {low:.0f} % of step {first}'s pairs right{also}"


def _by_step(table: pl.DataFrame, value: pl.Expr) -> list[tuple[int, float]]:
    return table.group_by("step").agg(value.alias("_value")).sort("step").rows()


def _say_agreement(definitions: pl.DataFrame, names: list[str]) -> str:
    """Say which two definitions order the pairs most alike, and which least."""
    rows = {row["definition"]: row for row in definitions.iter_rows(named=True)}
    pairs = [(rows[a][b], a, b) for place, a in enumerate(names) for b in names[place + 1 :] if rows[a][b] is not None]
    if not pairs:
        return "Which definitions of difficulty order the pairs alike"
    (most, a, b), (least, c, d) = max(pairs), min(pairs)
    also = f", {c} and {d} least ({minus(least, '+.2f')})" if pairs[1:] else ""
    return f"{a} and {b} order the pairs most alike (tau {minus(most, '+.2f')}){also}"
