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
# # How to read an evaluation
#
# Two models, a few hundred questions, a difference of 1.4 points. Is it one? This page makes answers of which the truth
# is known, and looks at them with the same tools that read a real run. **The answers here are drawn at random**, from
# models that we make up: that is the only way to know who is really better.

# %%
import altair as alt
import numpy as np
import polars as pl

from sdpo_data.tables import ITEMS
from sdpo_eval.contrasts import Side, contrast_models
from sdpo_eval.stats import Differences, compare_checkpoints, compare_methods, detectable_difference, holm
from sdpo_eval.stats import macro_mean_stderr as mean_of_strata


def answers(questions: int, better: float, seed: int, agree: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Answers (100 is right) of two models to the same questions; the first is `better` by so many points in truth.

    A question's hardness is the same for both; with the chance `agree` both answer as its hardness says.
    """
    random = np.random.default_rng(seed)
    hard = random.random(questions)
    shared = random.random(questions) < agree
    luck = random.random((2, questions))
    chance = np.array([0.40 + better / 100 / (1 - agree), 0.40])[:, None]
    right = np.where(shared, hard < 0.40, luck < chance)
    return 100.0 * right[0], 100.0 * right[1]


def mean_stderr(values: np.ndarray) -> tuple[float, float | None]:
    return mean_of_strata(values.tolist(), ["all"] * len(values))


# %% [markdown]
# ## A score has an error
# Two hundred questions. The second model is no better or worse than the first, in truth.

# %%
one, two = answers(200, better=0.0, seed=5)
pl.DataFrame(
    [("first", *mean_stderr(one)), ("second", *mean_stderr(two))],
    schema=["model", "points", "standard error"], orient="row",
)  # fmt: skip

# %% [markdown]
# ## The error of a difference is smaller than you fear
# Both answered the *same* questions, and what is hard for one is hard for the other. Paired, that part of the noise goes
# away: compare the two standard errors.

# %%
paired = compare_checkpoints([Differences.of(one - two)])
apart = float(np.hypot(mean_stderr(one)[1], mean_stderr(two)[1]))
pl.DataFrame(
    {"difference": [paired.value], "paired standard error": [paired.stderr], "as if other questions": [apart],
     "95 % from": [paired.low], "to": [paired.high], "p": [paired.p]}
)  # fmt: skip

# %% [markdown]
# ## Power: what could have been seen at all
# "Not distinguishable" says little unless one knows what would have been. With so many questions, a true difference of so
# many points is found four times in five. Below it lies what this evaluation is blind to.

# %%
sizes = [100, 200, 500, 1000, 2000, 5000, 10000, 26073]
curve = []
for agree, said in ((0.0, "unrelated models"), (0.8, "alike: agree on 80 %"), (0.9, "two steps of one chain: 90 %")):
    for size in sizes:
        first, second = answers(size, 0.0, seed=size, agree=agree)
        error = compare_checkpoints([Differences.of(first - second)], resamples=100).stderr
        curve.append((said, size, detectable_difference(error)))
curve = pl.DataFrame(curve, schema=["models", "questions", "points"], orient="row")
alt.Chart(curve, title="The smallest true difference found in 4 of 5 evaluations").mark_line(point=True).encode(
    x=alt.X("questions:Q", scale=alt.Scale(type="log")),
    y=alt.Y("points:Q", title="points", scale=alt.Scale(type="log")),
    color="models:N", strokeDash="models:N", shape="models:N", tooltip=["models", "questions", alt.Tooltip("points:Q", format=".2f")],
).properties(width=560, height=260)  # fmt: skip

# %% [markdown]
# ## Ten looks find something
# Ten pairs of models that are *equal in truth*, each tested at 5 %. The chance that at least one of ten comes out below
# 0.05 is 40 %; in this family it happened. Adjusted (Holm), nothing is found. That is why the report names one contrast
# beforehand and adjusts all others.

# %%
p = [compare_checkpoints([Differences.of(np.subtract(*answers(300, 0.0, seed)))], resamples=2000).p for seed in range(20, 30)]
pl.DataFrame({"contrast": range(1, 11), "p": p, "adjusted": holm(p)}).sort("p").head(4)

# %% [markdown]
# ## These checkpoints, or these methods?
# Train again with another seed and the score moves, by 0.8 points here, though nothing else changed. The first row asks
# whether *these two checkpoints* differ; it can be very sure. The second asks whether the *method* is better, which only
# several seeds can answer. Both methods are the same in truth.

# %%
random = np.random.default_rng(3)
table = []
for shift in random.normal(0.0, 0.8, size=5):  # each seed of the first method is better or worse by luck
    first, second = answers(4000, better=float(shift), seed=int(1000 * abs(shift)), agree=0.9)
    table.append(first - second)
best = max(table, key=lambda row: abs(row.mean()))
rows = [("these checkpoints, one seed", compare_checkpoints([Differences.of(best)])), ("these methods, 5 seeds", compare_methods([Differences.of(table)]))]
pl.DataFrame([(name, effect.value, effect.low, effect.high, effect.p) for name, effect in rows],
             schema=["verdict on", "difference", "95 % from", "to", "p"], orient="row")  # fmt: skip

# %% [markdown]
# ## Flips
# Two models with the same score need not be the same model. Count the questions that only one of them gets right: the
# sum of both is how much changed, their difference is the score.

# %%
first, second = answers(1000, 0.0, seed=11)
pl.DataFrame(
    {"only the first": [int(((first > second)).sum())], "only the second": [int((second > first).sum())],
     "both or neither": [int((first == second).sum())], "difference, points": [float((first - second).mean())]}
)  # fmt: skip

# %% [markdown]
# ## The same, from a run's tables
# `contrast_models` reads ITEMS, the table that every evaluation writes. On a run of your own it is one line:
# `sdpo_eval.compare_models("runs/a", a="sdpo", b="dpo")`, or `python -m sdpo_eval.compare runs/a --a sdpo --b dpo`.


# %%
def as_items(scores: np.ndarray, arm: str) -> pl.DataFrame:
    rows = []
    for number, score in enumerate(scores.tolist()):
        row = {"arm": arm, "seed": 0, "step": 1, "model_key": f"drawn-{arm}", "protocol": "drawn@1", "task": "hellaswag"}
        row |= {"item_id": f"q/{number}", "subject": "hellaswag", "correct": score / 100, "score": score / 100}
        row |= {"gold_logp": -9.0 - number % 3, "choice_logps": [-9.0, -9.5]}
        rows.append({column: row.get(column, f"q/{number}") for column in ITEMS})
    return pl.DataFrame(rows, ITEMS)


sides = [Side(arm, arm, as_items(scores, arm)) for arm, scores in (("sdpo", first), ("dpo", second))]
contrast_models([(sides[0], sides[1])]).select("first", "second", "task", "effect", "low", "high", "p", "verdict", "detectable", "n_for_1_point")
