"""The shipped recipes: what each of them asks for. That every setting exists is tests/test_architecture.py's."""

from pathlib import Path

import polars as pl
import pytest

from sdpo_data import partition_pairs, sources
from sdpo_data.config import read_command, recipes
from sdpo_data.pairs import PairsConfig, collect_pairs
from sdpo_data.partition import PartitionConfig
from sdpo_data.score import ScoreConfig
from sdpo_data.tables import SCORES, SdpoError
from sdpo_train import TrainConfig

ROOT = Path(__file__).parent.parent
MODELS = {"pairs": PairsConfig, "score": ScoreConfig, "partition": PartitionConfig, "train": TrainConfig}
TALK = [{"role": "user", "content": "Name a fruit."}]


def read(recipe: str) -> dict:
    return read_command("recipe", "", "partition", MODELS, ["no/such/run", "--config", recipe]).settings


def test_the_readme_names_every_recipe():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = next(line for line in text.splitlines() if line.startswith("configs/"))
    assert set(recipes()) <= {word.strip(",") for word in listed.split()}


@pytest.mark.parametrize("recipe", recipes())
def test_what_was_scored_is_what_is_trained_on(recipe):
    settings = read(recipe)
    assert settings["train"].max_length == settings["score"].max_length


def test_the_papers_recipe_sees_its_two_sources_and_orders_them_by_reward_accuracy(monkeypatch):
    """UltraFeedback Cleaned has a column `source` of its own, which would cut it into six."""
    rows = {
        "Intel/orca_dpo_pairs": [
            {"system": "Be brief.", "question": "Name a fruit.", "chosen": "An apple.", "rejected": f"A stone. {i}"}
            for i in range(30)
        ],
        "allenai/ultrafeedback_binarized_cleaned": [
            {
                "prompt": f"Name a fruit. {i}", "prompt_id": str(i), "score_chosen": 8.0, "score_rejected": 2.0,
                "source": ["evol_instruct", "flan_v2_cot"][i % 2],
                "chosen": [*TALK, {"role": "assistant", "content": "An apple."}],
                "rejected": [*TALK, {"role": "assistant", "content": f"A stone. {i}"}],
                "messages": [*TALK, {"role": "assistant", "content": "An apple."}],
            }
            for i in range(30)
        ],
    }  # fmt: skip
    asked = []

    def hub_dataset(repo, config, split):
        asked.append((repo, split))
        return rows[repo]

    monkeypatch.setattr(sources, "hub_dataset", hub_dataset)
    settings = read("solar-10.7b")
    pairs = collect_pairs(settings["pairs"]).pairs
    assert asked == [("Intel/orca_dpo_pairs", "train"), ("allenai/ultrafeedback_binarized_cleaned", "train_prefs")]
    assert pairs["source"].n_unique() == 2
    margin = pl.when(pl.col("source").str.contains("orca")).then(1.0).otherwise(-1.0)  # Orca is the easy one
    known = {"model_key": pl.lit("s"), "dtype": pl.lit("float32"), "truncated": pl.lit(False)}
    known |= {"chosen_logp": -10 + margin, "rejected_logp": pl.lit(-10.0)}
    known |= {f"{name}_tokens": pl.lit(5, pl.Int64) for name in ("chosen", "rejected", "prompt")}
    known |= {name: pl.lit(None, SCORES[name]) for name in SCORES if name.startswith("against")}
    scores = pairs.with_columns(**known)
    partition = partition_pairs(scores.select(list(SCORES)), settings["partition"])
    parts = partition.group_by("source").agg("step").sort("source")
    assert [set(steps) for steps in parts["step"]] == [{1}, {2}]


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(SdpoError, match=r"There are: demo, paper, qwen-0\.5b, solar-10\.7b, study, zephyr-7b\."):
        read("solar")
