"""Train every arm of RUN step by step, and show the steps.

Examples:
    python -m sdpo_train runs/a                                # stepwise DPO on the partition
    python -m sdpo_train runs/a --plan                         # what would run: arms, units, tokens, memory, time
    python -m sdpo_train runs/a --arms sdpo dpo --seeds 0 1    # with plain DPO beside it, two seeds
    python -m sdpo_train runs/a --unit sdpo/0/2                # one arm/seed/step: a job of a cluster's array
    accelerate launch -m sdpo_train runs/a                     # several GPUs

Ctrl-C, or a cluster's SIGTERM, ends after the update at hand with a checkpoint; the same command goes on.
Any other field of TRL's DPOConfig is set in config.yaml, in the section trl of train: `trl: {weight_decay: 0.01}`.
"""

from sdpo_data import workers
from sdpo_data.config import Settings, read_command
from sdpo_data.console import command, print_table, say
from sdpo_data.models import model_key
from sdpo_data.score import ScoreConfig
from sdpo_data.tables import SdpoError
from sdpo_train.arms import ARMS, CORE
from sdpo_train.config import TrainConfig
from sdpo_train.plan import print_plan
from sdpo_train.steps import run_sdpo

SHOWN = [
    *("arm", "seed", "step", "pairs", "updates", "first_loss", "last_loss", "max_start_gap", "margin_ref_mean"),
    *("seconds", "shared_from"),
]
SWITCHES = {"plan": "Show what would run, with what it costs, and run nothing.", "json": "With --plan: as JSON."}
HELP = f"""{__doc__}
Arms: {", ".join(ARMS)}.
core is {", ".join(CORE)}; all is every one; --plan says what each changes.
"""
OPTIONS = {"unit": "Only these units, as arm/seed/step."}


def main() -> None:
    """Train what is not trained yet."""
    sections: dict[str, type[Settings]] = {"train": TrainConfig, "score": ScoreConfig}
    call = read_command("python -m sdpo_train", HELP, "train", sections, switches=SWITCHES, options=OPTIONS)
    config, score = call.settings["train"], call.settings["score"]
    assert isinstance(config, TrainConfig)
    assert isinstance(score, ScoreConfig)
    if "json" in call.asked and "plan" not in call.asked:
        raise SdpoError("--json is how --plan is printed: give both, or neither to train.")
    run, before = call.run, call.run.lineage
    scored = before.get("scores", {}).get("recipe", {}).get("model")
    if scored not in (None, model_key(call.model)):
        raise SdpoError(
            f"{run.path} was scored with a model of key {scored}, but {call.model} has {model_key(call.model)}. "
            "The reference model that cuts the data is the one training starts from: give the same --model."
        )
    if "plan" in call.asked:
        print_plan(run, config, call.model, as_json="json" in call.asked)
        return
    steps = run_sdpo(
        run.pairs,
        run.partition,
        call.model,
        run.path,
        scores=run.scores,
        config=config,
        units=call.named["unit"],
        force=call.force,
        store=score.store,
        token_budget=score.token_budget,
    )
    if not workers.is_main():
        return
    call.save()
    if run.lineage == before:
        say(f"up to date: {run.path / 'arms'}")
        return
    print_table(steps.select(SHOWN), f"{run.path / 'arms'} (losses and log-probabilities in nats)")


if __name__ == "__main__":
    command(main)
