"""Train every arm of RUN step by step, and show the steps.

Examples:
    python -m sdpo_train runs/a                                # stepwise DPO on the partition
    python -m sdpo_train runs/a --arms sdpo dpo --seeds 0 1    # with plain DPO beside it, two seeds
"""

from sdpo_data.config import read_command
from sdpo_data.console import command, print_table, say
from sdpo_data.models import model_key
from sdpo_data.tables import SdpoError
from sdpo_train.steps import TrainConfig, run_sdpo

SHOWN = [
    "arm",
    "seed",
    "step",
    "pairs",
    "updates",
    "first_loss",
    "last_loss",
    "max_start_gap",
    "margin_ref_mean",
    "seconds",
]


def main() -> None:
    """Train what is not trained yet."""
    call = read_command("python -m sdpo_train", __doc__, "train", {"train": TrainConfig})
    config = call.settings["train"]
    assert isinstance(config, TrainConfig)
    run, before = call.run, call.run.lineage
    scored = before.get("scores", {}).get("recipe", {}).get("model")
    if scored not in (None, model_key(call.model)):
        raise SdpoError(
            f"{run.path} was scored with a model of key {scored}, but {call.model} has {model_key(call.model)}. "
            "The reference model that cuts the data is the one training starts from: give the same --model."
        )
    steps = run_sdpo(run.pairs, run.partition, call.model, run.path, scores=run.scores, config=config, force=call.force)
    if run.lineage == before:
        say(f"up to date: {run.path / 'arms'}")
        return
    print_table(steps.select(SHOWN), f"{run.path / 'arms'} (losses and log-probabilities in nats)")


if __name__ == "__main__":
    command(main)
