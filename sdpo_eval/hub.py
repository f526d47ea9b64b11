"""A run's scores as the Hub reads them: the `model-index` of a model card."""

import io
from typing import Any

import polars as pl
import ruamel.yaml

from sdpo_eval.evidence import comparable_results, find_lasts
from sdpo_eval.h4 import MEAN, TASKS

TITLES = {MEAN: "H4, the mean of ARC-Challenge, HellaSwag, MMLU and TruthfulQA"}


def write_model_index(results: pl.DataFrame, name: str) -> str:
    """Write the scores of every arm's and seed's last model as the YAML that stands in front of a model card.

    Args:
        results: RESULTS frame.
        name: of the run; a model is called name, arm, seed and step.

    Returns:
        YAML with one key, `model-index`, one entry a model; an empty list where none was evaluated.
    """
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    shown, index = comparable_results(results), []
    for arm, seed, step in find_lasts(shown):
        own = shown.filter(arm=arm, seed=seed, step=step)
        entries = []
        for row in own.iter_rows(named=True):
            task = TASKS.get(row["task"])
            about: dict[str, Any] = {"dataset_type": row["task"], "dataset_name": TITLES.get(row["task"], row["task"])}
            if task:
                about = {"dataset_type": task.hub[0], "dataset_name": task.title, "dataset_config": task.hub[1]}
                about |= {"dataset_split": task.split, "dataset_args": {"num_few_shot": task.shots}}
            worth = {"stderr": row["stderr"] and round(row["stderr"], 2), "questions": row["n"], "of": row["n_full"]}
            entry = EvalResult(
                task_type="text-generation",
                metric_type=row["metric"],
                metric_value=round(row["value"], 2),
                metric_args=worth | {"protocol": row["protocol"]},  # without it nobody can tell what the value is worth
                **about,
            )
            entries.append(entry)
        index += eval_results_to_model_index(f"{name} {arm} seed {seed} step {step}", entries)
    text = io.StringIO()
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump({"model-index": index}, text)
    return text.getvalue()
