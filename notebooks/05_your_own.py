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
# # Your own pairs, your own model
#
# Pairs come as they are: a file in almost any form that trainers read, with columns by whatever names. A model is a
# folder that transformers loads, a hub id, or one already in memory. This page writes a small file and goes from there
# to a report. A dozen pairs **decide nothing**; replace two lines, and the rest stays as it is.

# %%
import json
from pathlib import Path

import polars as pl

import sdpo_data as data
import sdpo_eval as evals
import sdpo_train as train
from sdpo_data.assets import model_folder
from sdpo_eval import plots_chain, plots_pairs
from sdpo_eval.evidence import read_texts

Path("runs").mkdir(exist_ok=True)

# %% [markdown]
# ## A file of pairs
# The columns have names of their own, one pair stands there twice, one answer is empty, one pair has two equal answers,
# and more is wrong that one would have to look for: as files are.

# %%
rows = [
    ("geography", "What is the capital of France?", "Paris.", "I would rather not say."),
    ("geography", "Which ocean lies between Africa and Australia?", "The Indian Ocean.", "The Atlantic Ocean, I think."),
    ("geography", "Name a river in Egypt.", "The Nile.", "The Amazon."),
    ("geography", "Is Iceland an island?", "Yes, it is an island in the North Atlantic.", "No."),
    ("cooking", "How long do I boil an egg so that the yolk is hard?", "About ten minutes.", "One minute is enough."),
    ("cooking", "What makes bread rise?", "Yeast, which gives off carbon dioxide.", "Salt makes the bread rise."),
    ("cooking", "Can I freeze cooked rice?", "Yes. Let it cool quickly first, and use it within a month.", "Rice? No!"),
    ("cooking", "What is in a vinaigrette?", "Oil, vinegar, salt, and often mustard.", "Mostly flour."),
    ("cooking", "How do I sharpen a knife?", "Draw it over a whetstone at an angle of about 20 degrees.", "With a fork."),
    ("geography", "What is the capital of France?", "Paris.", "I would rather not say."),
    ("geography", "Is Iceland an island?", "No. ", "Yes,  it is an island in the North Atlantic."),
    ("geography", "What is the longest river of Europe?", "The Volga.", "<think>I am not sure.</think>The Nile."),
    ("cooking", "Does honey spoil?", "Hardly ever, if it is kept closed.<|im_end|>", "Yes, in a week.<|im_end|>"),
    ("cooking", "How long do I boil an egg so that the yolk is hard?", "About ten minutes.", "One minute is enough!"),
    ("cooking", "Is raw flour safe to eat?", "", "Yes."),
    ("geography", "Where is Lake Titicaca?", "In the Andes.", "In the Andes."),
]
names = ("topic", "question", "good", "bad")
file = Path("runs/my_pairs.jsonl")
_ = file.write_text("".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows))

# %% [markdown]
# ## Read them
# `columns` says what stands where, `prompt_format` that the model's chat template is to be put around it. What cannot be
# used is dropped with a reason and counted, never in silence; from the command line the dropped rows are kept in
# `dropped.parquet`.

# %%
columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "source": "topic"}
pairs = data.read_pairs(file, data.PairsConfig(columns=columns, prompt_format="messages"))
print(len(rows), "rows,", pairs.height, "pairs")
pairs.select("source", "prompt", "chosen", "rejected").head(3)

# %% [markdown]
# ## Ask the doctor
# What is wrong with pairs is best known before they are trained on: special tokens written into the text, answers that
# differ only in blanks, labels that contradict each other, thinking on one side alone, answers cut off, and whether the
# chosen answer is simply the longer one. Each mark is a check that found something.

# %%
MODEL = model_folder("embedded:smollm2-135m")  # a folder with config.json, weights and tokenizer: put yours here
findings = data.check_pairs(pairs, MODEL, max_length=256)
plots_pairs.plot_findings(findings)

# %%
findings.filter(pl.col("severity") != "fine").select("check", "severity", "pairs", "remedy")

# %% [markdown]
# What has one right repair is repaired: here the end of turn, which the chat template would have written a second time.

# %%
pairs = data.fix_pairs(pairs, MODEL).pairs
plots_pairs.plot_findings(data.check_pairs(pairs, MODEL, max_length=256))

# %% [markdown]
# The rest is yours to decide. This page leaves out the pair that stands there both ways round, and the one that thinks
# on one side alone.

# %%
texts = read_texts(pairs)
bad = texts.filter(pl.col("prompt").str.contains("Iceland") | pl.col("rejected").str.contains("<think>"))
pairs = pairs.join(bad, on="pair_id", how="anti")
data.check_pairs(pairs, MODEL, max_length=256)["severity"].value_counts()

# %% [markdown]
# ## Measure, with a difficulty of your own
# Any SQL over the columns of the scores is a definition, higher is harder. Here: how unsure the model is, from the
# difference of the answers' mean log-probabilities. Each line is a source; the colours are the steps, and where one ends
# and the next begins is the cut.

# %%
scores = data.score_pairs(pairs, MODEL, data.ScoreConfig(max_length=256))
mine = "-abs(chosen_logp / chosen_tokens - rejected_logp / rejected_tokens)"
part = data.partition_pairs(scores, data.PartitionConfig(parts=2, difficulty=mine))
plots_pairs.plot_difficulties(part, "nats per token")

# %% [markdown]
# ## Is it difficulty, or length?
# A difficulty made of log-probabilities may be a ruler in disguise. If the marks lie on a slope, "hard" means "the chosen
# answer is longer", and a curriculum by it is one by length. Hover over a mark to read its pair.

# %%
plots_pairs.plot_length_confound(scores, part, texts)

# %% [markdown]
# ## The parts, a card each
# What each step will train on: sizes, margins, how many pairs the model has right before any training, and the pairs at
# each part's edges. Reading these is the best check there is.

# %%
data.describe_partition(part, scores, pairs)

# %% [markdown]
# ## Train and report
# `run_sdpo` saves its inputs in the run folder, so the report finds them. Evaluating on H4 is
# `evals.evaluate(steps, evals.EvalConfig(budget="tiny"), out=RUN)`; it is left out here because it takes minutes, and
# the report says that it is missing and how to add it.

# %%
RUN = Path("runs/notebook")
settings = train.TrainConfig(lora_rank=8, learning_rate=1e-4, batch_pairs=3, warmup=0.0, max_length=256)
steps = train.run_sdpo(pairs, part, model=MODEL, out=RUN, scores=scores, config=settings)
plots_chain.plot_loss(data.open_run(RUN).metrics)

# %% [markdown]
# Each step begins at log 2: it starts from its own reference, and the two agree on every pair. The model of the last step is a folder that transformers loads like any other:

# %%
from transformers import AutoModelForCausalLM

aligned = AutoModelForCausalLM.from_pretrained(steps["model"][-1])
f"{sum(weight.numel() for weight in aligned.parameters()):,} weights"

# %%
evals.Report(RUN)
