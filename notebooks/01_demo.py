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
# Easiest first. The default difficulty is the margin per token, which measures length less than the sum does.

# %%
part = data.partition_pairs(scores, data.PartitionConfig(parts=2))
part.head()

# %% [markdown]
# ## Stepwise DPO
# Step *t* starts from the model of step *t - 1* and is held near it. Before the first update of each step, policy and
# reference must give every answer the same log-probability: `max_start_gap`, in nats, is the proof.

# %%
steps = train.run_sdpo(
    pairs, part, model=MODEL, out=RUN, scores=scores,
    config=train.TrainConfig(learning_rate=5e-6, batch_pairs=4, warmup=0.0, max_length=512),
)  # fmt: skip
steps.select("step", "pairs", "updates", "first_loss", "last_loss", "max_start_gap", "margin_ref_mean")

# %% [markdown]
# ## H4
# ARC, HellaSwag, MMLU and TruthfulQA; a question or two of each, to show the wiring.

# %%
rows = evals.evaluate(steps, evals.EvalConfig(limit=1, mmlu_subjects=["marketing"]), out=RUN)
rows.select("arm", "step", "task", "value", "stderr", "n", "n_full")

# %% [markdown]
# ## Report
# One file that can be sent around: `report.html` in the run folder.

# %%
evals.Report(RUN)
