"""A pair as token ids: chat template, the prompt/completion boundary, what is cut and what is lost.

The boundary is TRL's, so that scores and training speak of the same tokens.
"""

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl

from sdpo_data.messages import decode_messages
from sdpo_data.tables import MESSAGES, PAIRS, SdpoError, check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Truncation = Literal["drop", "cut"]
CALLS = '"tool_calls": '  # how PAIRS writes them
SLICE = 1024  # pairs tokenised at once: the tokenizer gives Python lists, which are twenty times a token's size

ENCODED = pl.Schema(
    {  # one row per pair
        "pair_id": pl.String,
        "prompt_ids": pl.List(pl.Int32),
        "chosen_ids": pl.List(pl.Int32),  # completion only: the sequence is prompt_ids + chosen_ids
        "rejected_ids": pl.List(pl.Int32),
        "truncated": pl.Boolean,
        "problem": pl.String,  # why the pair cannot be used; null where it can
    }
)


def encode_pairs(
    pairs: pl.DataFrame, tokenizer: "PreTrainedTokenizerBase", max_length: int, truncation: Truncation
) -> pl.DataFrame:
    """Turn pairs into token ids, in their order.

    Messages go through the tokenizer's chat template, with the system message first; where it has
    none they are written out as "User: ...\\n\\nAssistant: ...", and a line says so. Plain text
    stays raw, and the answer ends with EOS. The completion starts where the tokens of the prompt
    and of the prompt with each answer first differ.

    Args:
        pairs: PAIRS frame.
        tokenizer: of the model that will read the ids.
        max_length: longest prompt + completion, tokens.
        truncation: "cut" keeps the first max_length tokens of each side, as TRL does; "drop"
            marks a pair with a longer side as a problem.

    Returns:
        ENCODED frame. A pair with a problem has its ids all the same; it must not be scored.

    Source: trl 1.16 `DPOTrainer._prepare_dataset` and `DataCollatorForPreference` (keep_start).
        Deviation: there an answer that loses all its tokens is scored 0; here it is a problem.
    """
    pairs = check(pairs, PAIRS, "pairs")
    if not tokenizer.chat_template and MESSAGES in pairs["format"]:
        log.info("the tokenizer has no chat template: messages are written out as 'User: ...' and 'Assistant: ...'")
    if unseen := _hidden_in(pairs, tokenizer):
        log.info("the chat template does not show the pairs' %s: the model does not read them", " and ".join(unseen))
    slices = [_encode_slice(part, tokenizer, max_length, truncation) for part in pairs.iter_slices(SLICE)]
    encoded = pl.concat([pl.DataFrame(schema=ENCODED), *(part for part, _ in slices)])
    chosen, rejected = np.sum([(0, 0), *(cut for _, cut in slices)], axis=0)
    if truncation == "cut" and (chosen or rejected):
        log.info("cut at %d tokens: %d chosen, %d rejected of %d pairs", max_length, chosen, rejected, encoded.height)
    return encoded


def _encode_slice(
    pairs: pl.DataFrame, tokenizer: "PreTrainedTokenizerBase", max_length: int, truncation: Truncation
) -> tuple[pl.DataFrame, tuple[int, int]]:
    """Encode pairs, and count the chosen and the rejected answers beyond max_length."""
    texts = [render_pair(row, tokenizer) for row in pairs.iter_rows(named=True)]
    special = [form != MESSAGES or not tokenizer.chat_template for form in pairs["format"]]
    ids = [_tokenize(side, special, tokenizer) for side in zip(*texts, strict=True)]
    rows = [
        (pair_id, *_split(prompt, with_chosen, with_rejected, max_length, truncation))
        for pair_id, prompt, with_chosen, with_rejected in zip(pairs["pair_id"], *ids, strict=True)
    ]
    chosen, rejected = (sum(len(tokens) > max_length for tokens in side) for side in ids[1:])
    return pl.DataFrame(rows, ENCODED, orient="row"), (chosen, rejected)


def render_pair(row: dict, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str, str]:
    """Write out the prompt, and the prompt with each answer, as the model will read them.

    Raises:
        SdpoError: the chat template refuses the pair.
    """
    eos = str(tokenizer.eos_token or "")
    if row["format"] != MESSAGES:
        chosen, rejected = (row[side].removesuffix(eos) + eos for side in ("chosen", "rejected"))
        return row["prompt"], row["prompt"] + chosen, row["prompt"] + rejected
    system = [{"role": "system", "content": row["system"]}] if row["system"] is not None else []
    said = {side: decode_messages(row[side], row["pair_id"], side) for side in ("prompt", "chosen", "rejected")}
    prompt = system + said["prompt"]
    with_chosen, with_rejected = prompt + said["chosen"], prompt + said["rejected"]
    if not tokenizer.chat_template:
        return _plainly(prompt) + "\n\nAssistant:", _plainly(with_chosen) + eos, _plainly(with_rejected) + eos
    tools = json.loads(row["tools"]) if row["tools"] is not None else None
    try:
        return (
            str(tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True, tokenize=False)),
            str(tokenizer.apply_chat_template(with_chosen, tools=tools, tokenize=False)),
            str(tokenizer.apply_chat_template(with_rejected, tools=tools, tokenize=False)),
        )
    except Exception as error:  # the template is a program of the model's author: it may raise anything
        raise SdpoError(
            f"The chat template cannot render pair {row['pair_id']} ({error}). "
            "Its roles must be those the model knows, in an order it accepts; drop the pair or use another model."
        ) from error


def hidden(row: dict, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Name what the template leaves out of a pair: "tools", "tool calls", both or neither.

    It is left out where the pair reads the same without it.
    """
    if row["format"] != MESSAGES:
        return []
    without = {"tools": row | {"tools": None}}
    without["tool calls"] = row | {side: _without_calls(row[side]) for side in ("prompt", "chosen", "rejected")}
    found = []
    for what, other in without.items():
        if other != row:
            try:
                same = render_pair(row, tokenizer) == render_pair(other, tokenizer)
            except SdpoError:  # a template that misses what was left out has looked at it
                continue
            found += [what] if same else []
    return found


def _hidden_in(pairs: pl.DataFrame, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Look at the first pair with tools and the first with tool calls, which stand for all."""
    calls = pl.any_horizontal(pl.col("prompt", "chosen", "rejected").str.contains(CALLS, literal=True))
    firsts = [pairs.filter(pl.col("tools").is_not_null())[:1], pairs.filter(calls)[:1]]
    return sorted({what for first in firsts for row in first.iter_rows(named=True) for what in hidden(row, tokenizer)})


def _without_calls(messages: str) -> str:
    if CALLS not in messages:
        return messages
    bare = [{key: value for key, value in one.items() if key != "tool_calls"} for one in json.loads(messages)]
    return json.dumps(bare, ensure_ascii=False)


def _plainly(messages: Sequence[dict]) -> str:
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _tokenize(texts: Sequence[str], special: list[bool], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Tokenize in two batches: a rendered chat template brings its own special tokens."""
    ids: list[list[int]] = [[] for _ in texts]
    for add in (True, False):
        rows = [row for row, wanted in enumerate(special) if wanted is add]
        if rows:
            batch = tokenizer([texts[row] for row in rows], add_special_tokens=add)["input_ids"]
            for row, tokens in zip(rows, batch, strict=True):
                ids[row] = tokens
    return ids


def _split(
    prompt: list[int], with_chosen: list[int], with_rejected: list[int], max_length: int, truncation: Truncation
) -> tuple[list[int], list[int], list[int], bool, str | None]:
    boundary = min(_common_prefix(prompt, with_chosen), _common_prefix(prompt, with_rejected))
    truncated = max(len(with_chosen), len(with_rejected)) > max_length
    problem = None
    if truncated and truncation == "drop":
        sides = [name for name, ids in (("chosen", with_chosen), ("rejected", with_rejected)) if len(ids) > max_length]
        problem = f"over {max_length} tokens ({' and '.join(sides)})"
    elif truncated and boundary >= max_length:
        problem = f"prompt fills all {max_length} tokens"
    elif boundary == 0:
        problem = "no token of the prompt stands before the answers"  # nothing predicts their first token
    elif min(len(with_chosen), len(with_rejected)) == boundary:
        problem = "an answer has no token of its own"
    if truncation == "cut":
        with_chosen, with_rejected = with_chosen[:max_length], with_rejected[:max_length]
    return prompt[:boundary], with_chosen[boundary:], with_rejected[boundary:], truncated, problem


def _common_prefix(left: list[int], right: list[int]) -> int:
    if left == right[: len(left)]:
        return len(left)
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return min(len(left), len(right))
