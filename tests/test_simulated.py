"""Verdicts on simulated seeds x questions tables of known effects and noise: do they err as often as they say?"""

import math
from collections.abc import Callable

import numpy as np
import pytest

from sdpo_eval.stats import (
    Differences,
    Effect,
    compare_checkpoints,
    compare_methods,
    detectable_difference,
    holm,
    judge,
)

STRATA = 12  # subjects of the second task


def answers_of_two(draw: np.random.Generator, questions: int, shift: float, disagree: float = 0.2) -> list[Differences]:
    """Two checkpoints on two tasks: they disagree on a share of the questions, and one wins more of those.

    A question's difference is +100, -100 or 0 points with P(+) - P(-) = shift / 100, P(+) + P(-) = disagree.
    """
    up, down = (disagree + shift / 100) / 2, (disagree - shift / 100) / 2
    luck = draw.random((2, questions))
    plain, strata = 100.0 * (luck < up) - 100.0 * (luck > 1 - down)
    return [Differences.of(plain), Differences.of(strata, np.arange(questions) % STRATA)]


def error_of_two(questions: int, shift: float, disagree: float = 0.2) -> float:
    """True standard error of their mean over both tasks: each question varies by 100^2 * disagree - shift^2."""
    return math.sqrt((100**2 * disagree - shift**2) / questions / 2)


def arms(
    draw: np.random.Generator, shift: float, *, seeds: int, questions: int, noise: tuple[float, float, float]
) -> list[Differences]:
    """Two arms on two tasks, as differences of equal seeds.

    Args:
        noise: standard deviations of the seeds' effects, of the questions', and of what is left, points.
    """
    of_seed, of_question, of_rest = noise
    own = shift + draw.normal(0, of_seed, (seeds, 1))  # a seed moves both tasks alike
    tasks = []
    for strata in (1, STRATA):
        values = own + draw.normal(0, of_question, (1, questions)) + draw.normal(0, of_rest, (seeds, questions))
        tasks.append(Differences.of(values, np.arange(questions) % strata))
    return tasks


def error_of_arms(*, seeds: int, questions: int, noise: tuple[float, float, float]) -> tuple[float, float]:
    """True standard error of the arms' difference, and Satterthwaite's degrees of freedom for it."""
    of_seed, of_question, of_rest = (sd**2 for sd in noise)
    n = 2 * questions
    seed_part, question_part = of_seed / seeds + of_rest / n / seeds, of_question / n + of_rest / n / seeds
    total = of_seed / seeds + of_question / n + of_rest / n / seeds
    return math.sqrt(total), total**2 / (seed_part**2 / (seeds - 1) + question_part**2 / (n - 1 - STRATA))


def share_found(compare: Callable[[int], Effect], rounds: int) -> float:
    effects = map(compare, range(rounds))
    return float(np.mean([judge(effect.value, effect.p) != "not distinguishable" for effect in effects]))


def checkpoints(questions: int, shift: float, rounds: int, disagree: float = 0.2) -> float:
    draw = np.random.default_rng(questions)

    def compare(number: int) -> Effect:
        return compare_checkpoints(answers_of_two(draw, questions, shift, disagree), resamples=999, seed=number)

    return share_found(compare, rounds)


def methods(shift: float, rounds: int, **table) -> float:
    draw = np.random.default_rng(table["seeds"])
    return share_found(lambda _: compare_methods(arms(draw, shift, **table)), rounds)


def near(share: float, rounds: int, slack: float) -> object:
    """The share, within 3.5 standard errors of the simulation and what the method may be off by."""
    return pytest.approx(share, abs=slack + 3.5 * math.sqrt(share * (1 - share) / rounds))


SEED_NOISE = {"seeds": 5, "questions": 300, "noise": (0.6, 20.0, 20.0)}


def test_equal_checkpoints_are_told_apart_in_5_percent():
    assert checkpoints(300, 0.0, rounds=500) == near(0.05, 500, 0.01)


def test_equal_methods_are_told_apart_in_5_percent():
    assert methods(0.0, rounds=500, **SEED_NOISE) == near(0.05, 500, 0.015)


def test_a_checkpoint_verdict_is_none_on_methods():
    """One seed of each arm, equal methods: their checkpoints differ, truly, and are told apart far too often."""
    draw = np.random.default_rng(0)
    table = {"seeds": 1, "questions": 3000, "noise": (0.6, 5.0, 5.0)}  # one seed moves 0.6, questions 0.09
    found = share_found(lambda number: compare_checkpoints(arms(draw, 0.0, **table), resamples=199, seed=number), 60)
    assert found > 0.5
    assert methods(0.0, rounds=60, **(table | {"seeds": 5})) < 0.2


def test_the_detectable_difference_of_checkpoints_is_found_in_80_percent():
    shift = 5.0
    for _ in range(20):  # the error depends on the shift a little
        shift = detectable_difference(error_of_two(300, shift))
    assert checkpoints(300, shift, rounds=500) == near(0.8, 500, 0.02)


def test_the_detectable_difference_of_methods_is_found_in_80_percent():
    stderr, freedom = error_of_arms(**SEED_NOISE)
    assert methods(detectable_difference(stderr, freedom=freedom), rounds=500, **SEED_NOISE) == near(0.8, 500, 0.04)


def clustered(draw: np.random.Generator, documents: int, each: int, alike: float, seeds: int = 1) -> Differences:
    """One task of equal arms: the questions of a share of the documents get one difference, others each their own."""
    values = draw.normal(0, 20, (1, documents, each))
    same = draw.random(documents) < alike
    values[:, same] = values[:, same, :1]
    values = values + draw.normal(0, 10, (seeds, documents, each))
    return Differences.of(values.reshape(seeds, -1), clusters=np.repeat(np.arange(documents), each))


def unclustered(task: Differences) -> Differences:
    return Differences.of(task.values, task.strata)


@pytest.mark.parametrize("seeds", [1, 5])
def test_clustered_questions_are_told_apart_in_5_percent_only_by_their_clusters(seeds):
    """Three questions a document, half of the documents alike: their mean varies at least 1 + 2 * 0.4 times as much.

    The variance of a difference is 400 + 100 (400 + 20 of five seeds), of which 400 is shared by half of the documents.
    """
    draw = np.random.default_rng(seeds)

    def found(of_task: Callable[[Differences], Differences]) -> float:
        def compare(number: int) -> Effect:
            task = of_task(clustered(draw, 150, 3, 0.5, seeds))
            return compare_checkpoints([task], resamples=499, seed=number) if seeds == 1 else compare_methods([task])

        return share_found(compare, 400)

    assert found(lambda task: task) == near(0.05, 400, 0.015)
    assert found(unclustered) > 0.1


def families(rounds: int, size: int, true: int) -> float:
    """Share of families of contrasts, `true` of them of real effects, in which an effect that is none is seen."""
    draw, wrong = np.random.default_rng(size), 0
    for _ in range(rounds):
        shifts = [12.0] * true + [0.0] * (size - true)
        effects = [compare_checkpoints(answers_of_two(draw, 150, shift), resamples=999) for shift in shifts]
        p_values = [1.0 if effect.p is None else effect.p for effect in effects]
        verdicts = [judge(effect.value, p) for effect, p in zip(effects, holm(p_values), strict=True)]
        wrong += any(verdict != "not distinguishable" for verdict in verdicts[true:])
    return wrong / rounds


def test_holm_holds_the_family_error():
    assert families(rounds=150, size=6, true=0) <= 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / 150)


GRID = [
    {"seeds": seeds, "questions": questions, "noise": (of_seed, of_question, 20.0)}
    for seeds in (5, 10)
    for questions in (200, 2000)
    for of_seed in (0.0, 0.3, 2.0)
    for of_question in (1.0, 30.0)
]


@pytest.mark.slow
@pytest.mark.parametrize("table", GRID, ids=lambda table: "-".join(map(str, table.values())))
def test_methods_over_a_grid(table):
    """Over all mixes of noise: never told apart much too often; where both parts count, about as often as said."""
    stderr, freedom = error_of_arms(**table)
    assert methods(0.0, rounds=1500, **table) <= near_above(0.05, 1500, 0.02)
    found = methods(detectable_difference(stderr, freedom=freedom), rounds=1500, **table)
    assert found == near(0.8, 1500, 0.08)


@pytest.mark.slow
@pytest.mark.parametrize("questions", [60, 200, 1000])
@pytest.mark.parametrize("disagree", [0.05, 0.3])
def test_checkpoints_over_a_grid(questions, disagree):
    assert checkpoints(questions, 0.0, 2000, disagree) == near(0.05, 2000, 0.015)


@pytest.mark.slow
@pytest.mark.parametrize("true", [0, 3, 9])
def test_holm_over_a_grid(true):
    assert families(rounds=600, size=10, true=true) <= near_above(0.05, 600, 0.01)


def near_above(share: float, rounds: int, slack: float) -> float:
    return share + slack + 3.5 * math.sqrt(share * (1 - share) / rounds)
