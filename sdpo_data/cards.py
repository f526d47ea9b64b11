"""What the parts of a partition look like: a card per part, for a notebook, a terminal, or as frames."""

import html
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl

from sdpo_data.console import print_table, say
from sdpo_data.describe import noise_band
from sdpo_data.difficulty import difficulty_named
from sdpo_data.intervals import clustered_means, effective_size, wilson_interval
from sdpo_data.messages import plain_texts
from sdpo_data.tables import LOGP_MARGIN, PARTITION, SCORES, TOKEN_DIFFERENCE, SdpoError, check

SHOWN = 5  # examples near each edge of a part and at its median
EXCERPT = 300  # characters of a text in a notebook; a terminal's line has LINE
LINE = 60
PLACES = ("easiest", "median", "hardest")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Cards:
    """A card per part, as frames; a notebook shows it, `print` prints it."""

    parts: pl.DataFrame
    """A row per part: step, pairs, prompts, tokens (two prompts and both answers), sources; easiest, median, hardest
    (difficulty); margin_q05 to margin_q95 (quantiles of logp_margin, nats); reward_accuracy with its 95 % interval,
    clustered by prompt (reward_accuracy_low, _high); prompt_tokens, chosen_tokens, rejected_tokens (medians),
    longer_chosen (share of pairs)."""
    examples: pl.DataFrame
    """Up to five pairs of each part at its easier edge, its median and its harder edge: step, place, difficulty,
    pair_id, source, prompt, chosen, rejected (plain text; null where no pairs were given)."""
    edges: pl.DataFrame
    """Of `describe_edges`, under the noise band; no row where there is no band or the parts do not rise."""
    noise: str
    """What is known of the noise, in a sentence."""
    definition: str

    def print(self, title: str = "parts") -> None:
        """Print the cards to stdout: a table of figures, the examples a line each, and the edges."""
        figures = pl.DataFrame({"": list(_figures(self.parts.row(0, named=True)))})
        columns = [
            pl.Series(f"step {row['step']}", list(_figures(row).values())) for row in self.parts.iter_rows(named=True)
        ]
        print_table(figures.with_columns(columns), f"{title}, by {self.definition}")
        one_line = pl.col("prompt", "chosen", "rejected").str.replace_all(r"\s+", " ").str.head(LINE)
        for (step,), rows in self.examples.group_by("step", maintain_order=True):
            print_table(rows.select("place", "difficulty", one_line), f"step {step}: pairs at its edges and median")
        if self.edges.height:
            print_table(self.edges, "edges between steps, and the pairs within the noise band of each")
        say(self.noise)

    def _repr_html_(self) -> str:
        cards = "".join(self._card(row) for row in self.parts.iter_rows(named=True))
        edges = _html_table(self.edges.columns, self.edges.rows()) if self.edges.height else ""
        title = f"<p>{self.parts.height} part(s) by <code>{html.escape(self.definition)}</code></p>"
        row = f'<div style="display:flex;flex-wrap:wrap;gap:1em">{cards}</div>'
        return f"<div>{title}{row}{edges}<p>{html.escape(self.noise)}</p></div>"

    def _card(self, row: dict) -> str:
        shown = self.examples.filter(pl.col("step") == row["step"])
        names = ["place", "difficulty", "source", "prompt", "chosen", "rejected"]
        texts = shown.select(pl.col("place"), pl.col("difficulty").round(3), pl.col(names[2:]).str.head(EXCERPT))
        figures, pairs = _html_table([], _figures(row).items()), _html_table(names, texts.rows())
        return (
            '<div style="border:1px solid #999;border-radius:6px;padding:0.6em;max-width:48em">'
            f"<b>step {row['step']}</b>{figures}"
            f"<details><summary>pairs at its edges and median</summary>{pairs}</details></div>"
        )


def describe_partition(
    partition: pl.DataFrame,
    scores: pl.DataFrame,
    pairs: pl.DataFrame | None = None,
    rescored: pl.DataFrame | None = None,
) -> Cards:
    """Sum every part up: size, margins, reward accuracy, lengths, examples, and how firm its edges are.

    Args:
        partition: PARTITION frame; a pair may be in several steps.
        scores: SCORES of at least its pairs.
        pairs: PAIRS of at least its pairs, for the text of the examples.
        rescored: SCORES of some of its pairs in float32, the content of noise.parquet: gives the edges'
            stability, of a partition by single pairs whose parts rise.

    Raises:
        SdpoError: a pair of the partition has no scores.
    """
    partition, scores = check(partition, PARTITION, "partition"), check(scores, SCORES, "scores")
    unknown = partition.join(scores, on="pair_id", how="anti")
    if unknown.height:
        raise SdpoError(
            f"{unknown.height} pair(s) of the partition have no scores, e.g. {unknown['pair_id'].min()!r}. "
            "Give the scores it was made from."
        )
    definition = partition["definition"][0] if partition.height else "nothing"
    edges, noise = _stability(partition, scores, rescored, definition)
    return Cards(_part_figures(partition, scores), _examples(partition, pairs), edges, noise, definition)


def describe_edges(partition: pl.DataFrame, band: float) -> pl.DataFrame:
    """Count the pairs so near to an edge between two steps that noise could put them on its other side.

    Args:
        partition: PARTITION frame, by single pairs.
        band: how far noise moves a difficulty, in its unit: see `noise_band`.

    Returns:
        A row per edge: edge, difficulty (halfway between the last pair before it and the first
        after it); easier_pairs and harder_pairs within the band on either side, each with its
        share of all pairs. A tie that the edge cuts counts whatever the band.
    """
    rows = []
    for edge, before, after in _edges(partition):
        near = (pl.col("difficulty") - edge).abs() <= band
        sides = [partition.filter(near & side).height for side in (pl.col("step") <= before, pl.col("step") >= after)]
        rows.append((f"{before} | {after}", edge, *(x for n in sides for x in (n, n / partition.height))))
    columns = {"edge": pl.String, "difficulty": pl.Float64}
    for side in ("easier", "harder"):
        columns |= {f"{side}_pairs": pl.Int64, f"{side}_share": pl.Float64}
    return pl.DataFrame(rows, columns, orient="row")


def count_edge_pairs(partition: pl.DataFrame, band: float) -> int:
    """Count the pairs within the band of any edge, each once: see `describe_edges`."""
    near = [(pl.col("difficulty") - edge).abs() <= band for edge, *_ in _edges(partition)]
    return partition.filter(pl.any_horizontal(near)).height if near else 0


def _edges(partition: pl.DataFrame) -> list[tuple[float, int, int]]:
    """Difficulty halfway between neighbouring steps, and the two steps."""
    ends = partition.group_by("step").agg(low=pl.col("difficulty").min(), high=pl.col("difficulty").max()).sort("step")
    rows = ends.rows()
    return [((high + low) / 2, before, after) for (before, _, high), (after, low, _) in itertools.pairwise(rows)]


def _part_figures(partition: pl.DataFrame, scores: pl.DataFrame) -> pl.DataFrame:
    joined = partition.join(scores.drop("source"), on="pair_id")
    accuracy = clustered_means(joined.select("step", "prompt_id", reward_accuracy=LOGP_MARGIN > 0), ["step"])
    low, high = wilson_interval(pl.col("reward_accuracy"), effective_size("reward_accuracy"))
    accuracy = accuracy.select("step", "reward_accuracy", reward_accuracy_low=low, reward_accuracy_high=high)
    counts = joined.group_by("step", "source").agg(n=pl.len()).sort("n", "source", descending=[True, False])
    sources = counts.group_by("step").agg(sources=pl.format("{} {}", "source", "n").str.join(", "))
    figures = joined.group_by("step").agg(
        pairs=pl.len(),
        prompts=pl.col("prompt_id").n_unique(),
        tokens=(2 * pl.col("prompt_tokens") + pl.col("chosen_tokens") + pl.col("rejected_tokens")).sum(),
        easiest=pl.col("difficulty").min(),
        median=pl.col("difficulty").median(),
        hardest=pl.col("difficulty").max(),
        **{f"margin_q{round(100 * q):02}": LOGP_MARGIN.quantile(q, "linear") for q in QUANTILES},
        **{name: pl.col(name).median() for name in ("prompt_tokens", "chosen_tokens", "rejected_tokens")},
        longer_chosen=(TOKEN_DIFFERENCE > 0).mean(),
    )
    first = ["step", "pairs", "prompts", "tokens", "sources"]
    joined_up = figures.join(sources, on="step").join(accuracy, on="step").sort("step")
    return joined_up.select(*first, pl.exclude(first))


def _examples(partition: pl.DataFrame, pairs: pl.DataFrame | None) -> pl.DataFrame:
    """Take five pairs at each end of every part, and five in its middle; a pair shows once."""
    ranked = partition.sort("step", "difficulty", "pair_id").with_columns(
        place=pl.int_range(pl.len()).over("step"), n=pl.len().over("step")
    )
    place, n = pl.col("place"), pl.col("n")
    middle = (n - SHOWN) // 2
    name = (
        pl.when(place < SHOWN)
        .then(pl.lit(PLACES[0]))
        .when(place >= n - SHOWN)
        .then(pl.lit(PLACES[2]))
        .when((place >= middle) & (place < middle + SHOWN))
        .then(pl.lit(PLACES[1]))
    )
    shown = ranked.with_columns(place=name).filter(pl.col("place").is_not_null())
    texts = {name: pl.lit(None, pl.String) for name in ("prompt", "chosen", "rejected")}
    if pairs is not None:
        own = pairs.join(shown.select("pair_id").unique(), on="pair_id", how="semi")
        texts_of = own.select("pair_id", *(plain_texts(own, name).alias(name) for name in texts))
        shown = shown.join(texts_of, on="pair_id", how="left", maintain_order="left")
        texts = {name: pl.col(name) for name in texts}
    return shown.select("step", "place", "difficulty", "pair_id", "source", **texts)


def _stability(
    partition: pl.DataFrame, scores: pl.DataFrame, rescored: pl.DataFrame | None, definition: str
) -> tuple[pl.DataFrame, str]:
    """Count the pairs within the noise band of every edge, or say why they cannot be."""
    none = describe_edges(partition.clear(), 0.0)
    if rescored is None:
        coarse = scores.filter(pl.col("dtype") != "float32").height
        known = f"{coarse:,} scores are not in float32, and none were scored again" if coarse else "scored in float32"
        return none, f"how firm the edges are was not measured: {known}"
    ends = partition.group_by("step").agg(low=pl.col("difficulty").min(), high=pl.col("difficulty").max()).sort("step")
    if not (ends["low"].slice(1) >= ends["high"].head(ends.height - 1)).all():
        return none, "how firm the edges are was not measured: difficulty does not rise from part to part"
    try:
        band, n = noise_band(scores, rescored, definition)
    except SdpoError as error:  # the partition is made and stands
        return none, f"noise band unknown: {error}"
    k = count_edge_pairs(partition, band)
    return describe_edges(partition, band), (
        f"noise band {band:.2g} {difficulty_named(definition).unit} (95 % of {n:,} re-scored pairs): {k:,} of "
        f"{partition.height:,} pairs could be on the other side of an edge"
    )


def _figures(row: dict) -> dict[str, str]:
    """Write one part's figures for a person, each under its name."""
    margins = " / ".join(f"{row[f'margin_q{round(100 * q):02}']:.1f}" for q in QUANTILES)
    ends = f"[{row['reward_accuracy_low']:.3f}, {row['reward_accuracy_high']:.3f}]"
    lengths = " / ".join(f"{row[name]:,.0f}" for name in ("prompt_tokens", "chosen_tokens", "rejected_tokens"))
    return {
        "pairs (prompts)": f"{row['pairs']:,} ({row['prompts']:,})",
        "tokens": f"{row['tokens']:,}",
        "sources": row["sources"],
        "difficulty: easiest / median / hardest": " / ".join(f"{row[p]:.3g}" for p in PLACES),
        "margin, nats: 5 / 25 / 50 / 75 / 95 %": margins,
        "reward accuracy, 95 % interval": f"{row['reward_accuracy']:.3f} {ends} (n = {row['pairs']:,})",
        "median tokens: prompt / chosen / rejected": lengths,
        "chosen longer": f"{row['longer_chosen']:.1%}",
    }


def _html_table(names: list[str], rows: Iterable[Iterable[object]]) -> str:
    def line(cells: Iterable[object], tag: str) -> str:
        texts = ("" if cell is None else str(cell) for cell in cells)
        return f"<tr>{''.join(f'<{tag}>{html.escape(text)}</{tag}>' for text in texts)}</tr>"

    head = line(names, "th") if names else ""
    return f"<table>{head}{''.join(line(row, 'td') for row in rows)}</table>"
