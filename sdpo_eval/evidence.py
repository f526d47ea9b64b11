"""What the report rests on: a run folder's tables, and the numbers that are drawn from them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import ruamel.yaml

from sdpo_data.config import read_section
from sdpo_data.difficulty import difficulty_named
from sdpo_data.run import Run
from sdpo_data.tables import (
    CONTAMINATION,
    DROPPED,
    FINDINGS,
    ITEMS,
    LOGP_MARGIN,
    MESSAGES,
    METRICS,
    PAIRS,
    PARTITION,
    RESULTS,
    SCORES,
    STEPS,
    UNIT,
    SdpoError,
    check,
)
from sdpo_eval.arms import contrast_factorial, find_chains
from sdpo_eval.contrasts import CompareConfig, Side, contrast_models
from sdpo_eval.margins import HELD_OUT_SCORES, as_documents, as_items, read_held_out, summarise_margins

Model = tuple[str, int, int]
"""arm, seed, step; step 0 is the base model."""


@dataclass(frozen=True)
class Evidence:
    """Everything a report is made from. A table whose command has not run yet is empty."""

    path: Path
    config: str
    settings: dict[str, Any]
    """What config.yaml says."""
    lineage: dict[str, Any]
    pairs: pl.DataFrame
    held_out: pl.DataFrame
    dropped: pl.DataFrame
    contamination: pl.DataFrame | None
    """None where the pairs were not matched against what is evaluated."""
    findings: pl.DataFrame | None
    """None where the pairs were not checked."""
    scores: pl.DataFrame
    partition: pl.DataFrame
    results: pl.DataFrame
    steps: pl.DataFrame
    metrics: pl.DataFrame
    items: pl.DataFrame
    references: pl.DataFrame
    """SCORES of every step's pairs under that step's reference, with arm, seed and step."""
    orders: pl.DataFrame
    """arm and the PARTITION that it trained on, in the seed that got furthest."""
    held_out_scores: pl.DataFrame
    documents: pl.DataFrame
    """DOCUMENTS of the questions; the prompts of held-out pairs are among them."""
    compare: CompareConfig
    runs: tuple[str, ...] = ()
    """Names of the runs that this was merged of, see versus.py."""

    def recipe(self, arm: str, seed: int, step: int) -> dict[str, Any]:
        """Give the settings and the weights' keys that a step was trained by, from the lineage; empty if unknown."""
        run, _, name = arm.rpartition(": ")
        unit = f"{f'{run}: ' if run else ''}arms/{name}/seed_{seed}/step_{step}"
        return self.lineage.get(unit, {}).get("recipe", {})

    @cached_property
    def answers(self) -> pl.DataFrame:
        """All that models are compared by: answers under the protocols of the results shown, and held-out pairs."""
        shown = comparable_results(self.results)
        items = self.items.join(shown, on=[*UNIT, "protocol", "task"], how="semi")
        return pl.concat([items, as_items(self.held_out_scores)])

    @cached_property
    def contrasts(self) -> pl.DataFrame:
        """What `pair_sides` sets against each other, judged by scores: a CONTRASTS frame."""
        return contrast_models(pair_sides(self), self.compare)

    @cached_property
    def factorial(self) -> pl.DataFrame:
        """The effects of order and of reference, and their interaction: see `contrast_factorial`."""
        return contrast_factorial(self.answers, self.compare)


def read_evidence(run: Run) -> Evidence:
    """Read what a run folder holds so far.

    Raises:
        SdpoError: a table cannot be read, or is not what its schema says.
    """

    def there(name: str) -> bool:
        return (run.path / f"{name}.parquet").exists()

    def table(name: str, schema: pl.Schema) -> pl.DataFrame:
        return check(run.read(name), schema, f"{name}.parquet") if there(name) else schema.to_frame()

    held_out, held_out_scores = table("held_out", PAIRS), read_held_out(run)
    config = (run.path / "config.yaml").read_text("utf-8") if (run.path / "config.yaml").exists() else ""
    return Evidence(
        path=run.path,
        config=config,
        settings=_settings(run.path / "config.yaml", config),
        lineage=run.lineage,
        pairs=table("pairs", PAIRS),
        held_out=held_out,
        dropped=table("dropped", DROPPED),
        contamination=table("contamination", CONTAMINATION) if there("contamination") else None,
        findings=table("findings", FINDINGS) if there("findings") else None,
        scores=table("scores", SCORES),
        partition=table("partition", PARTITION),
        results=table("results", RESULTS),
        steps=check(run.steps, STEPS, "steps.parquet"),
        metrics=check(run.metrics, METRICS, "metrics.parquet"),
        items=check(run.items, ITEMS, "items"),
        references=_references(run),
        orders=_orders(run),
        held_out_scores=held_out_scores,
        documents=pl.concat([run.questions, as_documents(held_out, held_out_scores)]),
        compare=read_section(run, "compare", CompareConfig),
    )


def _settings(path: Path, text: str) -> dict[str, Any]:
    try:
        settings = ruamel.yaml.YAML(typ="safe").load(text) or {}
    except ruamel.yaml.error.YAMLError as error:
        raise SdpoError(f"{path} is not YAML: {' '.join(str(error).split())}. Mend it.") from None
    if not isinstance(settings, dict):
        raise SdpoError(f"{path} holds {type(settings).__name__}, expected sections such as 'partition:'. Mend it.")
    return settings


def _references(run: Run) -> pl.DataFrame:
    frames = [HELD_OUT_SCORES.to_frame()]
    for arm, seed, step in run.steps.select(UNIT).rows():
        path = run.path / f"arms/{arm}/seed_{seed}/step_{step}/reference_scores.parquet"
        if path.exists():
            scores = check(run.read(str(path.relative_to(run.path).with_suffix(""))), SCORES, str(path))
            unit = {"arm": pl.lit(arm), "seed": pl.lit(seed, pl.Int64), "step": pl.lit(step, pl.Int64)}
            frames.append(scores.with_columns(**unit).select(*UNIT, *SCORES))
    return pl.concat(frames)


def _orders(run: Run) -> pl.DataFrame:
    frames = [PARTITION.to_frame().insert_column(0, pl.Series("arm", [], pl.String))]
    for arm, seed in find_chains(run.steps):
        path = run.path / f"arms/{arm}/seed_{seed}/partition.parquet"
        if path.exists():
            own = check(run.read(str(path.relative_to(run.path).with_suffix(""))), PARTITION, str(path))
            frames.append(own.select(pl.lit(arm).alias("arm"), *PARTITION))
    return pl.concat(frames)


def comparable_results(results: pl.DataFrame, subset: str = "all") -> pl.DataFrame:
    """Keep one protocol per task, the one most models were asked by: others must not share its column."""
    results = results.filter(pl.col("subset") == subset)
    asked = results.group_by("task", "protocol").agg(models=pl.len()).sort("models", "protocol", descending=True)
    return results.join(asked.unique("task", keep="first"), on=["task", "protocol"], how="semi", maintain_order="left")


def find_base(models: pl.DataFrame) -> Model | None:
    rows = models.filter(arm="base", step=0).select(UNIT).rows()
    return rows[0] if rows else None


def find_lasts(models: pl.DataFrame) -> list[Model]:
    """Find the last model of every arm and seed, sdpo's first, in RESULTS or in answers."""
    others = models.filter(pl.col("arm") != "base").group_by("arm", "seed").agg(pl.col("step").max())
    return others.sort(~pl.col("arm").str.contains("(^|: )sdpo$"), "arm", "seed").select(UNIT).rows()


def pair_sides(evidence: Evidence) -> list[tuple[Side, Side]]:
    """Set every arm's last models against the base model, and sDPO's against every other arm's.

    Of merged runs, the arms of the first are set against those of the same name in the others instead.

    Seeds that end at different steps make different sides; sides of several seeds each, none of
    them shared, are not set against each other.
    """
    answers = evidence.answers

    def side(arm: str, step: int, seeds: list[int]) -> Side:
        own = answers.filter(pl.col("arm") == arm, pl.col("step") == step, pl.col("seed").is_in(seeds))
        return Side(f"{arm} step {step}" if step else arm, arm, own)

    ends: dict[tuple[str, int], list[int]] = {}
    for arm, seed, step in find_lasts(answers):
        ends.setdefault((arm, step), []).append(seed)
    lasts = [side(arm, step, seeds) for (arm, step), seeds in ends.items()]
    base = side("base", 0, [0]) if find_base(answers) else None
    pairs = [(last, base) for last in lasts if base]
    pairs += [(one, two) for one in lasts for two in lasts if _opposed(one.arm, two.arm, evidence.runs)]
    return [(one, two) for one, two in pairs if _comparable(one, two)]


def pair_steps(evidence: Evidence) -> list[tuple[Side, Side]]:
    """Set every step's model against that of the step before, in each arm and seed; the first against the base model.

    Left out is what `pair_sides` has too: the only step of an arm against the base model.
    """
    answers, pairs = evidence.answers, []
    base = answers.filter(arm="base", step=0)
    for (arm, seed), own in answers.filter(pl.col("arm") != "base").group_by("arm", "seed", maintain_order=True):
        steps = own.sort("step").partition_by("step", maintain_order=True)
        models = [Side(f"{arm} seed {seed} step {one['step'][0]}", str(arm), one) for one in steps]
        before = [Side("base", "base", base), *models] if base.height else models
        if len(models) > 1:
            pairs += zip(models if base.height else models[1:], before, strict=False)
    return pairs


def _opposed(one: str, two: str, runs: tuple[str, ...]) -> bool:
    if not runs:
        return one == "sdpo" != two
    (run, _, arm), (other, _, same) = one.rpartition(": "), two.rpartition(": ")
    return run == runs[0] != other and arm == same


def _comparable(one: Side, two: Side) -> bool:
    ones, twos = ({seed for seed, _ in side.models} for side in (one, two))
    return bool(ones and twos) and (len(ones) == 1 or len(twos) == 1 or bool(ones & twos))


def measure_references(evidence: Evidence) -> pl.DataFrame:
    """Judge every step's pairs by the base model and by the step's own reference.

    Returns:
        arm, seed, step, reference (who judges), then mean and stderr of the margin (nats),
        accuracy and accuracy_stderr (reward accuracy, percent), n.
    """
    own = evidence.references
    base = own.select(*UNIT, "pair_id").join(evidence.scores, on="pair_id", maintain_order="left").select(own.columns)
    judged = pl.concat(
        [base.with_columns(reference=pl.lit("base model")), own.with_columns(reference=pl.lit("own reference"))]
    )
    return summarise_margins(judged, [*UNIT, "reference"])


def measure_drift(evidence: Evidence) -> pl.DataFrame:
    """Measure how difficulty moved: every step's pairs, judged by the step's reference and by the base model.

    Returns:
        arm, seed, step, pairs, order_kept (Spearman's rho between the two difficulties; null where
        one does not vary), got_right and got_wrong (pairs whose margin's sign turned). Steps whose
        reference is the base model are left out; empty too where the definition needs more than these scores.
    """
    both = evidence.references.join(
        evidence.scores.select("pair_id", base_key="model_key", margin_base=LOGP_MARGIN), on="pair_id"
    ).filter(pl.col("model_key") != pl.col("base_key"))
    rows = []
    for unit, own in both.group_by(UNIT, maintain_order=True):
        before = own.select("pair_id").join(evidence.scores, on="pair_id", maintain_order="left")
        try:
            difficulty = difficulty_named(evidence.partition["definition"][0])
            harder = pl.DataFrame({"now": difficulty.measure(own), "before": difficulty.measure(before)})
        except SdpoError:  # by ratings, by a second model, or by what only its maker knows
            continue
        rho = harder.select(pl.corr("now", "before", method="spearman").fill_nan(None)).item()
        turned = own.select(now=LOGP_MARGIN > 0, before=pl.col("margin_base") > 0)
        right, wrong = (turned.filter(now=now, before=not now).height for now in (True, False))
        rows.append((*unit, own.height, rho, right, wrong))
    names = [*UNIT, "pairs", "order_kept", "got_right", "got_wrong"]
    types = [pl.String, pl.Int64, pl.Int64, pl.Int64, pl.Float64, pl.Int64, pl.Int64]
    return pl.DataFrame(rows, dict(zip(names, types, strict=True)), orient="row")


def last_metrics(metrics: pl.DataFrame) -> pl.DataFrame:
    """Take of every step and metric the value that was logged last, with its standard error (logged as NAME/stderr).

    Returns:
        arm, seed, step, name, value, stderr.
    """
    ordered = metrics.sort(*UNIT, "name", "update", maintain_order=True)
    lasts = ordered.group_by(*UNIT, "name", maintain_order=True).agg(pl.col("value").last())
    is_error = pl.col("name").str.ends_with("/stderr")
    errors = lasts.filter(is_error).with_columns(pl.col("name").str.strip_suffix("/stderr")).rename({"value": "stderr"})
    return lasts.filter(~is_error).join(errors, on=[*UNIT, "name"], how="left", maintain_order="left")


def read_texts(pairs: pl.DataFrame, most: int = 120) -> pl.DataFrame:
    """Give the texts of pairs in short, as a person reads them: pair_id, prompt, chosen, rejected."""

    def short(row: dict[str, str]) -> str:
        text = " ".join(_readable(row).split())
        return text if len(text) <= most else f"{text[:most]}…"

    return pairs.select("pair_id", *_texts(short))


def edge_pairs(evidence: Evidence) -> pl.DataFrame:
    """Pick the easiest, the median and the hardest pair of every step.

    Returns:
        step, place, difficulty, margin (nats), chosen_tokens, rejected_tokens, and the pair with
        its texts as a person reads them.
    """
    known = evidence.partition.join(evidence.pairs.drop("source"), on="pair_id").sort("step", "difficulty", "pair_id")
    picked = []
    for _, part in known.group_by("step", maintain_order=True):
        places = {"easiest": 0, "median": part.height // 2, "hardest": part.height - 1}
        picked += [part[row].with_columns(place=pl.lit(place)) for place, row in places.items()]
    if not picked:
        return known.with_columns(place=pl.lit(""))
    scores = evidence.scores.select("pair_id", "chosen_tokens", "rejected_tokens", margin=LOGP_MARGIN)
    return (
        pl.concat(picked).with_columns(_texts(_readable)).join(scores, on="pair_id", how="left", maintain_order="left")
    )


def _texts(write: Callable[[dict[str, str]], str]) -> list[pl.Expr]:
    names = ("prompt", "chosen", "rejected")
    return [pl.struct(name, "format").map_elements(write, pl.String).alias(name) for name in names]


def _readable(row: dict[str, str]) -> str:
    text, format_ = row.values()
    if format_ != MESSAGES:
        return text
    messages = json.loads(text)
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
