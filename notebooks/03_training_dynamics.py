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
# # What happens inside a step: two arms side by side
#
# Stepwise DPO (`sdpo`) and plain DPO (`dpo`) see the same pairs once each. The first goes through them in two steps, easy
# to hard, and takes the model that each step wrote as start *and* reference of the next; the second in one go, held to
# the base model throughout. This page trains both on a few short pairs with LoRA and looks inside.
#
# Learning rate and beta are far too high on purpose, so that a handful of updates shows something. Sixteen pairs and
# one seed **decide nothing**; the shapes below are what to look for in a run of your own.

# %%
from pathlib import Path

import polars as pl

import sdpo_data as data
import sdpo_eval as evals
import sdpo_train as train
from sdpo_data.tables import LOGP_MARGIN
from sdpo_eval import plots_chain

RUN, MODEL = Path("runs/notebook"), "embedded:smollm2-135m"

# %% [markdown]
# ## Pairs, scores, two parts
# Questions of everyday physics with a right and a wrong solution; short, so that this takes a minute or two.

# %%
pairs = data.read_pairs("embedded:piqa", data.PairsConfig(limit=16))
scores = data.score_pairs(pairs, MODEL, data.ScoreConfig(max_length=256))
part = data.partition_pairs(scores, data.PartitionConfig(parts=2))
settings = train.TrainConfig(
    arms=["sdpo", "dpo"], lora_rank=8, learning_rate=5e-4, beta=0.5, batch_pairs=2, warmup=0.0, max_length=256
)
steps = train.run_sdpo(pairs, part, model=MODEL, out=RUN, scores=scores, config=settings)

# %% [markdown]
# ## The hand-off
# Before the first update of a step that starts from its reference, policy and reference are the same model. So the two
# give every answer the same log-probability (`max_start_gap`, in nats, is float noise), and the loss is log 2. If yours
# is not, the step was held to something else than you think.

# %%
steps.select("arm", "step", "start_key", "reference_key", "first_loss", "max_start_gap", "last_loss")

# %% [markdown]
# ## The loss comes back to log 2
# At the start of step 2 the loss of `sdpo` jumps back up. That is no collapse: the yardstick moved. What step 1 had
# gained is now in the reference, and the margin counts from there.

# %%
run = data.open_run(RUN)
plots_chain.plot_loss(run.metrics)

# %%
plots_chain.plot_reward_margins(run.metrics)

# %% [markdown]
# ## What the references think
# Gamma is how far a model prefers the chosen answer, in nats. The authors of sDPO read the reference's gamma as a bar
# that each step's pairs have to clear; in their Figure 2 it rises from step to step. Here are both steps' pairs under the
# base model and under the reference that each step had.

# %%
from sdpo_eval.evidence import measure_references, read_evidence

plots_chain.plot_reference_margins(measure_references(read_evidence(run)))

# %% [markdown]
# ## Displacement
# DPO asks for a larger margin, not for a likelier chosen answer. Often *both* answers become less likely, the rejected one
# more so. Score the pairs again with the last model of each arm and look.

# %%
lasts = steps.sort("step").group_by("arm", maintain_order=True).last()
after = {
    arm: data.score_pairs(pairs, model, data.ScoreConfig(max_length=256))
    for arm, model in lasts.select("arm", "model").rows()
}
moved = [
    now.join(scores, on="pair_id", suffix="_before").select(
        arm=pl.lit(arm),
        chosen=(pl.col("chosen_logp") - pl.col("chosen_logp_before")).mean(),
        rejected=(pl.col("rejected_logp") - pl.col("rejected_logp_before")).mean(),
        margin_before=(pl.col("chosen_logp_before") - pl.col("rejected_logp_before")).mean(),
        margin_after=LOGP_MARGIN.mean(),
    )
    for arm, now in after.items()
]
pl.concat(moved)

# %% [markdown]
# ## Which pairs turned
# Pairs whose chosen answer the model now finds likelier than the rejected one, or no longer. These were trained on: on
# pairs held out (`python -m sdpo_eval.held_out RUN`) the picture is another, and that is the one to judge by.

# %%
turned = [
    now.join(scores, on="pair_id", suffix="_before").select(
        arm=pl.lit(arm),
        became_right=((LOGP_MARGIN > 0) & (pl.col("chosen_logp_before") <= pl.col("rejected_logp_before"))).sum(),
        became_wrong=((LOGP_MARGIN <= 0) & (pl.col("chosen_logp_before") > pl.col("rejected_logp_before"))).sum(),
        pairs=pl.len(),
    )
    for arm, now in after.items()
]
pl.concat(turned)

# %% [markdown]
# ## The report on the same run
# Its part "The chain, step by step" has these figures and more.

# %%
evals.Report(RUN)
