"""Pairs with tools: what a model may call is read, hashed, shown to the model, and missed where it is not shown."""

import json
import logging

import polars as pl
import pytest

from sdpo_data.doctor import check_pairs
from sdpo_data.encode import encode_pairs
from sdpo_data.export import ExportConfig, export_steps
from sdpo_data.formats import read_row
from sdpo_data.messages import pair_ids, plain_texts
from sdpo_data.models import load_tokenizer
from sdpo_data.pairs import read_pairs
from sdpo_data.repair import fix_pairs
from sdpo_data.tables import PAIRS, PARTITION, SdpoError, check

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def call(name: str, **arguments: object) -> dict:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


ROWS = [  # TRL's form; the calls' arguments differ, which Arrow would fill up with nulls
    {"prompt": [user("Weather in Rome?")], "tools": [WEATHER, CLOCK],
     "chosen": [call("weather", city="Rome")], "rejected": [call("clock")]},
    {"prompt": [user("How late?"), call("clock"), {"role": "tool", "name": "clock", "content": "12:30"}],
     "chosen": [{"role": "assistant", "content": "Half past twelve."}],
     "rejected": [call("clock", zone=2)], "tools": json.dumps([CLOCK])},
    {"prompt": [user("Hello.")], "chosen": [{"role": "assistant", "content": "Hello!"}],
     "rejected": [{"role": "assistant", "content": "What?"}]},
]  # fmt: skip


@pytest.fixture
def tool_pairs(tmp_path) -> pl.DataFrame:
    path = tmp_path / "tools.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return read_pairs(path)


@pytest.fixture
def tool_tokenizer(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


# --- read


def test_the_ids_of_pairs_without_tools_are_those_of_before():
    """Computed with the code before tools were read."""
    ids = {"pair_id": "6f2dd5557818e7392636cdba7c996e99", "prompt_id": "4f2c4af2922cae325c7d16101b985f1f"}
    assert pair_ids(None, "p", "c", "r") == ids
    with_system = {"pair_id": "22a05f8256b06a1f9ff10c809153d5a9", "prompt_id": "ef728f58ecc865add20969c4b194bb80"}
    assert pair_ids("s", "p", "c", "r") == with_system
    others = [pair_ids(None, "p", "c", "r", tools) for tools in ("[1]", "[2]")]
    for name in ids:
        assert len({ids[name], *(other[name] for other in others)}) == 3


def test_tools_are_read_however_they_are_written():
    row = ROWS[0]
    ways = [row["tools"], json.dumps(row["tools"]), [json.dumps(tool) for tool in row["tools"]]]
    read = [read_row(row | {"tools": way})[1][0] for way in ways]
    assert json.loads(read[0]["tools"]) == row["tools"]
    assert read[1:] == read[:1] * 2
    for empty in (None, [], "", " ", "[]", "null"):
        pair = read_row(row | {"tools": empty})[1][0]
        assert (pair["tools"], pair["pair_id"]) == (
            None,
            read_row({k: v for k, v in row.items() if k != "tools"})[1][0]["pair_id"],
        )


@pytest.mark.parametrize("tools", ["{", "[1]", 3, {"name": "f"}, [[]], ["x"], [None], [{}], float("nan"), True])
def test_tools_that_are_none_are_a_reason(tools):
    assert read_row(ROWS[0] | {"tools": tools})[1] == ["tools are not a list of JSON schemas"]


def test_tools_make_text_a_dialogue_or_are_a_reason():
    row = {"prompt": "How late?", "chosen": "One.", "rejected": "Two.", "tools": [CLOCK]}
    assert json.loads(read_row(row)[1][0]["prompt"]) == [user("How late?")]
    assert read_row(row, "text")[1] == ["tools beside plain text"]


def test_llama_factory_s_calls_and_observations_are_read():
    turns = [("human", "How late?"), ("function_call", '{"name": "clock", "arguments": {}}'), ("observation", "12:30")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": json.dumps([CLOCK])}
    row |= {"chosen": {"from": "gpt", "value": "Half past."}, "rejected": {"from": "gpt", "value": "Late."}}
    (pair,) = read_row(row)[1]
    assert json.loads(pair["prompt"]) == [
        user("How late?"),
        {"role": "assistant", "content": "", "tool_calls": call("clock")["tool_calls"]},
        {"role": "tool", "content": "12:30"},
    ]
    row["conversations"][1]["value"] = "clock()"
    assert read_row(row)[1] == ["conversations is neither text nor a list of messages"] or isinstance(
        read_row(row)[1][0], str
    )


def test_our_own_pairs_read_back(tool_pairs, tmp_path):
    tool_pairs.write_parquet(tmp_path / "pairs.parquet")
    assert read_pairs(tmp_path / "pairs.parquet").equals(tool_pairs)


def test_a_table_of_before_has_no_tools(pairs):
    assert check(pairs.drop("tools"), PAIRS, "pairs").equals(pairs)
    with pytest.raises(SdpoError, match="pairs is missing column 'system'"):
        check(pairs.drop("system"), PAIRS, "pairs")


# --- shown to the model


@pytest.mark.real
def test_tokens_are_trl_s(tool_pairs, tool_tokenizer):
    from test_encode import prepared_by_trl

    for raw, pair in zip(ROWS, tool_pairs.iter_slices(1), strict=True):  # a set each, tools as text: Arrow adds keys
        sides = {name: [{"content": "", **m} for m in raw[name]] for name in ("prompt", "chosen", "rejected")}
        tools = {"tools": json.dumps(json.loads(pair["tools"][0]))} if "tools" in raw else {}
        expected = prepared_by_trl([raw | sides | tools], tool_tokenizer, None)[0]
        ours = encode_pairs(pair, tool_tokenizer, 9999, "drop").row(0, named=True)
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert ours[name] == expected[name]
    assert "<|im_start|>tools" in tool_tokenizer.decode(
        encode_pairs(tool_pairs, tool_tokenizer, 9999, "drop")["prompt_ids"][0]
    )


def test_tools_change_the_prompt_s_tokens_and_calls_the_answer_s(tool_pairs, tool_tokenizer, caplog):
    caplog.set_level(logging.INFO)
    first = encode_pairs(tool_pairs, tool_tokenizer, 9999, "drop").row(0, named=True)
    said = {name: tool_tokenizer.decode(first[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")}
    assert said["prompt"].startswith("<|im_start|>tools\n[{")
    assert said["prompt"].endswith("Rome?<|im_end|>\n<|im_start|>assistant\n")
    assert said["chosen"] == '{"name": "weather", "arguments": {"city": "Rome"}}<|im_end|>\n'
    assert caplog.text == ""


def test_a_template_that_shows_no_tools_says_so(tool_pairs, tiny_model, tool_tokenizer, caplog):
    caplog.set_level(logging.INFO)
    deaf = load_tokenizer(tiny_model)
    encode_pairs(tool_pairs, deaf, 9999, "drop")
    assert (
        "the chat template does not show the pairs' tool calls and tools: the model does not read them" in caplog.text
    )
    found = {row["check"]: row for row in check_pairs(tool_pairs, deaf, 9999).iter_rows(named=True)}
    assert (found["tools not shown"]["severity"], found["tools not shown"]["pairs"]) == ("wrong", 2)
    assert (found["tool calls not shown"]["severity"], found["tool calls not shown"]["pairs"]) == ("wrong", 2)
    assert "use a model whose template renders tools" in found["tools not shown"]["remedy"]
    shown = check_pairs(tool_pairs, tool_tokenizer, 9999).filter(pl.col("check").str.contains("not shown"))
    assert shown["severity"].to_list() == ["fine", "fine"]


def test_without_a_chat_template_neither_is_shown(tool_pairs, tool_tokenizer):
    tool_tokenizer.chat_template = None
    found = check_pairs(tool_pairs, tool_tokenizer, 9999).filter(pl.col("check").str.contains("not shown"))
    assert found["pairs"].to_list() == [2, 2]


@pytest.mark.real
def test_smollm2_shows_no_tools(tool_pairs):
    found = check_pairs(tool_pairs, "embedded:smollm2-135m", 9999).filter(pl.col("check").str.contains("not shown"))
    assert found["severity"].to_list() == ["wrong", "wrong"]


# --- kept


def test_answers_that_differ_in_their_calls_alone_are_not_identical(tool_pairs, tool_tokenizer):
    said = plain_texts(tool_pairs, "chosen").to_list()
    assert said[0] == '{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}'
    assert said[1:] == ["Half past twelve.", "Hello!"]
    fixed = fix_pairs(tool_pairs, tool_tokenizer)
    assert (fixed.dropped.height, fixed.pairs.equals(tool_pairs)) == (0, True)
    findings = check_pairs(tool_pairs, tool_tokenizer, 9999)
    assert findings.filter(pl.col("severity") == "wrong").is_empty()


def test_a_repaired_pair_keeps_its_tools(tool_pairs, tool_tokenizer):
    doubled = tool_pairs.with_columns(
        chosen=pl.col("chosen").str.replace("Half past twelve.", "Half past twelve.<|im_end|>")
    )
    doubled = doubled[1:2]
    tool_tokenizer.chat_template = TOOL_TEMPLATE.replace("<|im_end|>\n{% endfor %}", "<|im_end|>{% endfor %}")
    fixed = fix_pairs(doubled, tool_tokenizer)
    assert fixed.cut == 1
    assert fixed.pairs.equals(tool_pairs[1:2])  # its ids too


def test_exported_tools_reach_trl_as_they_were(tool_pairs, tool_tokenizer, tmp_path):
    import datasets

    ids = tool_pairs["pair_id"].to_list()
    rows = [(pair_id, "s", 1, rank, 0.0, "d") for rank, pair_id in enumerate(ids[::-1])]
    partition = pl.DataFrame(rows, PARTITION, orient="row")
    export_steps(tool_pairs, partition, "org/model", tmp_path, ExportConfig(to=["trl", "axolotl", "datasets"]))
    for source in ("step_1.parquet", "step_1"):
        again = read_pairs(tmp_path / "steps" / source)
        assert again["pair_id"].to_list() == ids[::-1]
        assert again.drop("source").equals(tool_pairs.reverse().drop("source"))
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "steps/step_1.parquet"), split="train")
    assert loaded[2]["rejected"] == [{"role": "assistant", "content": "", "tool_calls": call("clock")["tool_calls"]}]
    assert json.loads(loaded[2]["tools"]) == [WEATHER, CLOCK]
    for name in ("llama_factory", "openrlhf"):
        with pytest.raises(SdpoError, match=f"export.to {name}: 2 of 3 pairs of step 1 cannot go there"):
            export_steps(tool_pairs, partition, "org/model", tmp_path, ExportConfig(to=[name]))
