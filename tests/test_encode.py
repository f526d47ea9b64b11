import json
import logging
from types import SimpleNamespace

import polars as pl
import pytest

from sdpo_data.encode import ENCODED, encode_pairs
from sdpo_data.pairs import read_pairs
from sdpo_data.tables import PAIRS, SdpoError, check


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    """Byte-level, with a chat template and no BOS."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def words():
    """A token a word, numbered by hand: </s> 0, a 1, b 2, ... g 7, and ab 9. No chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, "[UNK]": 8, "ab": 9} | {word: number for number, word in enumerate("abcdefg", 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def pairs_of(tmp_path, *rows: dict, **config) -> pl.DataFrame:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_pairs(path)


def text(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def encode_words(tmp_path, words, row: dict, max_length: int, truncation: str) -> tuple:
    return encode_pairs(pairs_of(tmp_path, row), words, max_length, truncation).drop("pair_id").row(0)


# a b | c d e </s> and a b | f </s>: sides of 6 and 4 tokens
SIX_AND_FOUR = text("a b", " c d e", " f")


@pytest.mark.parametrize(
    "max_length, truncation, expected",
    [
        (6, "drop", ([1, 2], [3, 4, 5, 0], [6, 0], False, None)),
        (6, "cut", ([1, 2], [3, 4, 5, 0], [6, 0], False, None)),
        (5, "drop", ([1, 2], [3, 4, 5, 0], [6, 0], True, "over 5 tokens (chosen)")),
        (5, "cut", ([1, 2], [3, 4, 5], [6, 0], True, None)),
        (3, "drop", ([1, 2], [3, 4, 5, 0], [6, 0], True, "over 3 tokens (chosen and rejected)")),
        (3, "cut", ([1, 2], [3], [6], True, None)),
        (2, "cut", ([1, 2], [], [], True, "prompt fills all 2 tokens")),
    ],
)
def test_truncation_by_hand(tmp_path, words, max_length, truncation, expected):
    assert encode_words(tmp_path, words, SIX_AND_FOUR, max_length, truncation) == expected


def test_only_the_longer_side_is_named(tmp_path, words):
    got = encode_words(tmp_path, words, text("a b", " f", " c d e"), 5, "drop")
    assert got[3:] == (True, "over 5 tokens (rejected)")


def test_an_eos_that_is_there_is_not_doubled(tmp_path, words):
    got = encode_words(tmp_path, words, text("a", " b</s>", " c"), 9, "drop")
    assert got == ([1], [2, 0], [3, 0], False, None)


def test_the_answers_begin_where_either_of_them_changes_the_prompt_s_tokens(tmp_path, words):
    # a and b join to the word ab: f alone is the prompt, and the other answer begins with a
    got = encode_words(tmp_path, words, text("f a", "b", " c"), 9, "drop")
    assert got == ([6], [9, 0], [1, 3, 0], False, None)
    got = encode_words(tmp_path, words, text("f a", " c", "b"), 9, "drop")
    assert got == ([6], [1, 3, 0], [9, 0], False, None)


def test_a_prompt_that_leaves_no_token_of_its_own_is_a_problem(tmp_path, words):
    got = encode_words(tmp_path, words, text("a", "b", " c"), 9, "drop")
    assert got == ([], [9, 0], [1, 3, 0], False, "no token of the prompt stands before the answers")


def test_an_answer_without_a_token_is_a_problem(tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    deaf = Tokenizer(models.WordLevel({"a": 1, "b": 2}, unk_token="b"))
    deaf.normalizer, deaf.pre_tokenizer = normalizers.Replace("~", ""), pre_tokenizers.WhitespaceSplit()
    without_eos = PreTrainedTokenizerFast(tokenizer_object=deaf)
    got = encode_words(tmp_path, without_eos, text("a", " b", " ~"), 9, "drop")
    assert got == ([1], [2], [], False, "an answer has no token of its own")


def test_messages_without_a_chat_template_are_written_out_and_said(tmp_path, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    row = {"system": "Be brief.", "prompt": "Hello?", "chosen": "Yes.", "rejected": "No."}
    encoded = encode_pairs(pairs_of(tmp_path, row), bare, 99, "drop").row(0, named=True)
    assert bare.decode(encoded["prompt_ids"]) == "System: Be brief.\n\nUser: Hello?\n\nAssistant:"
    assert bare.decode(encoded["chosen_ids"]) == " Yes.<|im_end|>"
    assert "no chat template: messages are written out as 'User: ...' and 'Assistant: ...'" in caplog.text


def test_a_template_that_refuses_a_role_names_the_pair(tmp_path, tokenizer):
    strict = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    strict.chat_template = "{{ raise_exception('no system role') }}"
    pairs = pairs_of(tmp_path, {"system": "Be brief.", "prompt": "q", "chosen": "c", "rejected": "r"})
    with pytest.raises(
        SdpoError, match=rf"cannot render pair {pairs['pair_id'][0]} \(no system role\)\. Its roles must"
    ):
        encode_pairs(pairs, strict, 99, "drop")


def test_pairs_keep_their_order_and_cuts_are_counted(pairs, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    whole = encode_pairs(pairs, tokenizer, 999, "cut")
    assert whole.schema == ENCODED
    assert whole["pair_id"].to_list() == pairs["pair_id"].to_list()
    assert caplog.text == ""
    answer = pl.max_horizontal(pl.col("chosen_ids").list.len(), pl.col("rejected_ids").list.len())
    longest = whole.select(pl.col("prompt_ids").list.len() + answer).to_series()
    limit = int(longest.median())
    assert encode_pairs(pairs, tokenizer, limit, "cut")["truncated"].to_list() == (longest > limit).to_list()
    prompt, chosen, rejected = (whole[f"{name}_ids"].list.len() for name in ("prompt", "chosen", "rejected"))
    over = [(prompt + answer > limit).sum() for answer in (chosen, rejected)]
    assert over[0] != over[1]
    assert f"cut at {limit} tokens: {over[0]} chosen, {over[1]} rejected of 8 pairs" in caplog.text


def test_encoding_no_pairs_gives_no_rows(words):
    assert encode_pairs(PAIRS.to_frame(), words, 9, "drop").equals(ENCODED.to_frame())


# --- TRL's own preparation and collator as oracle


SENTENCE = "What is the capital of France? Paris, größer 大 1234."
DATA = {
    "messages": [
        {"prompt": [{"role": "user", "content": q}], "chosen": [{"role": "assistant", "content": c}],
         "rejected": [{"role": "assistant", "content": r}]}
        for q, c, r in [("Name a fruit.", "An apple.", " a stone "), ("2 + 2?", "4", "Five."), ("é", "大", "🙂\n")]
    ],
    "messages with a system message and turns": [
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"}, {"role": "user", "content": "And?"}],
         "chosen": [{"role": "assistant", "content": "Yes."}],
         "rejected": [{"role": "assistant", "content": "No."}, {"role": "user", "content": "Sure?"},
                      {"role": "assistant", "content": "No!"}]},
    ],
    "text": [text("Q: 2 + 2?\nA:", " 4<|im_end|>", " five"), text("Name a month. ", "June", "Monday")],
    "text cut anywhere, in the middle of tokens too": [
        text(SENTENCE[:at], SENTENCE[at:], " I do not know.") for at in range(1, len(SENTENCE))
    ],
}  # fmt: skip


@pytest.fixture(params=["no BOS", "BOS"])
def any_tokenizer(tokenizer, request):
    """The tiny tokenizer, or one that begins every raw text with a special token, as Llama's does."""
    if request.param == "no BOS":
        return tokenizer
    from tokenizers import processors

    bos = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    start = "<|endoftext|>"
    bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, bos.convert_tokens_to_ids(start))]
    )
    return bos


def prepared_by_trl(rows: list[dict], tokenizer, max_length: int | None) -> list[dict]:
    import datasets
    from trl import DPOTrainer

    datasets.disable_progress_bars()
    settings = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)  # all that _prepare_dataset looks at
    prepared = DPOTrainer._prepare_dataset(trainer, datasets.Dataset.from_list(rows), tokenizer, settings, "train")
    return prepared.to_list()


@pytest.mark.parametrize("form", DATA)
def test_tokens_and_boundary_are_trl_s(tmp_path, any_tokenizer, form):
    expected = prepared_by_trl(DATA[form], any_tokenizer, None)
    got = encode_pairs(check(pairs_of(tmp_path, *DATA[form]), PAIRS, "pairs"), any_tokenizer, 999, "drop")
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert got.select(columns).rows() == [tuple(row[column] for column in columns) for row in expected]
    assert got["problem"].is_null().to_list() == [len(row["prompt_ids"]) > 0 for row in expected]


@pytest.mark.parametrize("max_length", [3, 9, 20, 33])
def test_what_is_cut_is_what_trl_s_collator_cuts(tmp_path, tokenizer, max_length):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = DATA["text cut anywhere, in the middle of tokens too"] + DATA["text"]
    got = encode_pairs(pairs_of(tmp_path, *rows), tokenizer, max_length, "cut").filter(
        pl.col("prompt_ids").list.len() > 0
    )
    usable = got.filter(pl.col("problem").is_null())
    kept = [row for row in prepared_by_trl(rows, tokenizer, max_length) if row["prompt_ids"]]
    assert usable.height == len(kept)
    batch = DataCollatorForPreference(pad_token_id=0, max_length=max_length)(kept)
    for side, first in (("chosen", 0), ("rejected", len(kept))):
        for place, row in enumerate(usable.iter_rows(named=True), first):
            attended, completion = (batch[mask][place].bool() for mask in ("attention_mask", "completion_mask"))
            assert batch["input_ids"][place][attended].tolist() == row["prompt_ids"] + row[f"{side}_ids"]
            assert batch["input_ids"][place][completion].tolist() == row[f"{side}_ids"]
            assert row[f"{side}_ids"]
