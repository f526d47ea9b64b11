"""What is wrong with pairs before a GPU hour is spent on them: one line a check, with an example and a remedy."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import polars as pl

from sdpo_data.console import print_table, say
from sdpo_data.duplicates import find_near_duplicates
from sdpo_data.encode import encode_pairs, hidden, render_pair
from sdpo_data.messages import plain_texts
from sdpo_data.tables import FINDINGS, MESSAGES, PAIRS, SdpoError, check

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loaded = PreTrainedModel | PreTrainedTokenizerBase | tuple[PreTrainedModel, PreTrainedTokenizerBase]
    Model = str | Path | Loaded

Severity = Literal["wrong", "look"]
THINKING = r"(?i)</?(?:think|thinking|thought|reasoning)>|<\|(?:begin|end)_of_thought\|>"
FEW = 10  # pairs, below which no bias is called one
CLEAR = 2.0  # standard errors, from which on a difference is called one


class Check(NamedTuple):
    """A question to every pair."""

    name: str
    severity: Severity
    affected: pl.Expr
    remedy: str


def _squashed(side: str) -> pl.Expr:
    return pl.col(side).str.replace_all(r"\s+", " ").str.strip_chars()


_SAME = ("same_chosen", "same_rejected")
_TWO = ("prompt_id", pl.min_horizontal(_SAME), pl.max_horizontal(_SAME))
_TEXTS = ("prompt", "chosen", "rejected")
EMPTY = pl.any_horizontal(pl.col(_TEXTS).str.strip_chars() == "")
IDENTICAL = pl.col("same_chosen") == pl.col("same_rejected")
SAME_PAIR = ("prompt_id", *_SAME)
TEXT_CHECKS = [
    Check("empty text", "wrong", EMPTY, "drop them"),
    Check(
        "identical answers", "wrong", IDENTICAL,
        "drop them: but for blanks there is nothing to prefer",
    ),
    Check(
        "swapped answers", "wrong",
        (pl.col("same_chosen").n_unique().over(*_TWO) > 1) & (pl.col("same_chosen") != pl.col("same_rejected")),
        "decide which label is right, or drop both",
    ),
    Check("preferences in a circle", "wrong", pl.col("in_circle"), "one label of each circle is wrong: a > b > c > a"),
    Check(
        "repeated pair", "look", pl.struct(SAME_PAIR).is_duplicated(),
        "keep one of each: they differ only in blanks",
    ),
    Check(
        "near-duplicate", "look", pl.col("near_duplicate"),
        "drop all but one of each cluster, or keep a cluster on one side of the hold-out",
    ),
    Check(
        "rating against label", "wrong", pl.col("rating_chosen") < pl.col("rating_rejected"),
        "the judge rates the rejected answer higher: swap or drop",
    ),
    Check(
        "ratings equal", "look", pl.col("rating_chosen") == pl.col("rating_rejected"),
        "the judge sees no difference: drop, or expect noise",
    ),
    Check(
        "thinking on one side", "wrong",
        pl.col("chosen").str.contains(THINKING) != pl.col("rejected").str.contains(THINKING),
        "strip the thinking or give it to both: else the tags are what is learned",
    ),
    Check(
        "thinking tags", "look", pl.any_horizontal(pl.col(_TEXTS).str.contains(THINKING)),
        "templates cut thinking out of earlier turns: look at one pair as the model reads it",
    ),
]  # fmt: skip


def check_pairs(pairs: pl.DataFrame, model: "Model | None" = None, max_length: int = 1024) -> pl.DataFrame:
    """Ask every pair what is wrong with it, as text and, with a model, as the tokens the model reads.

    Args:
        pairs: PAIRS frame.
        model: folder, hub id, embedded:NAME, a loaded model, (model, tokenizer), or a tokenizer; only
            the tokenizer is looked at. Without one, what needs tokens is not asked.
        max_length: longest prompt + answer, tokens, for what would be truncated.

    Returns:
        FINDINGS frame: a row for every check in a fixed order, with severity "fine" where nothing
        was found, and last the length bias, whose standard error counts prompts, not pairs.

    Raises:
        SdpoError: `pairs` is empty or not a PAIRS frame, or there is no such model.
    """
    pairs = check(pairs, PAIRS, "pairs")
    if pairs.is_empty():
        raise SdpoError("There is no pair to check.")
    looked = _look_at_texts(pairs)
    checks, lengths = list(TEXT_CHECKS), ("chosen", "rejected", "characters")
    if model is not None:
        tokenizer = tokenizer_of(model)
        looked = look_at_tokens(looked, pairs, tokenizer)
        checks += _token_checks(tokenizer, max_length)
        lengths = ("chosen_tokens", "rejected_tokens", "tokens")
    found = [_finding(looked, one) for one in checks]
    return pl.DataFrame([*found, _length_bias(looked, *lengths)], FINDINGS, orient="row")


def show_findings(findings: pl.DataFrame, pairs: int) -> None:
    """Print what was found, name what was not, and say the verdict on length."""
    asked, bias = findings[:-1], findings.row(-1, named=True)
    found = asked.filter(pl.col("severity") != "fine").with_columns((100 * pl.col("share")).alias("share"))
    if found.height:
        print_table(found.rename({"share": "% of pairs"}), f"what {pairs:,} pairs have")
    say(f"not found: {', '.join(asked.filter(pl.col('severity') == 'fine')['check']) or 'nothing'}.")
    say(f"{bias['check']}: {bias['remedy']}.")


def _finding(looked: pl.DataFrame, one: Check) -> tuple:
    affected = looked.filter(one.affected)
    share = affected.height / looked.height
    if affected.is_empty():
        return one.name, "fine", 0, 0.0, None, ""
    return one.name, one.severity, affected.height, share, affected["pair_id"][0], one.remedy


def squash_texts(pairs: pl.DataFrame) -> pl.DataFrame:
    """Write out what each side says, and beside it same_chosen and same_rejected, equal where only blanks differ."""
    texts = pairs.with_columns(plain_texts(pairs, side).alias(side) for side in _TEXTS)
    return texts.with_columns(same_chosen=_squashed("chosen"), same_rejected=_squashed("rejected"))


def _look_at_texts(pairs: pl.DataFrame) -> pl.DataFrame:
    """Put beside each pair what its checks ask for."""
    texts = squash_texts(pairs)
    whole = texts.select(pl.concat_str(_TEXTS, separator="\n")).to_series()
    return texts.with_columns(
        near_duplicate=pl.Series(find_near_duplicates(whole, pairs["prompt_id"])),
        in_circle=pl.Series(_in_circles(texts), dtype=pl.Boolean),
    )


def _in_circles(texts: pl.DataFrame) -> list[bool]:
    """Say of each pair whether it lies on a circle of three or more answers to one prompt."""
    edges: dict[str, dict[str, set[str]]] = {}
    rows = texts.select("prompt_id", "same_chosen", "same_rejected").rows()
    for prompt, better, worse in rows:
        edges.setdefault(prompt, {}).setdefault(better, set()).add(worse)
    return [
        len(edges[prompt]) > 2 and better not in edges[prompt].get(worse, ()) and better != worse
        and _reaches(edges[prompt], worse, better)
        for prompt, better, worse in rows
    ]  # fmt: skip


def _reaches(edges: dict[str, set[str]], start: str, goal: str) -> bool:
    seen, left = {start}, [start]
    while left:
        for answer in edges.get(left.pop(), ()):
            if answer == goal:
                return True
            if answer not in seen:
                seen.add(answer)
                left.append(answer)
    return False


def tokenizer_of(model: Any) -> "PreTrainedTokenizerBase":
    """Give the tokenizer of a model by name, of a loaded one, of (model, tokenizer), or the tokenizer itself."""
    if isinstance(model, tuple):
        return model[1]
    if hasattr(model, "apply_chat_template"):
        return model
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise SdpoError("Checking tokens needs transformers. Install it: pip install 'sdpo[score]'") from None
    from sdpo_data.models import load_tokenizer

    return load_tokenizer(model if isinstance(model, str | Path) else model.config._name_or_path)


def look_at_tokens(looked: pl.DataFrame, pairs: pl.DataFrame, tokenizer: "PreTrainedTokenizerBase") -> pl.DataFrame:
    """Put beside each pair how its prompt is rendered, and the tokens of both sides, uncut."""
    rendered = [_rendered(row, tokenizer) for row in pairs.iter_rows(named=True)]
    unseen = [
        hidden(row, tokenizer) if one else [] for row, one in zip(pairs.iter_rows(named=True), rendered, strict=True)
    ]
    prompts = [one[0] if one else None for one in rendered]
    usable = pl.Series([one is not None for one in rendered])
    encoded = encode_pairs(pairs.filter(usable), tokenizer, 10**9, "cut")
    templated = bool(tokenizer.chat_template)
    alone = [
        None if prompt is None
        else len(tokenizer(prompt, add_special_tokens=not (templated and form == MESSAGES))["input_ids"])
        for prompt, form in zip(prompts, pairs["format"], strict=True)
    ]  # fmt: skip
    own = looked.with_columns(
        rendered=usable,
        stable=pl.Series([one[1] if one else None for one in rendered], dtype=pl.Boolean),
        alone=pl.Series(alone, dtype=pl.Int64),
        hidden=pl.Series(unseen, dtype=pl.List(pl.String)),
    )
    sides = encoded.select(
        "pair_id", "prompt_ids", "chosen_ids", "rejected_ids",
        prompt_tokens=pl.col("prompt_ids").list.len().cast(pl.Int64),
        chosen_tokens=pl.col("chosen_ids").list.len().cast(pl.Int64),
        rejected_tokens=pl.col("rejected_ids").list.len().cast(pl.Int64),
    )  # fmt: skip
    return own.join(sides, on="pair_id", how="left", maintain_order="left")


def _rendered(row: dict, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, bool] | None:
    """Render a prompt, and say whether both its answers begin with it; None where the template cannot."""
    if row["format"] != MESSAGES or not tokenizer.chat_template:
        return row["prompt"] if row["format"] != MESSAGES else "", True
    try:
        begin, *sides = render_pair(row, tokenizer)
    except SdpoError:
        return None
    return begin, all(side.startswith(begin) for side in sides)


def _token_checks(tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Check]:
    special = [token for token in tokenizer.all_special_tokens if token]
    has_special = pl.any_horizontal(pl.col(_TEXTS).str.contains_any(special)) if special else pl.lit(value=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    room = max_length - pl.col("prompt_tokens")
    truncated = f"at {max_length:,} tokens it is dropped or loses its end: raise max_length, or count the loss"
    return [
        Check(
            "template cannot render", "wrong", ~pl.col("rendered"),
            "their roles or order are not what the model knows: drop them",
        ),
        Check(
            "tools not shown", "wrong", pl.col("hidden").list.contains("tools"),
            "the chat template leaves them out: use a model whose template renders tools, or drop the pairs",
        ),
        Check(
            "tool calls not shown", "wrong", pl.col("hidden").list.contains("tool calls"),
            "the chat template leaves them out, and with them what the answer does: another model, or drop the pairs",
        ),
        Check(
            "template not prefix-stable", "wrong", ~pl.col("stable"),
            "a prompt with its answer does not begin with the prompt: part of the prompt is scored as the answer",
        ),
        Check(
            "tokens merged at the boundary", "look", pl.col("stable") & (pl.col("alone") > pl.col("prompt_tokens")),
            "prompt and answer share a token, scored as the answer: begin the answer where a word begins",
        ),
        Check(
            "doubled BOS", "wrong", doubled("prompt_ids", bos),
            "strip it from the prompt: tokenizer or template adds its own",
        ),
        Check(
            "doubled EOS", "wrong", doubled("chosen_ids", eos) | doubled("rejected_ids", eos),
            "strip it from the answers: encoder or template adds its own",
        ),
        Check(
            "special token in a text", "look", has_special,
            "it is read as the token, not as its letters: remove it unless it is meant",
        ),
        Check("prompt fills the length", "look", pl.col("prompt_tokens") >= max_length, truncated),
        Check("chosen truncated", "look", pl.col("chosen_tokens") > room, truncated),
        Check("rejected truncated", "look", pl.col("rejected_tokens") > room, truncated),
    ]  # fmt: skip


def doubled(column: str, token: int | None) -> pl.Expr:
    """Whether `token` stands twice in a row."""
    if token is None:
        return pl.lit(value=False)
    both = (pl.element() == token) & (pl.element().shift(1) == token)
    return pl.col(column).list.eval(both).list.any()


def _length_bias(looked: pl.DataFrame, chosen: str, rejected: str, unit: str) -> tuple:
    """Say how often the chosen answer is the longer one, against a half."""
    length = (lambda side: pl.col(side).str.len_chars()) if unit == "characters" else pl.col
    longer = looked.select(
        "pair_id", "prompt_id", difference=length(chosen).cast(pl.Int64) - length(rejected).cast(pl.Int64)
    ).filter(pl.col("difference").is_not_null() & (pl.col("difference") != 0))
    n, won = longer.height, longer.filter(pl.col("difference") > 0)
    if n < FEW:
        return "length bias", "fine", 0, 0.0, None, f"too few to say: {n} pairs have answers of different length"
    share = won.height / n
    by_prompt = longer.group_by("prompt_id").agg(off=((pl.col("difference") > 0) - share).sum())
    stderr = math.sqrt((by_prompt["off"] ** 2).sum()) / n
    measured = f"the chosen answer is the longer one in {100 * share:.1f} ± {100 * stderr:.1f} % of {n:,} pairs"
    if abs(share - 0.5) < CLEAR * stderr:
        return "length bias", "fine", 0, 0.0, None, f"{measured}: not distinguishable from a half"
    middle = longer["difference"].median()
    verdict = f"{measured} (median difference {middle:+,.0f} {unit}): length alone tells much of the label"
    first = (won if won.height else longer)["pair_id"][0]
    return "length bias", "look", won.height, won.height / looked.height, first, verdict
