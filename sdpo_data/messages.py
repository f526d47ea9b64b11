"""What a prompt or an answer says: plain text, or messages with a role and a content each."""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from typing import Any, Literal

import polars as pl

from sdpo_data.tables import MESSAGES, SdpoError

PromptFormat = Literal["auto", "messages", "text"]
Row = dict[str, Any]
Fields = dict[str, Any]

TURN = re.compile(r"\n\nHuman: |\n\nAssistant: ?")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool"}


class UnusableError(Exception):
    """The row cannot become a pair; the message is the reason kept in dropped.parquet."""


def read_messages(value: Any) -> list[dict[str, Any]] | None:
    """Read messages, one or a list, with role and content or with ShareGPT's from and value; None if they are not."""
    values = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
    messages = [message for one in values if (message := _message(one)) is not None]
    return messages if values and len(messages) == len(values) else None


def user_message(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text_or_messages(row: Row, name: str) -> Any:
    value = row.get(name)
    if value is None:
        raise UnusableError(f"no {name}")
    content = value if isinstance(value, str) else read_messages(value)
    if content is None:
        raise UnusableError(f"{name} is neither text nor a list of messages")
    return content


def first_of(row: Row, names: Iterable[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def finite_number(value: Any) -> float | None:
    """Read a finite number, in CSV from its text."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def read_tools(cell: Any) -> str | None:
    """Read what a model may call, a list of JSON schemas or its JSON text, as JSON text; None where it is empty."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    tools = _json_or_none(cell) if isinstance(cell, str) else cell
    if cell in ("null", "[]", [], {}):
        return None
    tools = (
        [_json_or_none(tool) if isinstance(tool, str) else tool for tool in tools] if isinstance(tools, list) else []
    )
    if not tools or not all(isinstance(tool, dict) and tool for tool in tools):
        raise UnusableError("tools are not a list of JSON schemas")
    return json.dumps(tools, ensure_ascii=False, default=str)


def plain_texts(pairs: pl.DataFrame, column: str) -> pl.Series:
    """Give what `column` of PAIRS says: text as it is, of messages their contents and tool calls, a line each."""
    as_messages = pl.col("format") == MESSAGES
    decoded = _decoded(pairs.select("pair_id", pl.when(as_messages).then(column).alias(column)), column)
    contents = decoded.list.eval(pl.element().struct.field("content")).list.join("\n")
    calls = as_messages & pl.col(column).str.contains('"tool_calls": ', literal=True)
    said = pl.when(calls).then(pl.col(column).map_elements(_with_calls, pl.String)).otherwise(contents)
    return pairs.select(pl.coalesce(said, column)).to_series()


def _decoded(pairs: pl.DataFrame, column: str) -> pl.Series:
    """Decode a column of messages, null where it is; what is none is refused by its pair_id."""
    kind = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
    rows = pairs.select("pair_id", column)
    try:
        decoded = rows[column].str.json_decode(kind)
    except pl.exceptions.PolarsError:  # it names no row, and refuses a NaN, which Python reads
        whole = [text if text is None else decode_messages(text, pair_id, column) for pair_id, text in rows.iter_rows()]
        return pl.Series(
            [m if m is None else [{"role": x["role"], "content": x["content"]} for x in m] for m in whole], dtype=kind
        )
    holes = decoded.list.eval(pl.any_horizontal(pl.element().struct.field("role", "content").is_null())).list.any()
    odd = holes | (decoded.list.len() == 0) | (decoded.is_null() != rows[column].is_null())
    for pair_id, text in rows.filter(odd.fill_null(False)).iter_rows():
        decode_messages(text, pair_id, column)
    return decoded


def decode_messages(text: str, pair_id: str, column: str) -> list[dict[str, Any]]:
    """Decode what PAIRS holds of a pair whose format is messages.

    Raises:
        SdpoError: it is not a JSON list of messages with a role and a content.
    """
    messages = _json_or_none(text)
    whole = isinstance(messages, list) and read_messages(messages) is not None
    if not whole or not all(isinstance(one, dict) and "role" in one and "content" in one for one in messages):
        raise SdpoError(
            f"pairs.{column} of pair {pair_id!r} is no JSON list of messages, though its format says so "
            f"(it begins with {text[:40]!r}). Read the pairs anew, or write messages as role and content."
        )
    return messages


def _with_calls(messages: str) -> str:
    lines = [
        [message["content"], *(json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or [])]
        for message in json.loads(messages)
    ]
    return "\n".join(line for said in lines for line in said if line)


def says_something(part: Any) -> bool:
    if isinstance(part, str):
        return bool(part.strip())
    return any(message["content"].strip() or message.get("tool_calls") for message in part or [])


def to_one_kind(fields: Fields, prompt_format: PromptFormat) -> Fields:
    """Bring prompt and answers to one kind: all plain text, or all lists of messages."""
    prompt, chosen, rejected = (fields[name] for name in ("prompt", "chosen", "rejected"))
    texts = [isinstance(part, str) for part in (prompt, chosen, rejected)]
    if not any(texts):
        first, *rest = prompt or [{}]
        if first.get("role") == "system":
            if fields.get("system") not in (None, "", first["content"]):
                raise UnusableError("two system messages")
            return {**fields, "prompt": rest, "system": first["content"]}
        return fields
    if not all(texts) and isinstance(prompt, str):
        return to_one_kind({**fields, "prompt": [{"role": "user", "content": prompt}]}, prompt_format)
    if not all(texts):
        answers = {
            side: [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            for side, answer in (("chosen", chosen), ("rejected", rejected))
        }
        return to_one_kind({**fields, **answers}, prompt_format)
    turns = prompt_format != "text" and _turns(prompt)
    beside = next((name for name in ("system message", "tools") if fields.get(name.split()[0])), None)
    if not turns and (prompt_format == "messages" or (prompt_format == "auto" and beside)):
        turns = [{"role": "user", "content": prompt}]
    if not turns:
        if beside:
            raise UnusableError(f"{'tools' if beside == 'tools' else 'a ' + beside} beside plain text")
        return fields
    return {
        **fields,
        "prompt": turns,
        "chosen": [{"role": "assistant", "content": chosen.strip()}] if chosen.strip() else [],
        "rejected": [{"role": "assistant", "content": rejected.strip()}] if rejected.strip() else [],
    }


def messages_as_json(messages: list[dict[str, Any]]) -> str:
    """Write messages down the same way whatever the order of their keys and the nulls a table fills in."""
    ordered = [
        {key: m[key] for key in sorted(m, key=lambda key: (key != "role", key != "content", key)) if m[key] is not None}
        for m in messages
    ]
    return json.dumps(ordered, ensure_ascii=False, default=str)


def pair_ids(system: str | None, prompt: str, chosen: str, rejected: str, tools: str | None = None) -> dict[str, str]:
    """Give pair_id and prompt_id: the same content has the same ids on every machine, forever."""
    also = () if tools is None else (tools,)  # without tools the ids are those of before there were any
    return {
        "pair_id": content_hash(system, prompt, chosen, rejected, *also),
        "prompt_id": content_hash(system, prompt, *also),
    }


def content_hash(*parts: str | None) -> str:
    """Content hash, 128 bits in hex."""
    return hashlib.blake2b(json.dumps(parts, ensure_ascii=False).encode(), digest_size=16).hexdigest()


def _turns(prompt: str) -> list[dict[str, str]] | None:
    """Read the Human/Assistant turns of Anthropic's HH, if the prompt is written so."""
    if not (prompt.startswith("\n\nHuman: ") and prompt.rstrip().endswith("\n\nAssistant:")):
        return None
    marks = TURN.findall(prompt)
    texts = TURN.split(prompt)[1:]
    roles = ["user" if mark.startswith("\n\nHuman") else "assistant" for mark in marks]
    return [{"role": role, "content": text.strip()} for role, text in zip(roles[:-1], texts[:-1], strict=True)]


def _message(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):  # Parquet of messages whose tool calls differ: a JSON text each
        value = _json_or_none(value)
    if not isinstance(value, dict):
        return None
    if value.get("role") is None and value.get("from") == "function_call":
        calls = _json_or_none(value.get("value"))
        calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
        value = {"role": "assistant", "tool_calls": calls if all(call["function"] for call in calls) else None}
    elif value.get("role") is None and isinstance(value.get("from"), str):
        value = {"role": SHAREGPT_ROLES.get(value["from"]), "content": value.get("value")}
    if value.get("content") is None and value.get("tool_calls"):
        value = value | {"content": ""}
    return value if isinstance(value.get("role"), str) and isinstance(value.get("content"), str) else None


def _json_or_none(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
