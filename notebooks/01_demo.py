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
# # From preference pairs to a report
#
# Stepwise DPO ([arXiv 2403.19270](https://arxiv.org/abs/2403.19270)) in fifteen lines: measure how hard each pair
# is for a model, cut the pairs into steps, easiest first, align the model step by step, score every step on H4.
#
# Everything here is real: a 135M model, pairs judged by GPT-4, the Open LLM Leaderboard's questions. It is also
# tiny, so that it runs on a laptop in a few minutes. **Nothing on this page decides anything**, and the report says so.

# %%
from pathlib import Path

import sdpo_data as data
import sdpo_eval as evals
import sdpo_train as train
from sdpo_data.difficulty import difficulty_named
from sdpo_eval import plots, plots_chain, plots_pairs
from sdpo_eval.contrasts import TITLES
from sdpo_eval.evidence import measure_references, read_evidence
from sdpo_eval.h4 import TASKS

RUN = Path("runs/notebook")
MODEL = "embedded:smollm2-135m"  # or a folder, or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct

# %% [markdown]
# ## Pairs
# Two disjoint sources: instructions answered by language models, and questions of everyday physics.
# What could not be used is counted and named, never dropped in silence.

# %%
pairs = data.read_pairs(["embedded:alpaca-eval", "embedded:piqa"], data.PairsConfig(limit=8))
pairs.group_by("source").len()

# %% [markdown]
# ## Scores
# The log-probability of both answers under the model, summed over their tokens, in nats. The difference is the
# *margin*; above zero the model prefers the chosen answer.

# %%
scores = data.score_pairs(pairs, MODEL, data.ScoreConfig(max_length=512))
scores.select("source", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens").head()

# %% [markdown]
# ## Partition
# Easiest first. The default difficulty is the margin per token, which measures length less than the sum does. Each line
# is a source; the colours are the steps, and where one ends and the next begins is the cut. A source whose pairs lie on
# one side of it is a step of its own under another name.

# %%
part = data.partition_pairs(scores, data.PartitionConfig(parts=2))
plots_pairs.plot_difficulties(part, difficulty_named("margin_per_token").unit)

# %% [markdown]
# The same cut, seen from the margins: where a curve crosses 0 is the share of the step's pairs that the model gets wrong
# before any training. A good order has the first step's curve to the right of the second's.

# %%
plots_pairs.plot_margin_curves(scores, part)

# %% [markdown]
# ## Stepwise DPO
# Step *t* starts from the model of step *t - 1* and is held near it. Before the first update of each step, policy and
# reference must give every answer the same log-probability: `max_start_gap`, in nats, is the proof. The learning rate is
# far too high on purpose, so that four updates a step show something.

# %%
steps = train.run_sdpo(
    pairs, part, model=MODEL, out=RUN, scores=scores,
    config=train.TrainConfig(learning_rate=1e-4, batch_pairs=2, warmup=0.0, max_length=512),
)  # fmt: skip
steps.select("step", "pairs", "updates", "first_loss", "last_loss", "max_start_gap", "margin_ref_mean")

# %% [markdown]
# ## The chain
# Gamma is the mean margin. The authors of sDPO read the reference's gamma as the bar that a step's pairs have to clear,
# and the chain is there to raise it: in step 2 the reference is no longer the base model but what step 1 wrote. The two
# marks of step 2 are the same pairs under both. What four updates changed is little beside the bars, which are long as
# there are eight pairs, of very different lengths.

# %%
plots_chain.plot_reference_margins(measure_references(read_evidence(data.open_run(RUN))))

# %% [markdown]
# ## H4
# ARC, HellaSwag, MMLU and TruthfulQA. Here it is the two with short questions, sixty of each, which takes half a minute
# a model; leave `tasks` out, and all four are asked. TruthfulQA comes from the hub, and is named where that is out of
# reach. A model whose bar holds the dotted line has not been told from guessing. Whether two steps differ is judged
# question by question, by the report below; `04_reading_an_evaluation` says why.

# %%
config = evals.EvalConfig(tasks=["mmlu", "truthfulqa_mc2"], limit=60, mmlu_subjects=["marketing", "nutrition"])
rows = evals.evaluate(steps, config, out=RUN)
plots.plot_tasks(rows, {name: task.chance for name, task in TASKS.items()}, TITLES)

# %% [markdown]
# ## Report
# One file that can be sent around: `report.html` in the run folder.

# %%
evals.Report(RUN)
