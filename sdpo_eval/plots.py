"""One figure per question about scores and pairs: frames in, an altair chart out; plots_chain.py has the training's.

A step keeps its colour (viridis), shape and dash from figure to figure, so none of them needs
colour vision; bars are 95 % intervals wherever a standard error exists.
"""

from collections.abc import Mapping, Sequence

import altair as alt
import polars as pl

from sdpo_data.tables import LOGP_MARGIN, TOKEN_DIFFERENCE
from sdpo_eval.canvas import (
    BARS,
    BOUNDS,
    DOTS,
    GREY,
    HEIGHT,
    VIRIDIS,
    WIDTH,
    Figure,
    drawn_at_random,
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

QUANTILES = 201  # points of a cumulative curve
MOST_SOURCES = 20  # rows of the figure of difficulties
ASKED = ("n", ",", "questions")
TEXTS = ("prompt", "chosen", "rejected")  # of a pair, shown on hovering


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
        _ends(chains),
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
    return styled(chart, "Each task from the base model through every step", subtitle)


def plot_contrasts(contrasts: pl.DataFrame, title: str) -> Figure:
    """Draw every difference with its interval, the contrast named beforehand first: which side of 0, and how surely.

    Args:
        contrasts: rows of CONTRASTS of one task, with contrast (its name).
        title: what to call the task.
    """
    table = contrasts.sort(~pl.col("primary"), maintain_order=True).with_columns(
        contrast=pl.when("primary").then(pl.format("{} (primary)", "contrast")).otherwise("contrast")
    )
    y = alt.Y("contrast:N", title=None, sort=table["contrast"].to_list())
    base = alt.Chart().encode(y=y.axis(labelLimit=290, grid=True, ticks=False, domain=False))
    bars = base.mark_rule(strokeWidth=1.5).encode(
        stroke("verdict"), x=alt.X("low:Q", title=f"difference by {title}, points"), x2="high:Q"
    )
    points = base.mark_point(filled=True, size=75, opacity=1).encode(
        *marks("verdict"), x=alt.X("effect:Q", axis=alt.Axis(grid=False, tickCount=8)),
        tooltip=tooltip("contrast", ("effect", "+.2f", "points"), *BOUNDS, ("p_holm", ".4f", "p, adjusted"),
                        ASKED, ("seeds", "d", "seeds"), "verdict_on", "verdict"),
    )  # fmt: skip
    chart = alt.layer(guide(x=alt.datum(0)), bars, points, data=held(table)).properties(
        width=WIDTH, height=30 + 22 * table.height
    )
    decided = table.filter(pl.col("verdict") != "not distinguishable").height
    return styled(
        chart,
        f"{decided} of {table.height} differences can be told from none",
        f"{title[0].upper()}{title[1:]}: first minus second, verdict on {table['verdict_on'][0]}. {BARS} "
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
        stroke("of"), x=alt.X("low:Q", title="H4, points of 100"), x2="high:Q"
    )
    points = base.mark_point(filled=True, size=75, opacity=1).encode(
        *marks("of"), x=alt.X("value:Q", scale=alt.Scale(zero=False), axis=alt.Axis(grid=False, tickCount=8)),
        tooltip=tooltip("model", "of", ("value", ".2f", "H4"), *BOUNDS),
    )  # fmt: skip
    chart = alt.layer(bars, points, data=held(table)).properties(width=WIDTH, height=17 * table.height)
    return styled(
        chart,
        "Where this run's models stand on the paper's scale",
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
        f"What training did to each question: {names[0]} against {names[1]}",
        f"Right of 0 the right answer became likelier. One mark per question; hover to read it.{sampled}",
    )


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
    points = base.mark_point(filled=True, size=75, opacity=1).encode(
        *marks("severity"), x=x,
        tooltip=tooltip("check", "severity", ("pairs", ",", "pairs"), ("percent", ".2f", "%"), "remedy", "pair_id"),
    )  # fmt: skip
    chart = alt.layer(lines, points, data=held(table)).properties(width=WIDTH, height=30 + 22 * table.height)
    wrong = table.filter(severity="wrong")["check"].to_list()
    return styled(
        chart,
        f"Not to be trained on as they are: {', '.join(wrong[:2])}{' ...' if wrong[2:] else ''}" if wrong
        else "Nothing is wrong with the pairs; some are worth a look",
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
        "How hard each source's pairs are, part by part",
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
        "How many pairs of each step the base model already has right",
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
            y=alt.Y("difficulty:Q", title=f"difficulty ({partition['definition'][0]})", scale=alt.Scale(zero=False)),
            tooltip=tooltip(
                "pair_id", "source", "step", ("difficulty", ".4f", "difficulty"), ("tokens", ",", "longer by [tokens]"),
                *(TEXTS if texts is not None else ()),
            ),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )  # fmt: skip
    hover = " Hover to read it." if texts is not None else ""
    said = f"One mark per pair; a slope means that the order is partly an order of lengths.{hover}{sampled}"
    return styled(chart, "Does the difficulty merely measure length?", said)


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
        "Which definitions of difficulty order the pairs alike",
        f"1: the same order; −1: the opposite one; 0: nothing in common. {sampled:,} pairs.",
    )


def _ends(chains: pl.DataFrame) -> str:
    """Say where H4 ends for each arm (mean over its seeds), and where it began."""
    base = chains.filter(model="base")["value"].to_list()
    last = chains.filter(pl.col("step") == pl.col("step").max().over("arm", "seed"))
    ends = last.group_by("arm").agg(pl.col("value").mean()).sort("value", "arm", descending=[True, False]).rows()
    said = ", ".join(f"{value:.1f} for {arm}" for arm, value in ends[:3])
    others = f", {len(ends) - 3} more below" if ends[3:] else ""
    return f"H4 ends at {said}{others}{f', from {base[0]:.1f} before step 1' if base else ''}"


def _guess(chance: float) -> alt.Chart:
    return once().mark_rule(strokeDash=DOTS, color=GREY).encode(y=alt.datum(chance))


def _chains(results: pl.DataFrame) -> pl.DataFrame:
    """Let every arm start from the base model's row, and set the arms a little apart."""
    columns = ["arm", "seed", "step", "task", "value", "stderr", "n"]
    return interval(from_base(results.select(columns)), "value")
