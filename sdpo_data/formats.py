"""Any row of preference data -> the fields of PAIRS, or the reason why it is no pair.

A row is known by its columns; FORMS lists whose they are. What a form reads is the prompt and either two
answers or a list of rated ones; the rest of this file is the same for all forms.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from sdpo_data.messages import (
    Fields,
    PromptFormat,
    Row,
    UnusableError,
    finite_number,
    first_of,
    messages_as_json,
    pair_ids,
    read_messages,
    read_tools,
    says_something,
    text_or_messages,
    to_one_kind,
    user_message,
)
from sdpo_data.rated import LISTS, PROMPTS, Choice, choose_pairs, read_rated
from sdpo_data.tables import MESSAGES, TEXT


@dataclass(frozen=True)
class Form:
    """One way of writing preference data down."""

    name: str
    """Its columns and who writes them: shown for every source."""
    fits: Callable[[Row], bool]
    read: Callable[[Row], Fields]


def read_row(
    row: Any, prompt_format: PromptFormat = "auto", choose: Choice = "best_worst", seed: int = 0
) -> tuple[str | None, list[Fields | str]]:
    """Read one raw row: the name of its form, and for each pair it stands for the fields of PAIRS or a reason.

    A row of several rated answers stands for one pair, or, with choose="all", for every two of its answers.
    Every other row stands for one pair.

    Args:
        row: what JSON, Parquet or CSV holds; anything but an object is no pair.
        prompt_format: see PairsConfig.
        choose: which of several rated answers make pairs; see PairsConfig.
        seed: draws the rejected answer of choose="best_random".
    """
    if not isinstance(row, dict):
        return None, ["not a JSON object"]
    form = next((form for form in FORMS if form.fits(row)), None)
    if form is None:
        return None, ["no columns of a known form (prompt, chosen, rejected)"]
    try:
        fields = form.read(row)
        choices = choose_pairs(fields, choose, seed) if "answers" in fields else [fields]
    except UnusableError as reason:
        return form.name, [str(reason)]
    return form.name, [one if isinstance(one, str) else _pair_or_reason(row, one, prompt_format) for one in choices]


def _pair_or_reason(row: Row, fields: Fields, prompt_format: PromptFormat) -> Fields | str:
    try:
        return _pair(row, fields, prompt_format)
    except UnusableError as reason:
        return str(reason)
    except UnicodeEncodeError:
        return "text is not valid Unicode"


def _pair(row: Row, fields: Fields, prompt_format: PromptFormat) -> Fields:
    if not isinstance(fields.get("system"), str | None):
        raise UnusableError("system is not text")
    tools = read_tools(row.get("tools"))
    fields = to_one_kind(fields | {"tools": tools}, fields.get("prompt_format", prompt_format))
    for name in ("prompt", "chosen", "rejected"):
        if not says_something(fields[name]):
            raise UnusableError(f"empty {name}")
    if fields["chosen"] == fields["rejected"]:
        raise UnusableError("identical answers")
    system = fields.get("system") or None
    prompt, chosen, rejected = (
        part if isinstance(part, str) else messages_as_json(part)
        for part in (fields[name] for name in ("prompt", "chosen", "rejected"))
    )
    return {
        **pair_ids(system, prompt, chosen, rejected, tools),
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "format": TEXT if isinstance(fields["prompt"], str) else MESSAGES,
        "system": system,
        "rating_chosen": fields.get("rating_chosen", _rating(row, "chosen")),
        "rating_rejected": fields.get("rating_rejected", _rating(row, "rejected")),
        "tools": tools,
    }


def _own(row: Row) -> Fields:
    """Read a row of PAIRS itself, whose messages are JSON text, or of an export, where they are lists."""
    if row["format"] == TEXT:  # also where it has turns: the pair was made so
        return _explicit(row) | {"prompt_format": "text"}
    try:
        return _explicit(row | {name: _decoded(row[name]) for name in ("prompt", "chosen", "rejected")})
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UnusableError("its format says messages, but they are not JSON") from None


def _decoded(cell: Any) -> Any:
    return cell if isinstance(cell, list) else json.loads(cell)


def _explicit(row: Row) -> Fields:
    fields: Fields = {name: text_or_messages(row, name) for name in ("prompt", "chosen", "rejected")}
    fields["system"] = row.get("system")
    if not _is_empty(row.get("history")):
        fields["prompt"] = _history(row["history"]) + (
            [user_message(fields["prompt"])] if isinstance(fields["prompt"], str) else fields["prompt"]
        )
    if not isinstance(fields["prompt"], str):  # UltraFeedback repeats the prompt in the answers
        prompt = fields["prompt"]
        for name in ("chosen", "rejected"):
            if not isinstance(fields[name], str) and fields[name][: len(prompt)] == prompt:
                fields[name] = fields[name][len(prompt) :]
    elif not isinstance(fields["chosen"], str) and fields["chosen"][0]["role"] != "assistant":
        return _implicit(row) | {"system": fields["system"]}
    return fields


def _implicit(row: Row) -> Fields:
    """Take the prompt out of two answers that both begin with it (the HH form)."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - character by character is meant
        mark = shared.rfind("\n\nAssistant:")
        end = mark + len("\n\nAssistant:") if mark >= 0 else max(shared.rfind(" "), 0)  # a word's token has its blank
        return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}
    chosen, rejected = read_messages(chosen), read_messages(rejected)
    if chosen is None or rejected is None:
        raise UnusableError("no prompt, and the answers are neither text nor lists of messages")
    same = list(takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    return {"prompt": chosen[: len(same)], "chosen": chosen[len(same) :], "rejected": rejected[len(same) :]}


def _dialogue(column: str) -> Callable[[Row], Fields]:
    """Reader of a dialogue beside the two answers that could follow it."""

    def read(row: Row) -> Fields:
        if isinstance(row[column], str):
            raise UnusableError(f"{column} is not a list of messages")
        return _explicit(row | {"prompt": row[column]})

    return read


def _continued(row: Row) -> Fields:
    """Read ms-swift's form: a dialogue that ends with the chosen answer, and what else could have ended it."""
    dialogue = text_or_messages(row, "messages")
    if isinstance(dialogue, str) or dialogue[-1]["role"] != "assistant":
        raise UnusableError("messages do not end with the chosen answer")
    if row.get("rejected_messages") is not None:
        return _implicit({"chosen": dialogue, "rejected": row["rejected_messages"]}) | {"system": row.get("system")}
    return _explicit(row | {"prompt": dialogue[:-1], "chosen": dialogue[-1:], "rejected": row["rejected_response"]})


def _instructed(row: Row) -> Fields:
    """Read an instruction with an input, as alpaca has them, and both answers under either of their names."""
    name = next(name for name in (*PROMPTS, "input") if row.get(name) is not None)
    extra = row.get("input") if name == "instruction" else None
    sides = {side: first_of(row, (side, f"{side}_response")) for side in ("chosen", "rejected")}
    if isinstance(row[name], str) and isinstance(extra, str) and extra:
        return _explicit(row | sides | {"prompt": [user_message(f"{row[name]}\n{extra}")]})
    return _explicit(row | sides | {"prompt": [user_message(row[name])] if isinstance(row[name], str) else row[name]})


def _best_first(row: Row) -> Fields:
    """Read alpaca's older ranking: the outputs in a list, the better first."""
    chosen, rejected = row["output"]
    return _instructed(row | {"chosen": chosen, "rejected": rejected})


def _judged(row: Row) -> Fields:
    """Read an annotation of AlpacaEval: two outputs, and which of them the judge preferred."""
    preference = finite_number(row["preference"])
    if preference not in (1, 2):
        raise UnusableError("tie")
    outputs = row["output_1"], row["output_2"]
    chosen, rejected = outputs if preference == 1 else outputs[::-1]
    return _instruction([row["instruction"], row.get("input")], chosen, rejected)


def _physical(row: Row) -> Fields:
    """Read a question of PIQA: the right solution against the wrong one."""
    label = finite_number(row["label"])
    if label not in (0, 1):
        raise UnusableError("no label")
    solutions = row["sol1"], row["sol2"]
    return _instruction([row["goal"]], solutions[int(label)], solutions[1 - int(label)])


def _instruction(question: list[Any], chosen: Any, rejected: Any) -> Fields:
    question = [part for part in question if part]
    for name, parts in (("prompt", question), ("chosen", [chosen or ""]), ("rejected", [rejected or ""])):
        if not all(isinstance(part, str) for part in parts):
            raise UnusableError(f"{name} is not text")
    return {
        "prompt": [user_message("\n\n".join(question))],
        "chosen": [{"role": "assistant", "content": chosen or ""}],
        "rejected": [{"role": "assistant", "content": rejected or ""}],
    }


def _history(history: Any) -> list[Fields]:
    """Write earlier turns as messages: alpaca has them as pairs of what was said and answered."""
    if (messages := read_messages(history)) is not None:
        return messages
    messages = []
    for turn in history if isinstance(history, list) else [None]:
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise UnusableError("history is not a list of turns")
        messages += [user_message(turn[0]), {"role": "assistant", "content": turn[1]}]
    return messages


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(name) is not None for name in names)


def _follows(row: Row) -> bool:
    """Whether the answers are what could follow a dialogue, not the dialogue once more."""
    chosen = row["chosen"] if isinstance(row["chosen"], str) else read_messages(row["chosen"])
    return isinstance(chosen, str) or (chosen is not None and chosen[0]["role"] == "assistant")


def _is_empty(cell: Any) -> bool:
    return cell is None or cell == [] or (isinstance(cell, str) and cell.strip() in ("", "[]", "null"))


def _rating(row: Row, side: str) -> float | None:
    names = (f"rating_{side}", f"score_{side}", f"{side}_score", f"{side}_rating")
    return next((value for name in names if (value := finite_number(row.get(name))) is not None), None)


def _begins_alike(row: Row) -> bool:
    return {"chosen", "rejected"} <= row.keys() and "prompt" not in row and not _is_ranked(row)


def _is_ranked(row: Row) -> bool:
    return _has("instruction")(row) and isinstance(row.get("output"), list) and len(row["output"]) == 2


def _has_answers(row: Row) -> bool:
    return any(_has(name)(row) for name in PROMPTS) and any(isinstance(row.get(name), list) for name in LISTS)


_BOTH = ("chosen", "rejected")
_JUDGED = ("instruction", "output_1", "output_2", "preference")
FORMS = [  # the first that fits is read
    Form("our own PAIRS", lambda row: "pair_id" in row and row.get("format") in (MESSAGES, TEXT), _own),
    Form("prompt, chosen, rejected (TRL)", _has("prompt", *_BOTH), _explicit),
    Form("conversations, chosen, rejected (ShareGPT)", _has("conversations", *_BOTH), _dialogue("conversations")),
    Form("messages, rejected_response (ms-swift)", _has("messages", "rejected_response"), _continued),
    Form("messages, rejected_messages (ms-swift)", _has("messages", "rejected_messages"), _continued),
    Form(
        "messages, chosen, rejected (axolotl)",
        lambda row: _has("messages", *_BOTH)(row) and _follows(row),
        _dialogue("messages"),
    ),
    Form("instruction, chosen, rejected (alpaca)", _has("instruction", *_BOTH), _instructed),
    Form(
        "instruction, chosen_response, rejected_response (Argilla)",
        _has("instruction", "chosen_response", "rejected_response"),
        _instructed,
    ),
    Form("question, chosen, rejected (Intel)", _has("question", *_BOTH), _instructed),
    Form("input, chosen, rejected (OpenRLHF)", _has("input", *_BOTH), _instructed),
    Form("chosen and rejected that begin alike (TRL, HH)", _begins_alike, _implicit),
    Form(", ".join(_JUDGED) + " (AlpacaEval)", lambda row: row.keys() >= set(_JUDGED), _judged),
    Form("goal, sol1, sol2, label (PIQA)", lambda row: {"goal", "sol1", "sol2", "label"} <= row.keys(), _physical),
    Form("instruction, output: the better first (alpaca)", _is_ranked, _best_first),
    Form("a prompt with rated or ranked answers (UltraFeedback)", _has_answers, read_rated),
    Form("prompt, chosen, rejected (TRL)", lambda row: bool({"prompt", *_BOTH} & row.keys()), _explicit),
]
