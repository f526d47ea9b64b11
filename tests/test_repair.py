import json

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_doctor import FINE, chat, frame, pair

from sdpo_data.doctor import check_pairs
from sdpo_data.messages import pair_ids
from sdpo_data.repair import fix_pairs
from sdpo_data.tables import PAIRS, check

EOS = "<|im_end|>"  # of the tiny model, whose template closes every message with it


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def said(pairs: pl.DataFrame, side: str) -> list[str]:
    return [json.loads(one)[-1]["content"] if one.startswith("[") else one for one in pairs[side]]


def test_a_doubled_eos_is_cut_off_and_the_pair_gets_its_new_ids(tokenizer):
    rows = [chat("q", f"a{EOS}{EOS}", "b"), chat("r", "a", f"b{EOS}"), chat("s", f"a{EOS}a", f"mine{EOS}"), FINE]
    got = fix_pairs(frame(*rows), tokenizer)
    assert said(got.pairs, "chosen") == ["a", "a", f"a{EOS}a", "yes"]  # in the middle it is not doubled
    assert said(got.pairs, "rejected") == ["b", "b", "mine", "no!"]
    assert (got.cut, got.dropped.height) == (3, 0)
    assert got.pairs["pair_id"].to_list()[3:] == frame(*rows)["pair_id"].to_list()[3:]
    for row in got.pairs.iter_rows(named=True):
        ids = pair_ids(row["system"], row["prompt"], row["chosen"], row["rejected"])
        assert ids == {"pair_id": row["pair_id"], "prompt_id": row["prompt_id"]}
    findings = check_pairs(got.pairs, tokenizer).filter(pl.col("severity") != "fine")
    assert findings["check"].to_list() == ["special token in a text"]  # the one in the middle


def test_an_eos_that_is_not_doubled_stays(tokenizer):
    # plain text: the encoder takes the answer's own for the one it would add
    assert fix_pairs(frame(pair("q", f"a{EOS}", "b")), tokenizer).pairs["chosen"].to_list() == [f"a{EOS}"]
    assert fix_pairs(frame(pair("q", f"a{EOS}{EOS}", "b")), tokenizer).pairs["chosen"].to_list() == ["a"]
    assert fix_pairs(frame(chat("q", f"a{EOS}", "b"))).cut == 0  # nobody said which model


def test_a_doubled_bos_is_cut_off(tiny_model):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model, bos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    got = fix_pairs(frame(pair("<|endoftext|>q", "a", "b"), FINE), tokenizer)
    assert got.pairs["prompt"].to_list() == ["q", "p"]


def test_what_says_nothing_or_repeats_is_dropped_with_its_reason():
    rows = [pair("q", "a b", "c"), pair("q", "a  b", "c"), pair("r", " ", "c"), pair("s", "a", "a "), FINE]
    got = fix_pairs(frame(*rows))
    assert got.pairs["pair_id"].to_list() == [rows[0]["pair_id"], FINE["pair_id"]]
    assert got.dropped.select("stage", "pair_id", "reason").rows() == [
        ("fix", rows[1]["pair_id"], "repeated pair"), ("fix", rows[2]["pair_id"], "empty text"),
        ("fix", rows[3]["pair_id"], "identical answers"),
    ]  # fmt: skip
    assert json.loads(got.dropped["content"][0])["chosen"] == "a  b"


def test_what_may_be_meant_so_is_left_as_it_is():
    rows = [
        pair("q", "a", "b"),
        pair("q", "b", "a"),
        pair("r", "<think>x</think>a", "b", (1.0, 2.0)),
        pair("s", "a", "A"),
    ]
    got = fix_pairs(frame(*rows))
    assert got.pairs.equals(frame(*rows))


TEXT = st.sampled_from(["a", "a ", "b", " ", "", f"a{EOS}", f"{EOS}{EOS}", "ä"])


@given(st.lists(st.tuples(st.sampled_from("pq"), TEXT, TEXT, st.booleans()), max_size=6, unique=True))
def test_every_pair_is_kept_or_dropped_and_a_second_repair_finds_nothing(rows):
    from transformers import PreTrainedTokenizerFast

    tokenizer = _cached_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    pairs = frame(*((chat if as_chat else pair)(*texts) for *texts, as_chat in rows))
    got = fix_pairs(pairs, tokenizer)
    assert got.pairs.height + got.dropped.height == pairs.height
    check(got.pairs, PAIRS, "pairs")
    again = fix_pairs(got.pairs, tokenizer)
    assert (again.cut, again.dropped.height) == (0, 0)


def _cached_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, EOS: 1, "a": 2, "b": 3, "p": 4, "q": 5}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %} " + "{{ m.content }} " + EOS + "{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=EOS, chat_template=template)


def test_fix_repairs_the_run_once_and_reading_again_undoes_it(tmp_path, run_command, tiny_model):
    rows = [{"prompt": [{"role": "user", "content": f"p{n}"}], "chosen": f"yes{EOS}" if n == 1 else "yes",
             "rejected": "yes " if n == 2 else "no"} for n in range(12)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    flags = ["--source", tmp_path / "rows.jsonl", "--hold-out", "0", "--model", tiny_model]
    code, out, err = run_command("sdpo_data.pairs", run, *flags, "--fix")
    assert code == 0, err
    assert "--fix cut a doubled token off 1 pairs, dropped 1 (1 identical answers), and left the rest." in out
    assert "not found: empty text, identical answers" in out
    pairs, dropped = pl.read_parquet(run / "pairs.parquet"), pl.read_parquet(run / "dropped.parquet")
    assert pairs.height + dropped.height == 12
    assert dropped.select("stage", "reason").rows() == [("fix", "identical answers")]
    assert EOS not in "".join(pairs["chosen"])
    code, out, _ = run_command("sdpo_data.pairs", run, "--fix")
    assert "--fix cut a doubled token off 0 pairs, dropped 0 (none)" in out
    assert pl.read_parquet(run / "dropped.parquet").equals(dropped)
    pl.concat([pairs, frame(pair("late", "a", "a "))]).write_parquet(run / "pairs.parquet")
    run_command("sdpo_data.pairs", run, "--fix")  # finds another one: the first stays accounted for
    assert pl.read_parquet(run / "dropped.parquet").height == 2
    assert run_command("sdpo_data.pairs", run)[1] == f"up to date: {run / 'pairs.parquet'}\n"
    assert run_command("sdpo_data.pairs", run, "--force")[0] == 0
    assert pl.read_parquet(run / "pairs.parquet").height == 12
    assert pl.read_parquet(run / "dropped.parquet").is_empty()


def test_pairs_held_out_are_repaired_too(tmp_path, run_command, tiny_model):
    rows = [
        {"prompt": [{"role": "user", "content": f"p{n}"}], "chosen": f"yes{EOS}", "rejected": "no"} for n in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--source", tmp_path / "rows.jsonl", "--hold-out", "0.5", "--model", tiny_model]
    assert "cut a doubled token off 9 pairs" in run_command("sdpo_data.pairs", tmp_path / "run", *flags, "--fix")[1]
    held = pl.read_parquet(tmp_path / "run" / "held_out.parquet")
    assert held.height > 0
    assert EOS not in "".join(held["chosen"])


def test_a_fix_that_would_leave_nothing_is_refused(tmp_path, run_command, tiny_model):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "a "}))
    flags = ["--source", tmp_path / "rows.jsonl", "--hold-out", "0", "--model", tiny_model]
    assert run_command("sdpo_data.pairs", tmp_path / "run", *flags)[0] == 0
    before = (tmp_path / "run" / "pairs.parquet").read_bytes()
    code, _, err = run_command("sdpo_data.pairs", tmp_path / "run", "--fix")
    assert code == 2
    assert "--fix would leave none of 1 pairs (1 identical answers). Look at them with --check." in err
    assert (tmp_path / "run" / "pairs.parquet").read_bytes() == before
