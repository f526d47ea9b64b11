"""What the report says: one function per question, evidence in, blocks out."""

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import polars as pl

from sdpo_data.tables import UNIT
from sdpo_eval import plots_pairs
from sdpo_eval.blocks import Block, Drawing, Estimate, Heading, Listing, Prose, Section, Table
from sdpo_eval.chain import tell_chain
from sdpo_eval.contrasts import TITLES
from sdpo_eval.detail import tell_arms, tell_changes, tell_factorial
from sdpo_eval.evidence import Evidence, comparable_results, last_metrics
from sdpo_eval.hardness import tell_difficulty
from sdpo_eval.verdict import name_command, say_factorial, score_rows, tell_h4, tell_verdict
from sdpo_eval.versus import merge_evidence, name_runs, number_blocks, tell_differences, tell_each


def write_sections(evidence: Evidence) -> list[Section]:
    """Tell what the run says, in the order a reader asks. What has nothing to say is left out."""
    return _written(
        [
            ("verdict", "Verdict", (tell_verdict,)),
            ("h4", "H4 by step and arm", (tell_arms, tell_h4, tell_factorial, tell_changes)),
            ("difficulty", "Difficulty: what is easy here, and what is hard", (tell_difficulty,)),
            ("chain", "The chain, step by step", (tell_chain,)),
            ("data", "The data: sources, drops, contamination", (_data,)),
            ("cost", "What it cost", (_cost,)),
            ("reproduce", "How to reproduce", (_reproduce,)),
        ],
        evidence,
    )


def compare_sections(runs: Sequence[Evidence]) -> list[Section]:
    """Tell what several runs say together: the first against each of the others."""
    merged = merge_evidence(runs)
    shared = _written(
        [
            ("verdict", "Verdict", (tell_verdict, lambda _: _say_factorials(runs))),
            ("h4", "H4 by run, step and arm", (tell_arms, tell_h4, lambda _: _tell_factorials(runs), tell_changes)),
            ("differences", "What tells the runs apart", (lambda _: tell_differences(runs),)),
            ("difficulty", "Difficulty, run by run", (lambda _: tell_each(runs, tell_difficulty),)),
            ("chain", "The chains, step by step", (tell_chain,)),
            ("data", "The data, run by run", (lambda _: tell_each(runs, _data),)),
            ("cost", "What they cost", (_cost,)),
        ],
        merged,
    )
    own: list[Block] = []
    for number, (name, run) in enumerate(zip(merged.runs, runs, strict=True), 1):
        own += [Heading(name), *number_blocks(_reproduce(run), number)]
    return [*shared, Section("reproduce", "How to reproduce", own)]


def _say_factorials(runs: Sequence[Evidence]) -> Iterator[Block]:
    for name, run in zip(name_runs(runs), runs, strict=True):
        yield from say_factorial(run, f"{name}: the")


def _tell_factorials(runs: Sequence[Evidence]) -> Iterator[Block]:
    """Tell the core factorial of each run that holds its four arms; what it is, once."""
    explained = None
    for number, (name, run) in enumerate(zip(name_runs(runs), runs, strict=True), 1):
        for block in number_blocks(tell_factorial(run), number):
            if isinstance(block, Prose):
                explained = block
            else:
                yield Heading(f"{name}: {block.text}") if isinstance(block, Heading) else block
    if explained:
        yield explained


Teller = Callable[[Evidence], Iterator[Block]]


def _written(told: list[tuple[str, str, tuple[Teller, ...]]], evidence: Evidence) -> list[Section]:
    sections = [
        Section(name, title, [block for tell in parts for block in tell(evidence)]) for name, title, parts in told
    ]
    return [section for section in sections if section.blocks]


def describe_run(evidence: Evidence) -> str:
    """Say in one line what run this is."""
    said = [str(evidence.settings["model"])] if "model" in evidence.settings else []
    if evidence.partition.height:
        parts, definition = evidence.partition["step"].n_unique(), evidence.partition["definition"][0]
        said.append(f"{evidence.partition['pair_id'].n_unique():,} pairs in {parts} parts by {definition}")
    for name in ("arm", "seed"):
        values = evidence.steps[name].unique().sort().to_list()
        if values:
            said.append(f"{name}{'s' if values[1:] else ''} {', '.join(map(str, values))}")
    if evidence.lineage:
        said.append(f"finished {max(made['finished'] for made in evidence.lineage.values())}")
    return " · ".join(said) or "Nothing has been made in this run folder yet."


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
    else:
        reasons = evidence.dropped.group_by("stage", "source", "reason").agg(rows=pl.len())
        ordered = reasons.sort("stage", "source", -pl.col("rows").cast(pl.Int64), "reason").to_dicts()
        title = "What was dropped, and why; dropped.parquet keeps every row"
        yield Table("dropped", title, ordered, folded=len(ordered) > 12)
    yield Heading("What is wrong with the pairs?")
    yield from _findings(evidence)
    yield Heading("Do the pairs give away what is asked?")
    yield from _contamination(evidence)


def _findings(evidence: Evidence) -> Iterator[Block]:
    if evidence.findings is None:
        yield name_command(evidence, "The pairs have not been checked", "sdpo_data.pairs", "--check")
        return
    asked, bias = evidence.findings[:-1], evidence.findings.row(-1, named=True)
    found = asked.filter(pl.col("severity") != "fine")
    fine = ", ".join(asked.filter(severity="fine")["check"])
    if found.height:
        yield Drawing("findings", lambda: plots_pairs.plot_findings(found))
        rows = [row | {"share": Estimate(100 * row["share"])} for row in found.drop("pair_id").iter_rows(named=True)]
        yield Table("findings", "What pairs have, and what to do", rows, {"share": "%"}, folded=len(rows) > 6)
    yield Prose(f"Asked and not found: {fine or 'nothing'}.")
    yield Prose(f"{bias['check'].capitalize()}: {bias['remedy']}.")


def _contamination(evidence: Evidence) -> Iterator[Block]:
    found = evidence.contamination
    if found is None:
        what = "The pairs have not been matched against what is evaluated (needs python -m sdpo_eval RUN --documents)"
        yield name_command(evidence, what, "sdpo_data.decontaminate")
        return
    if found.is_empty():
        yield Prose(f"No evaluated question stands in any of {evidence.pairs.height:,} pairs, by any of the rules.")
    else:
        dropped = evidence.dropped.filter(stage="decontaminate").select("pair_id", "source")
        known = pl.concat([evidence.pairs.select("pair_id", "source"), dropped]).unique("pair_id")
        counts = found.join(known, on="pair_id", how="left").group_by("source", "task", "rule")
        rows = counts.agg(
            pairs=pl.col("pair_id").n_unique(), items=pl.col("item_id").n_unique(), one_match=pl.col("matched").first()
        ).sort("source", "task", "rule", nulls_last=True)
        rows = rows.with_columns(pl.col("task").replace(TITLES))
        yield Table("contamination", "Pairs that hold an evaluated question, by rule", rows.to_dicts())
        dropped_said = (
            f"{dropped.height:,} pairs were taken out for it." if dropped.height else "None was taken out for it."
        )
        yield Prose(dropped_said)
    clean = comparable_results(evidence.results, "clean")
    if clean.height:
        title = "Scores without the questions that the training pairs give away"
        yield Table("clean_scores", title, score_rows(clean))


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
    if evidence.scores.height:
        yield from _floor(evidence.scores)
    if evidence.steps.height:
        rate = {"tokens_per_second": (pl.col("tokens") / pl.col("seconds")).round().cast(pl.Int64)}
        shared = ["shared_from"] if evidence.steps["shared_from"].drop_nulls().len() else []
        steps = evidence.steps.select(
            *UNIT, "pairs", "tokens", "updates", pl.col("seconds").round().cast(pl.Int64), **rate
        ).hstack(evidence.steps.select(shared))
        title = "Training; tokens are of prompts, chosen and rejected answers, once per epoch"
        if shared:
            title += "; a shared step was computed once, and its seconds are those of the step it came from"
        yield Table("steps", title, steps.to_dicts(), folded=steps.height > 24)
    yield from _phases(evidence)
    yield from _speed(evidence)


def _phases(evidence: Evidence) -> Iterator[Block]:
    """Show where the time of each step went, and the most memory it took, as training logged them (cost/*)."""
    if evidence.steps.is_empty():
        return
    logged = last_metrics(evidence.metrics).filter(pl.col("name").str.contains("memory|^cost/|flops|mfu"))
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for arm, seed, step, name, value, _ in logged.rows():
        cells = rows.setdefault((arm, seed, step), dict(zip(UNIT, (arm, seed, step), strict=True)))
        cells[name.removeprefix("cost/").removesuffix("_seconds").removesuffix("_mib")] = round(value)
    if rows:
        heads = [*UNIT, "reference", "train", "diagnose", "peak_memory"]
        heads += sorted({name for cells in rows.values() for name in cells} - {*heads})
        ordered = [{name: cells.get(name) for name in heads} for cells in rows.values()]
        units = {"reference": "s", "train": "s", "diagnose": "s", "peak_memory": "MiB"}
        title = (
            "Time of each step's phases, and memory: reference loads models and scores under the reference what is not "
            "scored yet, diagnose scores the step's pairs again"
        )
        yield Table("phases", title, ordered, units, folded=len(rows) > 12)
    if not any("peak_memory" in row for row in rows.values()):
        yield Prose("Peak memory was not recorded by this run.")


def _speed(evidence: Evidence) -> Iterator[Block]:
    """Set the time of scoring and of each step's updates against the fewest tokens that they can compute."""
    rows = []
    scored = evidence.lineage.get("scores", {}).get("seconds")
    if scored and evidence.scores.height:
        rows.append(_at_speed("scoring all pairs", scored, 1, evidence.scores))
    trained = evidence.metrics.filter(name="cost/train_seconds").select(*UNIT, "value").rows()
    seconds = {row[:3]: row[3] for row in trained}
    for row in evidence.steps.filter(pl.col("shared_from").is_null()).iter_rows(named=True):
        unit = {name: row[name] for name in UNIT}
        took = seconds.get(tuple(unit.values()))
        own = evidence.references.filter(**unit)
        if took and own.height:
            passes = row["tokens"] / _tokens(own)[1]
            rows.append(_at_speed(f"updates of {row['arm']}/{row['seed']}/{row['step']}", took, passes, own))
    if not rows:
        return
    title = "Tokens a second, and the floor: each prompt of the pairs once, each answer once, in every epoch"
    yield Table("speed", title, rows, {"seconds": "s"}, folded=len(rows) > 12)
    yield Prose(
        "Tokens are counted from the tables: a pair's prompt once and both its answers, for each epoch. Not recorded, "
        "and so in no number here: the tokens that forward passes really computed, with padding, recomputation and "
        "the backward pass. Scoring includes loading the model; pairs already in the score store take no time and make "
        "it look faster."
    )


def _at_speed(what: str, seconds: float, passes: float, scores: pl.DataFrame) -> dict[str, Any]:
    floor, together, _ = (passes * tokens for tokens in _tokens(scores))
    return {
        "what": what, "pairs": scores.height, "seconds": round(seconds, 1), "tokens": round(together),
        "tokens_per_second": round(together / seconds), "floor_tokens": round(floor),
        "floor_tokens_per_second": round(floor / seconds), "times_the_floor": Estimate(together / floor, digits=2),
    }  # fmt: skip


def _tokens(scores: pl.DataFrame) -> tuple[int, int, int]:
    """Count what one pass over the pairs takes: every prompt once, every pair's once, every answer's own prompt."""
    answers = int(scores.select(pl.col("chosen_tokens").sum() + pl.col("rejected_tokens").sum()).item())
    prompts = int(scores["prompt_tokens"].sum())
    shared = int(scores.group_by("prompt_id").agg(pl.col("prompt_tokens").max())["prompt_tokens"].sum())
    return shared + answers, prompts + answers, 2 * prompts + answers


def _floor(scores: pl.DataFrame) -> Iterator[Block]:
    """Set what one scoring pass costs beside the least it can cost: each prompt once, each answer once."""
    floor, together, apart = _tokens(scores)
    ways = {
        "every answer with its own prompt": apart,
        "every pair with its prompt once": together,
        "every prompt once (the engine's floor, or a little above it)": floor,
    }
    rows = [{"way": way, "tokens": n, "times_the_floor": Estimate(n / floor, digits=2)} for way, n in ways.items()]
    yield Table("floor", "What one pass over the pairs takes, without padding", rows)


STAGES = {
    "pairs": "sdpo_data.pairs {run}", "fix": "sdpo_data.pairs {run} --fix",
    "findings": "sdpo_data.pairs {run} --check", "documents": "sdpo_eval {run} --documents",
    "contamination": "sdpo_data.decontaminate {run}", "scores": "sdpo_data.score {run}",
    "partition": "sdpo_data.partition {run}", "arms": "sdpo_train {run}", "held_out_scores": "sdpo_eval.held_out {run}",
    "items": "sdpo_eval {run}",
}  # fmt: skip
"""Stage of lineage.json -> the command that makes it, in the order in which they can be run."""


def list_commands(evidence: Evidence) -> list[str]:
    """List the commands that make the run again from its config.yaml; `partition` makes pairs and scores itself."""
    done = {unit.split("/")[0] for unit in evidence.lineage}
    if "partition" in done:
        done -= {"scores"} if done & {"fix", "contamination"} else {"pairs", "scores"}
    run = shlex.quote(str(evidence.path))
    return [f"python -m {STAGES[stage].format(run=run)}" for stage in STAGES if stage in done] + [
        f"python -m sdpo_eval.report {run}"
    ]


def _reproduce(evidence: Evidence) -> Iterator[Block]:
    lineage = evidence.lineage
    yield from (Prose(sentence, loud=True) for sentence in _caveats(evidence))
    title = "Commands, for a new folder that holds nothing but the config.yaml below"
    yield Listing(title, "\n".join(list_commands(evidence)), folded=False)
    others = sorted({unit.split("/")[0] for unit in lineage} - {*STAGES, "results"})
    if others:
        yield Prose(f"Made beside them, by commands that this list does not know: {', '.join(others)}.")
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
        yield Table("model_keys", "Weights, by the hash of what they hold", keys, folded=True)
    sums = {file: sum_ for unit in lineage.values() for file, sum_ in unit["sha256"].items()}
    if sums:
        yield Listing("sha256 of the tables", "\n".join(f"{sum_}  {file}" for file, sum_ in sorted(sums.items())))


def _caveats(evidence: Evidence) -> Iterator[str]:
    """Say what was limited, and what a second run could not be sure to find again."""
    recipe = evidence.lineage.get("pairs", {}).get("recipe", {})
    if recipe.get("limit"):
        yield f"Limited data: at most {recipe['limit']:,} pairs of each source were taken."
    if recipe.get("caps"):
        caps = ", ".join(f"{most:,} of {source}" for source, most in recipe["caps"].items())
        yield f"Limited data: at most {caps} were taken (pairs.caps)."
    if recipe.get("weights"):
        weights = ", ".join(f"{source} {weight:g}" for source, weight in recipe["weights"].items())
        yield f"Mixed data: of the sources no more than these proportions allow was taken (pairs.weights): {weights}."
    commits = {made["commit"] for made in evidence.lineage.values()}
    if None in commits:
        yield "Not all stages ran in a git checkout: of their code only the version is known."
    if len(commits - {None}) > 1:
        yield f"The stages were made at {len(commits - {None})} different commits."
    score = evidence.settings.get("score")
    second = score.get("against") if isinstance(score, dict) else None
    for name in dict.fromkeys([evidence.settings.get("model"), second, *recipe.get("source", [])]):
        if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", name):
            yield f"Unpinned: {name} is a hub id or a folder, which may change; its hash tells."
