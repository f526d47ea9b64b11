import json
import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo_data.doctor import check_pairs
from sdpo_data.duplicates import find_near_duplicates
from sdpo_data.messages import pair_ids
from sdpo_data.pairs import read_pairs
from sdpo_data.tables import FINDINGS, PAIRS, SdpoError


def pair(prompt: str, chosen: str, rejected: str, ratings: tuple = (None, None), **more) -> dict:
    """A pair as it stands in PAIRS, whatever reading would have said of it."""
    row = {"source": "s", "prompt": prompt, "chosen": chosen, "rejected": rejected, "format": "text", "system": None}
    return (
        row
        | pair_ids(None, prompt, chosen, rejected)
        | dict(zip(("rating_chosen", "rating_rejected"), ratings, strict=True))
        | more
    )


def chat(prompt: str, chosen: str, rejected: str, system: str | None = None) -> dict:
    texts = [
        json.dumps([{"role": role, "content": text}])
        for role, text in (("user", prompt), ("assistant", chosen), ("assistant", rejected))
    ]
    return pair(*texts) | {"format": "messages", "system": system}


def frame(*rows: dict) -> pl.DataFrame:
    return pl.DataFrame(rows, PAIRS)


def found(*rows: dict, model=None, max_length: int = 1024) -> dict[str, tuple[int, str]]:
    """Of each check that found something: how many pairs, and the prompt of its example."""
    pairs = frame(*rows)
    findings = check_pairs(pairs, model, max_length)
    assert findings.schema == FINDINGS
    prompts = dict(pairs.select("pair_id", "prompt").rows())
    return {
        row["check"]: (row["pairs"], prompts[row["pair_id"]])
        for row in findings.iter_rows(named=True)
        if row["severity"] != "fine" and row["check"] != "length bias"
    }


FINE = pair("p", "yes", "no!")


# --- as text


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([FINE], {}),
        ([FINE, pair("q", " \n", "b")], {"empty text": (1, "q")}),
        ([pair("q", "a  b", "a b\n"), FINE], {"identical answers": (1, "q")}),
        ([pair("q", "A b", "a b"), FINE], {}),  # case may be what is preferred
        ([FINE, pair("q", "a", "b"), pair("q", "b ", "a")], {"swapped answers": (2, "q")}),
        ([FINE, pair("q", "a", "b"), pair("q", "a", "c"), pair("q", "b", "c")], {}),
        ([FINE, pair("q", "a", "b"), pair("q", "b", "c"), pair("q", "c", "a"), pair("q", "a", "d")],
         {"preferences in a circle": (3, "q")}),
        ([FINE, pair("q", "a", "b"), pair("q", "b", "a"), pair("q", "b", "c"), pair("q", "c", "d")],
         {"swapped answers": (2, "q")}),
        ([FINE, pair("q", "a", "b"), pair("r", "b", "c"), pair("s", "c", "a")], {}),  # of three prompts
        ([FINE, pair("q", "a", "b"), pair("q", "a\n", "b")], {"repeated pair": (2, "q")}),
        ([FINE, pair("q", "a", "b", (1.0, 2.0)), pair("r", "a", "b", (2.0, 1.0)), pair("s", "a", "b", (3.0, 3.0)),
          pair("t", "a", "b", (1.0, None))],
         {"rating against label": (1, "q"), "ratings equal": (1, "s")}),
        ([FINE, pair("q", "<think>x</think>a", "b")], {"thinking on one side": (1, "q"), "thinking tags": (1, "q")}),
        ([FINE, pair("q", "<think>x</think>a", "<Think>y</Think>b")], {"thinking tags": (1, "q")}),
        ([FINE, pair("I think <b> of", "a", "b")], {}),
    ],
)  # fmt: skip
def test_each_check_of_texts_by_hand(rows, expected):
    assert found(*rows) == expected


def test_checks_read_what_messages_say():
    assert set(found(chat("q", "a b", "a  b"), chat("role", "a", "content"))) == {"identical answers"}


def test_every_check_has_its_row_and_shares_are_of_all_pairs():
    findings = check_pairs(frame(FINE, pair("q", " ", "b"), pair("r", "a", "b"), pair("s", "a", "b")))
    assert findings["check"].to_list() == [
        "empty text", "identical answers", "swapped answers", "preferences in a circle", "repeated pair",
        "near-duplicate", "rating against label", "ratings equal", "thinking on one side", "thinking tags",
        "length bias",
    ]  # fmt: skip
    assert findings.row(0)[1:4] == ("wrong", 1, 0.25)
    assert findings.filter(pl.col("severity") == "fine")["pairs"].sum() == 0


def test_a_wrong_frame_and_an_empty_one_are_refused():
    with pytest.raises(SdpoError, match="pairs is missing column 'chosen'"):
        check_pairs(frame(FINE).drop("chosen"))
    with pytest.raises(SdpoError, match=r"There is no pair to check\."):
        check_pairs(frame())


# --- near-duplicates

WORDS = [f"w{place}" for place in range(16)]


def test_near_duplicates_by_hand():
    # 16 words have 12 runs of 5. Another last word changes one run: 11 shared of 13 together, 0.85. Another word
    # in the middle changes five: 7 of 17, 0.41.
    text = " ".join(WORDS)
    last, middle = " ".join([*WORDS[:-1], "tea"]), " ".join([*WORDS[:9], "hog", *WORDS[10:]])
    got = find_near_duplicates(pl.Series([text, middle, last, "short one", "short one"]), pl.Series(list("abcde")))
    assert got.tolist() == [True, False, True, False, False]


def test_texts_without_words_are_like_no_other():
    assert find_near_duplicates(pl.Series(["", "", "!"]), pl.Series(["a", "b", "c"])).tolist() == [False] * 3


def test_texts_of_one_prompt_are_not_duplicates():
    texts = pl.Series([" ".join(WORDS), " ".join([*WORDS[:-1], "tea"])])
    assert not find_near_duplicates(texts, pl.Series(["a", "a"])).any()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 59), max_size=6)), min_size=1, max_size=12))
def test_near_duplicates_are_those_of_a_plain_comparison(edits):
    """Texts of 60 words of four kinds with some words replaced: all are found that have Jaccard 0.8 and more.

    In a cluster not every two are compared, so texts near a third but not near the first may be missed; nothing
    below the bound may be found.
    """
    texts = []
    for kind, places in edits:
        words = [f"w{kind}x{place}" for place in range(60)]
        for place in places:
            words[place] = f"other{place}"
        texts.append(words)
    runs = [{tuple(words[at : at + 5]) for at in range(56)} for words in texts]
    near = np.array([[len(a & b) / len(a | b) >= 0.8 for b in runs] for a in runs]) & ~np.eye(len(runs), dtype=bool)
    got = find_near_duplicates(pl.Series([" ".join(words) for words in texts]), pl.Series(range(len(texts))))
    assert not (got & ~near.any(axis=1)).any()
    alone_in_kind = [sum(kind == other for other, _ in edits) == 2 for kind, _ in edits]
    for place, two in enumerate(alone_in_kind):
        if two:
            assert got[place] == near[place].any()


# --- length bias


def bias(*rows: dict) -> dict:
    return check_pairs(frame(*rows)).row(-1, named=True)


def longer(prompt: str, *, wins: bool) -> dict:
    return pair(prompt, "aaa" if wins else "b", "b" if wins else "aaa")


def test_the_verdict_on_length_by_hand():
    # 15 of 20 prompts of one pair each: 0.75, standard error sqrt(0.75 * 0.25 / 20) = 0.0968; (0.75 - 0.5) is 2.6 of
    # them. One pair of equal lengths does not count, but is one of the pairs the share is of.
    got = bias(*(longer(f"p{n}", wins=n < 15) for n in range(20)), pair("same", "a", "b"))
    assert got["severity"] == "look"
    assert got["remedy"] == (
        "the chosen answer is the longer one in 75.0 ± 9.7 % of 20 pairs (median difference +2 characters): "
        "length alone tells much of the label"
    )
    assert (got["pairs"], got["share"]) == (15, 15 / 21)


def test_a_half_is_no_bias_and_few_pairs_say_nothing():
    got = bias(*(longer(f"p{n}", wins=n < 12) for n in range(20)))  # 0.6 is 0.9 standard errors off
    assert got["severity"] == "fine"
    assert got["remedy"].endswith("60.0 ± 11.0 % of 20 pairs: not distinguishable from a half")
    assert bias(*(longer(f"p{n}", wins=True) for n in range(9)))["remedy"].startswith("too few to say: 9 pairs")
    assert bias(*(longer(f"p{n}", wins=True) for n in range(10)))["severity"] == "look"


def test_pairs_of_one_prompt_are_not_counted_as_independent():
    # 4 prompts of 5 pairs that agree: 3 prompts for, 1 against. Per prompt the sum of (x - 0.75) is 5 * 0.25 or
    # -5 * 0.75: sqrt(3 * 1.25**2 + 3.75**2) / 20 = 0.2165, so 0.25 is 1.2 standard errors
    rows = []
    for prompt in range(4):
        sides = [("a" * (3 + n), "b") for n in range(5)]
        rows += [pair(f"p{prompt}", *(side if prompt < 3 else side[::-1])) for side in sides]
    assert math.isclose(math.sqrt(3 * 1.25**2 + 3.75**2) / 20, 0.2165, abs_tol=1e-4)
    assert bias(*rows)["remedy"].endswith("75.0 ± 21.7 % of 20 pairs: not distinguishable from a half")


# --- as tokens


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def with_template(tiny_model):
    """The tokenizer with another chat template."""
    from transformers import AutoTokenizer

    def make(template: str | None):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = template
        return tokenizer

    return make


def test_what_is_fine_as_tokens(tokenizer):
    assert found(FINE, chat("q", "a", "b", system="s"), model=tokenizer) == {}


def test_a_doubled_eos(tokenizer):
    # the template closes every message with <|im_end|>, which is EOS
    rows = [chat("q", "a<|im_end|>", "b"), chat("r", "a", "b"), pair("s", "a<|im_end|>", "b")]
    got = found(*rows, model=tokenizer)
    assert got["doubled EOS"][0] == 1
    assert json.loads(got["doubled EOS"][1])[0]["content"] == "q"  # of plain text the encoder drops the answer's own
    assert got["special token in a text"][0] == 2


def test_a_doubled_bos(tiny_model):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model, bos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    got = found(pair("<|endoftext|>q", "a", "b"), FINE, model=tokenizer)
    assert got["doubled BOS"] == (1, "<|endoftext|>q")


def test_a_template_that_is_not_prefix_stable(with_template):
    # as Qwen3's and DeepSeek's: the generation prompt opens a thinking block that answers do not have
    turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    unstable = with_template(turns + "{% if add_generation_prompt %}[assistant]<think>{% endif %}")
    got = found(chat("q", "a", "b"), FINE, model=unstable)
    assert got["template not prefix-stable"][0] == 1
    assert "tokens merged at the boundary" not in got  # it is the text that differs
    stable = with_template(turns + "{% if add_generation_prompt %}[assistant]{% endif %}")
    assert "template not prefix-stable" not in found(chat("q", "a", "b"), FINE, model=stable)


def test_a_template_that_cannot_render_a_pair(with_template):
    template = with_template("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
                             "{% endif %}{{ m.content }}{% endfor %}")  # fmt: skip
    got = found(chat("q", "a", "b", system="s"), chat("r", "ccc", "d"), model=template)
    assert got["template cannot render"][0] == 1
    assert "template not prefix-stable" not in got


def test_tokens_merged_at_the_boundary(tiny_model):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2, "ab": 3, "c": 4, "[UNK]": 5}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    # "c a" | "b" is read as c ab: the prompt alone has two tokens, of which one stays
    got = found(pair("c a", "b </s>", " c </s>"), pair("a", " b </s>", " c </s>"), model=tokenizer)
    assert got["tokens merged at the boundary"] == (1, "c a")


def test_truncation_is_counted_per_side(tokenizer):
    rows = [pair("q", "a" * 40, "b"), pair("r", "a" * 30, "b" * 40), pair("s" * 40, "ab", "b"), FINE]
    count = {name: n for name, (n, _) in found(*rows, model=tokenizer, max_length=20).items()}
    ids = lambda text: len(tokenizer(text)["input_ids"])  # noqa: E731
    assert min(ids("a" * 30), ids("s" * 40)) > 20 > ids("yes") + 3
    assert count == {
        "chosen truncated": 3, "rejected truncated": 2, "prompt fills the length": 1,
    }  # fmt: skip


def test_the_model_may_be_named_or_loaded(tiny_model):
    from sdpo_data.models import load_model

    findings = check_pairs(frame(FINE), tiny_model)
    assert findings.height == 22
    assert findings.row(-1, named=True)["remedy"].startswith("too few to say")
    loaded = load_model(tiny_model)
    assert check_pairs(frame(FINE), loaded[0]).equals(findings)
    assert check_pairs(frame(FINE), loaded).equals(findings)


# --- the command


def test_check_prints_a_table_and_is_not_remembered(tmp_path, run_command, tiny_model):
    rows = [
        {"prompt": f"p{n}", "chosen": "<think>a</think>yes" if n == 3 else "yes", "rejected": "no"} for n in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--source", tmp_path / "rows.jsonl", "--hold-out", "0", "--model", tiny_model]
    code, out, err = run_command("sdpo_data.pairs", tmp_path / "run", *flags, "--check")
    assert code == 0, err
    assert "what 12 pairs have" in out
    assert "thinking on one side" in out
    assert "length bias: the chosen answer is the longer one in 100.0 ± 0.0 % of 12 pairs (median difference" in out
    assert "not found: empty text, identical answers" in out
    made = (tmp_path / "run" / "pairs.parquet").read_bytes()
    code, out, _ = run_command("sdpo_data.pairs", tmp_path / "run")
    assert (code, out) == (0, f"up to date: {tmp_path / 'run' / 'pairs.parquet'}\n")
    code, out, _ = run_command("sdpo_data.pairs", tmp_path / "run", "--check", "--score.max-length", 3)
    assert code == 0
    assert "chosen truncated" in out
    assert (tmp_path / "run" / "pairs.parquet").read_bytes() == made


# --- real data


def test_real_sets_show_the_biases_they_are_known_for(shared_data):
    """The share of longer chosen answers as the index of the data gives it: 44 % in harmless, over half elsewhere."""
    folder = shared_data / "prefs"
    shares = {}
    for name in ("hh_rlhf_test/harmless", "ultrafeedback_sample/train", "orca_dpo_sample/validation"):
        findings = check_pairs(read_pairs(folder / f"{name}.jsonl.gz"))
        rows = {row["check"]: row for row in findings.iter_rows(named=True)}
        shares[name] = rows["length bias"]["share"]
        if name.startswith("ultra"):
            assert rows["ratings equal"]["pairs"] > 100
            assert rows["rating against label"]["severity"] == "fine"
    assert 0.40 < shares["hh_rlhf_test/harmless"] < 0.48
    assert shares["orca_dpo_sample/validation"] < 0.2  # there the chosen answer is mostly the shorter one
