"""Several answers to one prompt, rated or ranked: which of them make a pair."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from sdpo_data.messages import (
    Fields,
    Row,
    UnusableError,
    finite_number,
    first_of,
    read_messages,
    text_or_messages,
    user_message,
)

Choice = Literal["best_worst", "best_random", "all"]

PROMPTS = ("prompt", "instruction", "question", "query")
LISTS = ("completions", "responses", "generations", "answers", "all_generated_responses")
RATINGS = ("ratings", "scores", "rewards", "rating", "all_rm_scores")
RANKS = ("ranks", "rank", "ranking")
ANSWER_TEXT = ("response", "answer", "text", "content", "output")
ANSWER_RATING = ("overall_score", "rating", "score", "reward", "fine-grained_score")


class Rated(NamedTuple):
    """One of several answers to a prompt; among them the higher `worth` is the better."""

    content: Any
    worth: float
    rating: float | None
    """The judge's rating; none where the answers are only ranked."""


def read_rated(row: Row) -> Fields:
    """Read a prompt with several answers, each rated or ranked: in the answer itself, or in a list beside them."""
    answers = row[next(name for name in LISTS if isinstance(row.get(name), list))]
    ratings, ranks = (_beside(row, names, len(answers)) for names in (RATINGS, RANKS))
    rated = []
    for place, answer in enumerate(answers):
        inside = answer if isinstance(answer, dict) else {}
        content = answer if "role" in inside or not inside else first_of(inside, ANSWER_TEXT)
        rating = _answer_rating(inside) if ratings is None else finite_number(ratings[place])
        rank = finite_number(first_of(inside, RANKS) if ranks is None else ranks[place])
        if rating is not None:
            rated.append(Rated(content, rating, rating))
        elif rank is not None:
            rated.append(Rated(content, -rank, None))
    prompt = text_or_messages(row, next(name for name in PROMPTS if row.get(name) is not None))
    prompt = [user_message(prompt)] if isinstance(prompt, str) else prompt
    return {"prompt": prompt, "system": row.get("system"), "answers": rated, "unrated": len(answers) - len(rated)}


def _beside(row: Row, names: Iterable[str], count: int) -> list[Any] | None:
    values = next((row[name] for name in names if isinstance(row.get(name), list)), None)
    if values is not None and len(values) != count:
        raise UnusableError(f"{count} answers with {len(values)} ratings")
    return values


def _answer_rating(answer: Row) -> float | None:
    """Read the overall rating of an answer, or UltraFeedback's mean over the aspects it was rated for."""
    if (rating := finite_number(first_of(answer, ANSWER_RATING))) is not None:
        return rating
    aspects = answer.get("annotations")
    aspects = aspects.values() if isinstance(aspects, dict) else []
    ratings = [finite_number(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, dict)]
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known else None


def choose_pairs(fields: Fields, choose: Choice, seed: int) -> Sequence[Fields | str]:
    """Make pairs of rated answers, the best first; of equal ones the first in the row counts as the better."""
    best_first: list[Rated] = sorted(fields["answers"], key=lambda one: -one.worth)
    unrated: int = fields["unrated"]
    if len(best_first) + unrated < 2 or (len(best_first) < 2 and choose != "all"):
        raise UnusableError("fewer than two rated answers")
    if choose == "all":
        lost = math.comb(len(best_first) + unrated, 2) - math.comb(len(best_first), 2)
        pairs = [_of_two(fields, better, worse) for better, worse in itertools.combinations(best_first, 2)]
        return pairs + ["an answer without a rating"] * lost
    best, worse = best_first[0], [one for one in best_first if one.worth < best_first[0].worth]
    if not worse:
        raise UnusableError("tie")
    if choose == "best_worst":
        return [_of_two(fields, best, worse[-1])]
    drawn = min(worse, key=lambda one: draw(json.dumps([fields["prompt"], one.content], default=str), seed))
    return [_of_two(fields, best, drawn)]


def _of_two(fields: Fields, better: Rated, worse: Rated) -> Fields | str:
    if better.worth == worse.worth:
        return "tie"
    sides = {}
    for side, answer in (("chosen", better), ("rejected", worse)):
        content = answer.content if isinstance(answer.content, str) else read_messages(answer.content)
        if content is None:
            return f"{side} is neither text nor a list of messages"
        sides |= {side: content, f"rating_{side}": answer.rating}
    return {"prompt": fields["prompt"], "system": fields["system"]} | sides


def draw(identity: str, seed: int) -> str:
    """Order ids at random but for good: adding rows does not move the others."""
    return hashlib.blake2b(f"{seed}:{identity}".encode(), digest_size=16).hexdigest()
