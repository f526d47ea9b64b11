"""What the report says: one function per question, evidence in, blocks out."""

import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import polars as pl

from sdpo_data.describe import length_correlation
from sdpo_data.difficulty import Difficulty, difficulty_named
from sdpo_data.tables import TOKEN_DIFFERENCE, SdpoError
from sdpo_eval import plots
from sdpo_eval.blocks import Block, Drawing, Estimate, Listing, Prose, Quotes, Section, Table, write_number
from sdpo_eval.detail import tell_changes, tell_held_out
from sdpo_eval.evidence import UNIT, Evidence, edge_pairs, measure_references, summarise_margins
from sdpo_eval.plots import LOG_2
from sdpo_eval.verdict import name_command, tell_h4, tell_verdict


def write_sections(evidence: Evidence) -> list[Section]:
    """Tell what the run says, in the order a reader asks. What has nothing to say is left out."""
    told: list[tuple[str, str, Callable[[Evidence], Iterator[Block]]]] = [
        ("verdict", "Verdict", tell_verdict),
        ("h4", "H4 by step and task", tell_h4),
        ("changes", "What changed, question by question", tell_changes),
        ("held_out", "Held-out pairs by step", tell_held_out),
        ("reference", "What the references think of the pairs", _reference),
        ("training", "Training, step by step", _training),
        ("parts", "The parts, from easy to hard", _parts),
        ("data", "Pairs kept, held out and dropped", _data),
        ("cost", "What it cost", _cost),
        ("reproduce", "How to reproduce", _reproduce),
    ]
    sections = [Section(name, title, list(tell(evidence))) for name, title, tell in told]
    return [section for section in sections if section.blocks]


def describe_run(evidence: Evidence) -> str:
    """Say in one line what run this is."""
    said = [str(evidence.settings["model"])] if "model" in evidence.settings else []
    if evidence.partition.height:
        parts, definition = evidence.partition["step"].n_unique(), evidence.partition["definition"][0]
        said.append(f"{evidence.partition.height:,} pairs in {parts} parts by {definition}")
    for name in ("arm", "seed"):
        values = evidence.steps[name].unique().sort().to_list()
        if values:
            said.append(f"{name}{'s' if values[1:] else ''} {', '.join(map(str, values))}")
    if evidence.lineage:
        said.append(f"finished {max(made['finished'] for made in evidence.lineage.values())}")
    return " · ".join(said) or "Nothing has been made in this run folder yet."


def _reference(evidence: Evidence) -> Iterator[Block]:
    if evidence.references.is_empty():
        return
    measured = measure_references(evidence)
    yield Drawing("reference_margins", lambda: plots.plot_reference_margins(measured))
    rows = [
        {name: row[name] for name in UNIT} | {"judged_by": row["reference"]} | _judgement(row)
        for row in measured.iter_rows(named=True)
    ]
    yield Table(
        "references", "Each step's pairs, judged by the base model and by the step's own reference", rows, JUDGED
    )
    yield Prose(
        "Reward accuracy is the share of pairs whose chosen answer the judge finds likelier than the rejected one: the "
        "whole answers, or per token, which leans less on their lengths. Standard errors cluster pairs by prompt."
    )


JUDGED = {"mean_margin": "nats", "reward_accuracy": "%", "accuracy_per_token": "%"}


def _judgement(row: dict[str, Any]) -> dict[str, Estimate]:
    return {
        "mean_margin": Estimate(row["mean"], row["stderr"], row["n"]),
        "reward_accuracy": Estimate(row["accuracy"], row["accuracy_stderr"], row["n"]),
        "accuracy_per_token": Estimate(row["per_token"], row["per_token_stderr"], row["n"]),
    }


def _training(evidence: Evidence) -> Iterator[Block]:
    steps, metrics = evidence.steps, evidence.metrics
    if steps.is_empty():
        yield name_command(evidence, "No step has been trained yet", "sdpo_train")
        return
    if "loss" in metrics["name"]:
        yield Drawing("loss", lambda: plots.plot_loss(metrics))
    if "rewards/margins" in metrics["name"]:
        yield Drawing("reward_margins", lambda: plots.plot_reward_margins(metrics))
    for _, chain in steps.group_by("arm", "seed", maintain_order=True):
        yield Prose(_hand_off(chain))
    rows = [
        {name: row[name] for name in UNIT}
        | {"starts_from": _weights(steps, row, "start_key"), "held_to": _weights(steps, row, "reference_key")}
        | {name: row[name] for name in ("max_start_gap", "first_loss")}
        | {"off_log_2": row["first_loss"] - LOG_2, "last_loss": row["last_loss"]}
        for row in steps.iter_rows(named=True)
    ]
    units = dict.fromkeys(["max_start_gap", "first_loss", "off_log_2", "last_loss"], "nats")
    yield Table("hand_off", "The hand-off from step to step; weights by place and hash", rows, units)


def _hand_off(chain: pl.DataFrame) -> str:
    """Say of one arm and seed whether its chain of weights is unbroken, going by their hashes."""
    rows, written = list(chain.iter_rows(named=True)), dict(chain.select("step", "model_key").rows())
    own = all(row["start_key"] == row["reference_key"] for row in rows)
    linked = own and all(row["start_key"] == written.get(row["step"] - 1) for row in rows[1:])
    if not linked:
        text = "not a chain in which each step starts from, and is held to, the step before; see the table"
    elif rows[1:]:
        text = "each step started from, and was held to, the very weights that the step before wrote"
    else:
        text = f"one step, started from and held to {_weights(chain, rows[0], 'start_key')}"
    gaps = [row["max_start_gap"] for row in rows if row["max_start_gap"] is not None]
    if gaps:
        text += (
            f". Before the first updates, answers checked differed from their reference by {write_number(max(gaps))} "
        )
        text += "nats of log-probability at most"
    return f"{rows[0]['arm']}, seed {rows[0]['seed']}: {text}."


def _weights(steps: pl.DataFrame, row: dict[str, Any], key: str) -> str:
    """Name weights by where the row's own chain wrote them, and by their hash."""
    chain = steps.filter(arm=row["arm"], seed=row["seed"])
    written = {k: f"step {step}" for step, k in chain.select("step", "model_key").rows()}
    return f"{({chain['start_key'][0]: 'base'} | written).get(row[key], 'other weights')} {row[key][:8]}"


def _parts(evidence: Evidence) -> Iterator[Block]:
    partition, scores = evidence.partition, evidence.scores
    if partition.is_empty():
        yield name_command(evidence, "The pairs have not been cut into parts yet", "sdpo_data.partition")
        return
    definition = partition["definition"][0]
    known = _definition(definition)
    yield Table("sizes", "Sizes; tokens are sums over the part", _size_rows(partition, scores))
    unit = f" [{known.unit}]" if known else ""
    title = f"Difficulty: {definition}{unit}, higher is harder; and what the base model thinks"
    yield Table("difficulty", title, _difficulty_rows(evidence), JUDGED)
    if scores.height:
        yield Drawing("margin_curves", lambda: plots.plot_margin_curves(scores, partition))
        yield Drawing("length_confound", lambda: plots.plot_length_confound(scores, partition))
    if known and scores.height:
        rho, n = length_correlation(scores, definition)
        yield Prose(
            f"Rank correlation (Spearman) of {definition} with how much longer the chosen answer is: {rho:+.2f} "
            f"(n = {n:,}). Near +1 or −1 the order of the pairs is mostly an order of lengths."
        )
    if evidence.pairs.height:
        for (step,), part in edge_pairs(evidence).group_by("step", maintain_order=True):
            yield Quotes(f"Step {step}: its easiest, median and hardest pair", part.to_dicts())


def _definition(name: str) -> Difficulty | None:
    try:
        return difficulty_named(name)
    except SdpoError:  # a partition from elsewhere may be ranked by what only its maker knows
        return None


def _size_rows(partition: pl.DataFrame, scores: pl.DataFrame) -> list[dict[str, Any]]:
    known = partition.join(scores.drop("source"), on="pair_id", how="left")
    tokens = {f"{name}_tokens": pl.col(f"{name}_tokens").sum() for name in ("prompt", "chosen", "rejected")}
    longer = {"chosen_is_longer": (TOKEN_DIFFERENCE > 0).sum(), "truncated": pl.col("truncated").sum()}
    sizes = known.group_by("step").agg(pairs=pl.len(), **(tokens | longer if scores.height else {}))
    counts = partition.group_by("step", "source").agg(n=pl.len()).sort("n", "source", descending=[True, False])
    sources = counts.group_by("step", maintain_order=True).agg(sources=pl.format("{} {}", "source", "n").str.join(", "))
    return sizes.join(sources, on="step").sort("step").to_dicts()


def _difficulty_rows(evidence: Evidence) -> list[dict[str, Any]]:
    scores = evidence.scores.join(evidence.partition.select("pair_id", "step"), on="pair_id")
    places = {"easiest": 0.0, "25_%": 0.25, "median": 0.5, "75_%": 0.75, "hardest": 1.0}
    shares = {name: pl.col("difficulty").quantile(share, "linear") for name, share in places.items()}
    table = evidence.partition.group_by("step").agg(**shares).sort("step")
    measured = summarise_margins(scores, ["step"]).iter_rows(named=True)
    judged = {row["step"]: _judgement(row) for row in measured}
    return [row | judged.get(row["step"], {}) for row in table.iter_rows(named=True)]


def _data(evidence: Evidence) -> Iterator[Block]:
    if evidence.pairs.is_empty():
        yield name_command(evidence, "No pairs have been read yet", "sdpo_data.pairs")
        return
    kept = evidence.pairs.group_by("source").agg(pairs=pl.len(), prompts=pl.col("prompt_id").n_unique())
    for name, table in (("held_out", evidence.held_out), ("dropped", evidence.dropped)):
        kept = kept.join(table.group_by("source").agg(pl.len().alias(name)), on="source", how="full", coalesce=True)
    yield Table("sources", "Pairs of each source", kept.fill_null(0).sort("source").to_dicts())
    if evidence.dropped.is_empty():
        yield Prose("Nothing was dropped.")
        return
    reasons = evidence.dropped.group_by("stage", "source", "reason").agg(rows=pl.len())
    ordered = reasons.sort("stage", "source", -pl.col("rows").cast(pl.Int64), "reason")
    yield Table("dropped", "What was dropped, and why; dropped.parquet keeps every row", ordered.to_dicts())


def _cost(evidence: Evidence) -> Iterator[Block]:
    stages: dict[str, list[dict[str, Any]]] = {}
    for unit, made in evidence.lineage.items():
        stages.setdefault(unit.split("/")[0], []).append(made)
    rows = [
        {
            "stage": stage, "units": len(units), "seconds": round(sum(unit["seconds"] for unit in units)),
            "last_finished": max(unit["finished"] for unit in units),
        }
        for stage, units in stages.items()
    ]  # fmt: skip
    if rows:
        yield Table("seconds", "Wall time of each stage", rows)
    if evidence.steps.height:
        rate = {"tokens_per_second": (pl.col("tokens") / pl.col("seconds")).round().cast(pl.Int64)}
        steps = evidence.steps.select(
            *UNIT, "pairs", "tokens", "updates", pl.col("seconds").round().cast(pl.Int64), **rate
        )
        yield Table("steps", "Training", steps.to_dicts())


def _reproduce(evidence: Evidence) -> Iterator[Block]:
    lineage, run = evidence.lineage, shlex.quote(str(evidence.path))
    yield from (Prose(sentence, loud=True) for sentence in _caveats(evidence))
    modules = {"partition": "sdpo_data.partition", "arms": "sdpo_train", "items": "sdpo_eval"}
    modules["held_out_scores"] = "sdpo_eval.held_out"
    done = [module for stage, module in modules.items() if any(unit.split("/")[0] == stage for unit in lineage)]
    commands = [f"python -m {module} {run}" for module in [*done, "sdpo_eval.report"]]
    yield Listing(
        "Commands, for a new folder that holds nothing but the config.yaml below", "\n".join(commands), folded=False
    )
    if evidence.config:
        yield Listing("config.yaml", evidence.config)
    if lineage:
        made = lineage.values()
        versions = {f"{name} {version}" for unit in made for name, version in unit["versions"].items()}
        times = sorted(unit["finished"] for unit in made)
        rows = [
            {"what": "time", "value": f"{times[0]} to {times[-1]}"},
            {"what": "host", "value": ", ".join(sorted({unit["host"] for unit in made}))},
            {"what": "git commit", "value": ", ".join(sorted({unit["commit"] or "none" for unit in made}))},
            {"what": "versions", "value": ", ".join(sorted(versions))},
        ]
        yield Table("made_with", "Made with", rows)
    keys = [{"model": "base", "key": key} for key in evidence.scores["model_key"].unique().sort()]
    keys += [{"model": row["model"], "key": row["model_key"]} for row in evidence.steps.iter_rows(named=True)]
    if keys:
        yield Table("model_keys", "Weights, by the hash of what they hold", keys)
    sums = {file: sum_ for unit in lineage.values() for file, sum_ in unit["sha256"].items()}
    if sums:
        yield Listing("sha256 of the tables", "\n".join(f"{sum_}  {file}" for file, sum_ in sorted(sums.items())))


def _caveats(evidence: Evidence) -> Iterator[str]:
    """Say what was limited, and what a second run could not be sure to find again."""
    recipe = evidence.lineage.get("pairs", {}).get("recipe", {})
    if recipe.get("limit"):
        yield f"Limited data: at most {recipe['limit']:,} pairs of each source were taken."
    commits = {made["commit"] for made in evidence.lineage.values()}
    if None in commits:
        yield "Not all stages ran in a git checkout: of their code only the version is known."
    if len(commits - {None}) > 1:
        yield f"The stages were made at {len(commits - {None})} different commits."
    for name in [evidence.settings.get("model"), *recipe.get("source", [])]:
        if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", name):
            yield f"Unpinned: {name} is a hub id or a folder, which may change; its hash tells."
