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
# is known, and draws them with the figures that a run's report has. **The answers here are drawn at random**, for
# models that we make up: that is the only way to know who is really better.

# %%
import altair as alt
import numpy as np
import polars as pl

from sdpo_data.tables import DOCUMENTS, ITEMS
from sdpo_eval import canvas, plots
from sdpo_eval.changes import find_changes
from sdpo_eval.contrasts import CHECKPOINTS, METHODS, TITLES, Side, contrast_models
from sdpo_eval.h4 import TASKS, summarise_items
from sdpo_eval.stats import detectable_difference

MOST = 6400  # questions drawn; fewer are the first of them


def answers(
    model: str, *, better: float = 0.0, questions: int = 300, alike: float = 0.8, level: float = 40.0,
    task: str = "arc_challenge",
) -> pl.DataFrame:  # fmt: skip
    """ITEMS of a made-up model, "arm/seed/step": right on level + better percent of the questions, in truth.

    On a share `alike` of the questions their hardness decides, the same for all models; on the others, own luck.
    """
    (arm, seed, step), world = model.split("/"), np.random.default_rng(list(task.encode()))
    own = np.random.default_rng(list(f"{task} {model}".encode()))
    hard, decided, luck = world.random(MOST), world.random(MOST) < alike, own.random(MOST)
    right = np.where(decided, hard < level / 100, luck < level / 100 + better / 100 / (1 - alike)).astype(float)
    gold_logp = -1.5 - 2 * hard + 0.5 * right + 0.4 * own.normal(size=MOST)
    names = [f"{task}/{number}" for number in range(MOST)]
    columns = {"item_id": names, "cluster": names, "correct": right, "score": right, "gold_logp": gold_logp}
    columns |= {"arm": arm, "seed": int(seed), "step": int(step), "model_key": model, "protocol": "drawn@1"}
    columns |= {"task": task, "subject": task, "choice_logps": [[-1.0, -2.0]] * MOST}
    return pl.DataFrame(columns).select(pl.col(name).cast(kind) for name, kind in ITEMS.items()).head(questions)


def side(name: str, *models: pl.DataFrame) -> Side:
    return Side(name, name, pl.concat(models))


def named(contrasts: pl.DataFrame) -> pl.DataFrame:
    return contrasts.with_columns(contrast=pl.format("{} − {}", "first", "second"))


# %% [markdown]
# ## A score has an error
# A base model and two arms, 300 questions a task. **All of them are equally good in truth**: whatever moves from model
# to model is luck. The bars say so, they overlap. The dotted lines are what guessing scores, which in TruthfulQA is near
# 45. A model whose bar holds that line has not been shown to know anything of the task: nobody has of MMLU here, and of
# TruthfulQA, where these models are 3 points above it in truth, 300 questions do not show it.

# %%
levels = {"arc_challenge": 33.0, "hellaswag": 42.0, "mmlu": 26.0, "truthfulqa_mc2": 48.0}
models = ("base/0/0", "sdpo/0/1", "sdpo/0/2", "dpo/0/1")
asked = pl.concat(answers(model, level=level, task=task) for task, level in levels.items() for model in models)
results = summarise_items(asked)
chance = {name: task.chance for name, task in TASKS.items()}
plots.plot_tasks(results, chance, TITLES)

# %% [markdown]
# H4 is the mean of the four, so its error is about half of theirs. Mind the scale: the figure fills itself with
# whatever there is, and it is the bars that tell a step up from a wobble.

# %%
plots.plot_h4(results, sum(chance.values()) / len(chance))

# %% [markdown]
# ## The error of a difference is smaller than you fear
# Both answered the *same* questions, and what is hard for one is hard for the other. Paired, that part of the noise goes
# away. Two overlapping bars above say little about the difference; its own interval does.

# %%
first, second = answers("sdpo/0/2"), answers("dpo/0/1")
difference = contrast_models([(side("sdpo", first), side("dpo", second))]).row(0, named=True)
apart = np.hypot(*(summarise_items(items)["stderr"][0] for items in (first, second)))
pl.DataFrame(
    {"difference": [difference["effect"]], "paired standard error": [difference["stderr"]],
     "as if other questions": [apart], "95 % from": [difference["low"]], "to": [difference["high"]]}
)  # fmt: skip

# %% [markdown]
# ## Power: more questions, a shorter interval
# This model **is** better than the base model, by 2 points. In truth the difference is the same in every row, only the
# number of questions grows: four times as many halve the interval. With few, "not distinguishable" is all there is to say, and it
# does not mean "equal".

# %%
base = side("base", answers("base/0/0", questions=MOST))
sizes = [side(f"{n:,} questions", answers("sdpo/0/2", better=2.0, questions=n)) for n in (100, 400, 1600, 6400)]
contrasts = contrast_models([(size, base) for size in sizes])
plots.plot_contrasts(contrasts.with_columns(contrast="first"), TITLES["arc_challenge"])

# %% [markdown]
# Before anything is evaluated, the same sum says what it could find: the smallest true difference that four in five such
# evaluations tell from 0. Below the line lies what they are blind to. Models that answer alike are told apart sooner,
# as there is less luck in their difference.

# %%
curve = []
for alike, said in ((0.0, "unrelated models"), (0.8, "alike on 80 %"), (0.9, "two steps of a chain, 90 %")):
    scores = [answers(model, questions=MOST, alike=alike)["score"] for model in ("base/0/0", "sdpo/0/2")]
    spread = 100 * (scores[1] - scores[0]).std()
    curve += [(said, n, detectable_difference(spread / n**0.5)) for n in (100, 300, 1000, 3000, 10000, 26073)]
table = pl.DataFrame(curve, schema=["models", "questions", "points"], orient="row")
drawn = alt.Chart(canvas.held(table)).encode(
    x=alt.X("questions:Q", scale=alt.Scale(type="log"), axis=alt.Axis(values=[100, 300, 1000, 3000, 10000, 26073])),
    y=alt.Y("points:Q", title="true difference", scale=alt.Scale(type="log"), axis=alt.Axis(values=[0.3, 1, 3, 10])),
)
lines = drawn.mark_line(strokeWidth=2).encode(canvas.stroke("models"), canvas.dash("models"))
points = drawn.mark_point(filled=True, size=75, opacity=1).encode(*canvas.marks("models"))
smallest = table.filter(questions=26073)["points"]
canvas.styled(
    alt.layer(lines, points).properties(width=canvas.WIDTH, height=canvas.HEIGHT),
    f"Even 26,073 questions find nothing below {smallest.min():.1f} to {smallest.max():.1f} points",
    "The smallest true difference found in 4 of 5 evaluations, by how alike the two models answer.",
)

# %% [markdown]
# ## Ten looks find something
# Ten models that are *equal to the base model in truth*, each tested at 5 %: the chance that at least one of ten comes
# out below 0.05 is 40 %. Here two bars lie beside 0, and are called "not distinguishable" all the same: adjusted for being
# two of ten looks (Holm), they are nothing. That is why a report names one contrast beforehand and adjusts all others.

# %%
looks = contrast_models([(side(f"model {n}", answers(f"look/{n}/1")), base) for n in range(10)])
plots.plot_contrasts(named(looks), TITLES["arc_challenge"])

# %%
looks.select("first", "p", "p_holm", "verdict").sort("p").head(3)

# %% [markdown]
# ## These checkpoints, or these methods?
# Train again with another seed and the score moves, by 1 point here (a standard deviation), though nothing else
# changed. **Both methods are the same in truth.** Seed by seed the question is whether *these two checkpoints* differ;
# with 6,400 questions it is answered surely, and now for the one method, now for the other.

# %%
luck = np.random.default_rng(3).normal(0.0, 1.0, size=5)
seeds = [answers(f"sdpo/{seed}/2", better=shift, questions=MOST, alike=0.9) for seed, shift in enumerate(luck)]
others = [answers(f"dpo/{seed}/1", questions=MOST, alike=0.9) for seed in range(5)]
both = contrast_models([(side("sdpo", *seeds), side("dpo", *others))])
plots.plot_contrasts(named(both.filter(verdict_on=CHECKPOINTS)), TITLES["arc_challenge"])

# %% [markdown]
# Whether the *method* is better, only several seeds can answer. Its interval takes the luck of seeds in, so it is wider
# than any above although it stands on five times the answers. Whoever trains one seed of each sees one of the rows above.

# %%
plots.plot_contrasts(named(both.filter(verdict_on=METHODS)), TITLES["arc_challenge"])

# %% [markdown]
# ## Flips
# Two models with nearly the same score need not be the same model. The large marks are questions that only one of them
# gets right: the sum of both kinds is how much changed, their difference is the score. Beneath the score every right
# answer became likelier or less likely, which shows sooner that something moved.

# %%
changes = find_changes(side("sdpo", first), side("dpo", second), DOCUMENTS.to_frame())
plots.plot_items(changes.with_columns(pl.col("task").replace(TITLES)), ("sdpo", "dpo"))

# %% [markdown]
# ## On a run of your own
# All of this was made from ITEMS, the table that every evaluation writes: `sdpo_eval.Report("runs/a")` has these
# figures, `sdpo_eval.compare_models("runs/a", a="sdpo", b="dpo")` the numbers, as has
# `python -m sdpo_eval.compare runs/a --a sdpo --b dpo`.

# %%
columns = ("first", "second", "verdict_on", "effect", "low", "high", "p_holm", "verdict", "detectable", "n_for_1_point")
both.select(columns)
