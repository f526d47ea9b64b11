# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What makes a pair hard, and where to cut
#
# A curriculum is only as good as its order. This page looks at real pairs under a real model: how far the definitions
# of difficulty agree, how much of each is only length, which pairs change parts when the definition changes, and what
# the ways to cut do to the sizes of the parts. It trains nothing. 48 pairs show how to look; they **decide nothing**.

# %%
import altair as alt
import polars as pl

import sdpo_data as data
from sdpo_data.describe import describe_definitions, describe_scores
from sdpo_data.difficulty import DIFFICULTIES, difficulty_named
from sdpo_data.messages import plain_texts
from sdpo_data.tables import LOGP_MARGIN, TOKEN_DIFFERENCE

MODEL = "embedded:smollm2-135m"  # or a folder, or a hub id

# %% [markdown]
# ## Pairs and scores
# Instructions answered by language models, and questions of everyday physics. The model reads each pair once: its
# scores are kept in a store outside this page, so a second run takes seconds.

# %%
pairs = data.read_pairs(["embedded:alpaca-eval", "embedded:piqa"], data.PairsConfig(limit=24))
scores = data.score_pairs(pairs, MODEL, data.ScoreConfig(max_length=512))
describe_scores(scores)

# %% [markdown]
# `reward_accuracy` is the share of pairs whose chosen answer the model already prefers, by the *summed*
# log-probability; `per_token` is the same by the mean. Look at the intervals before ordering two sources by it.
#
# ## Definitions side by side
# Kendall's tau between every two definitions that these scores allow: 1 is the same order, 0 none, -1 the opposite.

# %%
compared = describe_definitions(scores)
names = compared["definition"].to_list()
taus = compared.select("definition", *names).unpivot(index="definition", variable_name="against", value_name="tau")
base = alt.Chart(taus).encode(
    x=alt.X("against:N", sort=names, title=None), y=alt.Y("definition:N", sort=names, title=None)
)
color = alt.Color("tau:Q", scale=alt.Scale(scheme="blueorange", domain=[-1, 1]), title="tau")
cells = base.mark_rect().encode(color=color)
numbers = base.mark_text().encode(text=alt.Text("tau:Q", format=".2f"))
(cells + numbers).properties(
    width=260, height=260, title=f"How far the definitions agree (Kendall's tau-b, n = {scores.height} pairs)"
)

# %% [markdown]
# ## How much of it is length?
# A longer answer has a lower summed log-probability whatever it says. So where the chosen answer is longer, the summed
# margin calls the pair hard. The mean per token does so less, and may err to the other side.

# %%
measured = pl.concat(
    scores.select(
        "pair_id",
        "source",
        length=TOKEN_DIFFERENCE,
        definition=pl.lit(name),
        difficulty=difficulty_named(name).measure(scores).rank(),
    )
    for name in names
)
rho = dict(compared.select("definition", "length_rho").rows())
titles = {name: f"{name}: rho {rho[name]:+.2f}" for name in names}
alt.Chart(measured.with_columns(pl.col("definition").replace_strict(titles))).mark_circle().encode(
    x=alt.X("length:Q", title="chosen - rejected, tokens"),
    y=alt.Y("difficulty:Q", title="rank of difficulty, hardest at the top"),
    color=alt.Color("source:N"),
    facet=alt.Facet("definition:N", columns=2, title=f"Difficulty against length (Spearman's rho, n = {scores.height})"),
).properties(width=240, height=160)

# %% [markdown]
# ## Which pairs flip?
# Two parts by the summed margin, and two by the mean per token: these pairs are "easy" for one and "hard" for the
# other.

# %%
by_sum = data.partition_pairs(scores, data.PartitionConfig(difficulty="logp_margin"))
by_mean = data.partition_pairs(scores, data.PartitionConfig(difficulty="margin_per_token"))
both = by_sum.select("pair_id", by_sum="step").join(by_mean.select("pair_id", by_mean="step"), on="pair_id")
flipped = both.filter(pl.col("by_sum") != pl.col("by_mean")).join(scores, on="pair_id").sort("by_sum", "pair_id")
f"{flipped.height} of {both.height} pairs change their part"

# %%
texts = pairs.select("pair_id", *(plain_texts(pairs, side).alias(side) for side in ("prompt", "chosen", "rejected")))
with pl.Config(fmt_str_lengths=80, tbl_rows=12):
    shown = flipped.select("pair_id", "by_sum", "by_mean", LOGP_MARGIN.round(1).alias("margin"), length=TOKEN_DIFFERENCE)
    display(shown.join(texts, on="pair_id", maintain_order="left").drop("pair_id"))  # noqa: F821

# %% [markdown]
# ## Choosing a cut
# Every way to cut makes three parts of the same order; they differ in where the edges lie and how much is in each
# part. Equal parts give each step as many updates; equal tokens as much work; quantiles and k-means follow the values,
# and a part may then be small.

# %%
cuts = {
    "equal": data.PartitionConfig(parts=3),
    "tokens": data.PartitionConfig(parts=3, cut="tokens"),
    "shares 0.2 0.3 0.5": data.PartitionConfig(parts=3, cut="shares", at=[0.2, 0.3, 0.5]),
    "quantiles 0.5 0.9": data.PartitionConfig(parts=3, cut="quantiles", at=[0.5, 0.9]),
    "kmeans": data.PartitionConfig(parts=3, cut="kmeans"),
    "kmeans with length": data.PartitionConfig(parts=3, cut="kmeans", cluster_on=["chosen_tokens - rejected_tokens"]),
}
made = {name: data.partition_pairs(scores, config) for name, config in cuts.items()}
placed = pl.concat(part.with_columns(cut=pl.lit(name)) for name, part in made.items())
alt.Chart(placed).mark_tick(thickness=2).encode(
    x=alt.X("difficulty:Q", title=f"difficulty: {DIFFICULTIES['margin_per_token'].name}, nats per token"),
    y=alt.Y("cut:N", sort=list(cuts), title=None),
    color=alt.Color("step:O", scale=alt.Scale(scheme="viridis"), title="step"),
).properties(width=520, height=200, title=f"Where each cut puts its edges (n = {scores.height} pairs)")

# %%
sizes = pl.concat(
    data.describe_partition(part, scores).parts.select(
        "step", "pairs", "tokens", "reward_accuracy", "reward_accuracy_low", "reward_accuracy_high", cut=pl.lit(name)
    )
    for name, part in made.items()
)
bars = alt.Chart(sizes).encode(
    x=alt.X("step:O"), color=alt.Color("step:O", scale=alt.Scale(scheme="viridis"), legend=None)
)
interval = bars.mark_rule().encode(
    y=alt.Y("reward_accuracy_low:Q", title="reward accuracy, 95 % interval"), y2="reward_accuracy_high:Q"
)
point = bars.mark_point(filled=True, size=60).encode(y="reward_accuracy:Q")
alt.layer(interval, point).properties(width=90, height=140).facet(
    column=alt.Column("cut:N", sort=list(cuts), title="Reward accuracy of each part")
)

# %% [markdown]
# ## Controls
# A curriculum that helps should help more than parts without it. The same sizes, filled otherwise:

# %%
controls = {
    order: data.partition_pairs(scores, data.PartitionConfig(parts=3, order=order))
    for order in ("easy_to_hard", "hard_to_easy", "random", "stratified", "token_difference")
}
pl.concat(
    part.group_by("step").agg(pl.col("difficulty").mean()).select("step", "difficulty", order=pl.lit(order))
    for order, part in controls.items()
).pivot("step", index="order", values="difficulty", sort_columns=True)

# %% [markdown]
# ## The parts, a card each
# What each step would train on: open the pairs at its edges and read them. That is the best check there is.

# %%
data.describe_partition(made["equal"], scores, pairs)
