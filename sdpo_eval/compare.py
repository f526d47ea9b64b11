"""Compare two models, or two arms, of two runs or of one, over the questions that both answered.

Examples:
    python -m sdpo_eval.compare runs/a runs/b                          # the last models of both; core factorials
    python -m sdpo_eval.compare runs/a --a sdpo --b dpo                # two arms of one run; of five seeds: the methods
    python -m sdpo_eval.compare runs/a --a sdpo/0/2 --b sdpo/0/1 --flips 10    # and which questions flipped
    python -m sdpo_eval.compare runs/new runs/old --fail-if-worse 1.0  # exit code 3 unless at most 1 point worse
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import polars as pl
import tyro

from sdpo_data.config import read_section
from sdpo_data.console import command, print_table, say
from sdpo_data.run import Run, open_run
from sdpo_data.tables import UNIT, SdpoError
from sdpo_eval.changes import find_changes, find_flips
from sdpo_eval.clean import read_clean
from sdpo_eval.contrasts import (
    METHODS,
    METRICS,
    TITLES,
    CompareConfig,
    Side,
    choose_models,
    contrast_models,
    pair_seeds,
    tell_kind,
)
from sdpo_eval.evidence import read_evidence
from sdpo_eval.h4 import MEAN, TASKS
from sdpo_eval.margins import HELD_OUT, as_documents, as_items, read_held_out
from sdpo_eval.plan import read_answers

RULE_OF_THREE = 3.0  # of n independent draws without an event; its rate is below 3 / n, one-sided 95 %
UNITS = {"gold_logp": "nats", "logp_margin": "nats", "choice_margin": "points"}  # of what is shown beneath the score
WORSE = 3  # the exit code of --fail-if-worse; 1 is a bug, 2 the user's to fix


def compare_models(
    run_a: str | Path | Run,
    run_b: str | Path | Run | None = None,
    *,
    a: str | None = None,
    b: str | None = None,
    metrics: Sequence[str] = ("score",),
) -> pl.DataFrame:
    """Say how two models, or two arms over their seeds, differ on the questions, and held-out pairs, both answered.

    Primary is the one contrast that `compare` in run_a's config.yaml names (by default sdpo - dpo, by H4); the
    p-values of all others are adjusted (Holm), and of all of them where it is another one that is asked for. Where
    a run has been decontaminated, the questions that its training pairs do not hold are compared by themselves too.

    Args:
        run_a: run folder of the first.
        run_b: run folder of the second; run_a where there is none.
        a: the first, as ARM, ARM/SEED or ARM/SEED/STEP; without a step the last one, without a
            seed every seed. By default sdpo, or the only arm, or the base model of a run that has no other.
        b: the second, likewise; in one run by default the base model.
        metrics: of METRICS: the score, and what lies beneath it, such as the right answer's log-probability.

    Returns:
        CONTRASTS frame: effects are first - second, points.

    Raises:
        SdpoError: there is no such run or model; the two answered under different protocols, or
            share no question or seed.
    """
    runs = _opened(run_a, run_b)
    return _contrast(*_sides(runs, a, b), runs, metrics)


def _opened(run_a: str | Path | Run, run_b: str | Path | Run | None) -> list[Run]:
    return [run if isinstance(run, Run) else open_run(run) for run in (run_a, run_b) if run is not None]


def _sides(runs: list[Run], a: str | None, b: str | None) -> tuple[Side, Side]:
    if len(runs) == 1:
        return _chosen(runs[0], a), _chosen(runs[0], b or "base")
    one, two = _names_of(runs)
    first, second = _chosen(runs[0], a), _chosen(runs[1], b)
    return replace(first, name=f"{one}: {first.name}"), replace(second, name=f"{two}: {second.name}")


def _names_of(runs: list[Run]) -> list[str]:
    names = [run.path.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _contrast(first: Side, second: Side, runs: list[Run], metrics: Sequence[str]) -> pl.DataFrame:
    clean = [known for known in map(read_clean, runs) if known]
    config = read_section(runs[0], "compare", CompareConfig)
    turned = " - ".join(reversed(config.primary.split(" - ")))
    if turned == f"{first.arm} - {second.arm}":  # the same contrast, seen from the other side
        config = config.model_copy(update={"primary": turned})
    return contrast_models([(first, second)], config, metrics, clean)


def _tell_primary(contrasts: pl.DataFrame, run: Run) -> str:
    """Say which contrast is not adjusted for looking at several, or that none is."""
    config = read_section(run, "compare", CompareConfig)
    named = f"{config.primary} by {TITLES.get(config.primary_task, config.primary_task)}"
    if contrasts["primary"].any():
        return f"The primary contrast is {named}: it alone is not adjusted for looking at several."
    return (
        f"The primary contrast of {run.path} is {named}, which is none of these: all are adjusted for looking at "
        "several. Name yours in compare.primary and compare.primary_task of config.yaml, before you look."
    )


def _are_one(first: Side, second: Side, runs: list[Run]) -> bool:
    """Whether two sides are the same weights, with the same tokenizer as far as that was noted."""
    noted = [
        dict(read_answers(run).drop_nulls("tokenizer_key").select(pl.format("{}/{}/{}", *UNIT), "tokenizer_key").rows())
        for run in (runs[0], runs[-1])
    ]
    for pair in pair_seeds(first, second):
        units = [side.items.select(pl.format("{}/{}/{}", *UNIT)).item(0, 0) for side in pair]
        tokenizers = {own[unit] for own, unit in zip(noted, units, strict=True) if unit in own}
        if len({side.models[0][1] for side in pair}) > 1 or len(tokenizers) > 1:
            return False
    return True


def _chosen(run: Run, wanted: str | None) -> Side:
    """Find the models that ARM[/SEED[/STEP]] names, or the ones a run is about."""
    items = pl.concat([run.items, as_items(read_held_out(run))])
    if items.is_empty():
        raise SdpoError(f"{run.path} holds no answers. Make them with: python -m sdpo_eval {run.path}")
    if wanted is None:
        arms = items["arm"].unique().sort().to_list()
        others = [arm for arm in arms if arm != "base"]
        if "sdpo" not in others and len(others) > 1:
            raise SdpoError(f"{run.path} has the arms {', '.join(others)}. Say which to compare: --a ARM or --b ARM.")
        wanted = "sdpo" if "sdpo" in others else [*others, *arms][0]
    arm, *numbers = wanted.split("/")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise SdpoError(f"{wanted!r} names no model. Write ARM, ARM/SEED or ARM/SEED/STEP, such as sdpo/0/2.")
    seed, step = [*map(int, numbers), None, None][:2]
    return choose_models(items, arm, seed, step)


def find_worse(contrasts: pl.DataFrame, margin: float) -> list[str]:
    """Say where the first is not shown to be at most `margin` points worse: non-inferiority.

    Judged is H4, or every task where there is no H4, the held-out pairs only where they alone are there; the
    methods, or every pair of checkpoints where there is no verdict on methods; on all questions, clean or not.
    Shown it is where the 95 % interval does not reach below -margin, so a first that is exactly so much worse
    passes in 2.5 %. Where no question differs from another there is no interval: the share of questions that
    became wrong is then below 3 / n, one-sided 95 %, which is at most that many points; of H4, a mean of four,
    a quarter of what the task of fewest questions allows.

    Args:
        contrasts: CONTRASTS frame of one comparison.

    Returns:
        A sentence for each row that does not show it; empty if all do.

    Source: rule of three, Hanley and Lippman-Hand, JAMA 249, 1983; it takes questions as independent draws.
    """
    judged = contrasts.filter(metric="score", subset="all")
    if judged["task"].n_unique() > 1:
        judged = judged.filter(pl.col("task") != HELD_OUT)
    for column, best in (("verdict_on", METHODS), ("task", MEAN)):
        judged = judged.filter(pl.col(column) == best) if best in judged[column] else judged
    sentences = []
    for row in judged.iter_rows(named=True):
        low, why = row["low"], ""
        if low is None:
            low = row["effect"] - _least_shown(row, contrasts)
            why = f": no question of {row['n']:,} differs from another, and so few show no less (rule of three, 95 %)"
        if low < -margin:
            what = f"{row['first']} against {row['second']}, {TITLES.get(row['task'], row['task'])}"
            sentences.append(f"{what}: it may be {-low:.2f} points worse, allowed are {margin:g}{why}.")
    return sentences


def _least_shown(row: dict, contrasts: pl.DataFrame) -> float:
    """Give how many points worse cannot be ruled out where no question differs from another: 95 %, one-sided."""
    if row["task"] != MEAN:
        return 100 * RULE_OF_THREE / row["n"]
    models = {name: row[name] for name in ("verdict_on", "first", "second", "metric", "subset")}
    counts = contrasts.filter(pl.col("task").is_in(list(TASKS)), **models)["n"].to_list()
    fewest = min(counts) if len(counts) == len(TASKS) else row["n"] / len(TASKS)
    return 100 * RULE_OF_THREE / (len(TASKS) * fewest)


def main(argv: list[str] | None = None) -> None:
    """Print the contrasts, and with --fail-if-worse exit with 3 where the first may be that much worse."""
    run_a, run_b, a, b, margin, flips = tyro.cli(
        _arguments, args=argv, prog="python -m sdpo_eval.compare", description=__doc__
    )
    runs = _opened(run_a, run_b)
    first, second = _sides(runs, a, b)
    if _are_one(first, second, runs):
        say(f"{first.name} and {second.name} are the same weights: there is no difference.")
        return
    contrasts = _contrast(first, second, runs, list(METRICS))
    title = f"{first.name} − {second.name}: points, 95 % interval; adjusted is p by Holm, for looking at several"
    print_table(tabulate(contrasts), title)
    if (beside := tabulate_clean(contrasts)).height:
        print_table(
            beside, "without the questions that the training pairs give away, and with them: points, 95 % interval"
        )
    if (beneath := tabulate_beneath(contrasts)).height:
        units = ", ".join(f"{name} in {unit}" for name, unit in UNITS.items())
        print_table(beneath, f"beneath the score, margins where one answer alone is right: {units}; 95 % interval")
    say(_tell_primary(contrasts, runs[0]))
    say(tell_kind(contrasts))
    if a is None and b is None:  # runs are compared, not two models of them
        _print_factorials(runs)
    if flips:
        _print_flips(first, second, runs, flips)
    worse = [] if margin is None else find_worse(contrasts, margin)
    for sentence in worse:
        say(f"fail-if-worse: {sentence}")
    if worse:
        sys.exit(WORSE)


def _print_factorials(runs: list[Run]) -> None:
    """Print what order and reference do in each run that holds the four arms of the core factorial."""
    for name, run in zip(_names_of(runs), runs, strict=True):
        effects = read_evidence(run).factorial
        rows = [{"effect": row["effect_of"]} | _readable(row, effects) for row in effects.iter_rows(named=True)]
        if rows:
            title = "the core factorial, points, 95 % interval; adjusted among these effects"
            print_table(pl.DataFrame(rows), f"{name}: {title}")


def _print_flips(first: Side, second: Side, runs: list[Run], count: int) -> None:
    pairs = [as_documents(run.held_out, scores) for run in runs if (scores := read_held_out(run)).height]
    texts = pl.concat([*(run.questions for run in runs), *pairs])
    for one, two in pair_seeds(first, second):
        flips = find_flips(find_changes(one, two, texts))
        largest = flips.sort(pl.col("change").abs(), descending=True, nulls_last=True, maintain_order=True).head(count)
        right = pl.when(outcome="became right").then(pl.lit(one.name)).otherwise(pl.lit(two.name))
        shown = largest.select("task", "item_id", "question", right=right, gold_logp_change="change")
        title = f"{one.name} − {two.name}: {flips.height:,} questions that one alone gets right"
        print_table(shown, f"{title}; those whose right answer changed most, nats")


def tabulate(contrasts: pl.DataFrame) -> pl.DataFrame:
    """Lay CONTRASTS of all questions' scores out for reading."""
    shown = contrasts.filter(subset="all", metric="score")
    return pl.DataFrame([_readable(row, shown) for row in shown.iter_rows(named=True)])


def tabulate_beneath(contrasts: pl.DataFrame) -> pl.DataFrame:
    """Lay CONTRASTS of what lies beneath the score out for reading, a column per metric; no rows without any."""
    rows: dict[tuple, dict[str, str | int]] = {}
    for row in contrasts.filter(pl.col("metric") != "score", subset="all").iter_rows(named=True):
        models = tuple(row[name] for name in ("verdict_on", "first", "second", "task"))
        cells = rows.setdefault(models, _names(row, contrasts) | dict.fromkeys(UNITS, "") | {"n": row["n"]})
        interval = f" [{row['low']:+.3f}, {row['high']:+.3f}]" if row["stderr"] is not None else ""
        cells[row["metric"]] = f"{row['effect']:+.3f}{interval} {row['verdict']}"
    return pl.DataFrame(list(rows.values()))


def tabulate_clean(contrasts: pl.DataFrame) -> pl.DataFrame:
    """Lay CONTRASTS of all questions and of the clean ones out side by side; no rows where none are known to be."""
    rows: dict[tuple, dict[str, str | int]] = {}
    contrasts = contrasts.filter(metric="score")
    for row in contrasts.sort(pl.col("subset") != "clean", maintain_order=True).iter_rows(named=True):
        models = tuple(row[name] for name in ("verdict_on", "first", "second", "task"))
        if row["subset"] == "clean":
            rows[models] = _names(row, contrasts)
        if models in rows:
            interval = f" [{row['low']:+.2f}, {row['high']:+.2f}]" if row["stderr"] is not None else ""
            said = (f"{row['effect']:+.2f}{interval}", row["n"], row["verdict"])
            rows[models] |= dict(zip((row["subset"], f"n {row['subset']}", f"{row['subset']}:"), said, strict=True))
    return pl.DataFrame(list(rows.values()))


def _names(row: dict, contrasts: pl.DataFrame) -> dict[str, str | int]:
    several = contrasts.select("first", "second", "verdict_on").n_unique() > 1
    models = {"first": row["first"], "second": row["second"], "verdict on": row["verdict_on"]} if several else {}
    return models | {"task": TITLES.get(row["task"], row["task"])}


def _readable(row: dict, contrasts: pl.DataFrame) -> dict[str, str | int]:
    known = row["stderr"] is not None
    needed = "" if row["n_for_1_point"] is None else f"{row['n_for_1_point']:,}"
    tested = {"p McNemar": "" if row["p_mcnemar"] is None else f"{row['p_mcnemar']:.4f}"}
    return (
        _names(row, contrasts)
        | {"difference": f"{row['effect']:+.2f}"}
        | {"interval": f"[{row['low']:+.2f}, {row['high']:+.2f}]" if known else "unknown", "n": row["n"]}
        | {"p": f"{row['p']:.4f}" if known else "", "adjusted": f"{row['p_holm']:.4f}"}
        | (tested if contrasts["p_mcnemar"].count() else {})
        | {"verdict": row["verdict"], "found with 80 %": f"{row['detectable']:.2f}" if known else ""}
        | ({"n for 1 point": needed} if contrasts["n_for_1_point"].count() else {})
    )


def _arguments(
    run_a: Annotated[Path, tyro.conf.Positional],
    run_b: Annotated[Path | None, tyro.conf.Positional] = None,
    *,
    a: str | None = None,
    b: str | None = None,
    fail_if_worse: float | None = None,
    flips: int = 0,
) -> tuple[Path, Path | None, str | None, str | None, float | None, int]:
    """Read the flags.

    Args:
        run_a: Run folder of the first.
        run_b: Run folder of the second; the same where it is left out.
        a: The first, ARM[/SEED[/STEP]]; by default the last model of sdpo or of the only arm.
        b: The second, likewise; in one run the base model by default.
        fail_if_worse: Exit with 3 unless the first is shown to be at most so many points worse.
        flips: Show so many of the questions that one of the two alone gets right.
    """
    if fail_if_worse is not None and not fail_if_worse >= 0:
        raise SdpoError(f"--fail-if-worse {fail_if_worse}: name how many points worse is still allowed, 0 or more.")
    return run_a, run_b, a, b, fail_if_worse, flips


if __name__ == "__main__":
    command(main)
