"""Rows as the peers write them, and the pair each stands for."""

import gzip
import json
import logging

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpo_data.formats import read_row
from sdpo_data.pairs import PairsConfig, collect_pairs, read_pairs
from sdpo_data.tables import SdpoError


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def parts(pair: dict) -> tuple:
    """Prompt, chosen and rejected as they were before they became JSON, and the system message."""
    read = json.loads if pair["format"] == "messages" else str
    return *(read(pair[name]) for name in ("prompt", "chosen", "rejected")), pair["system"]


ONE_TURN = ([user("q")], [assistant("c")], [assistant("r")])
FORMS = {  # name of the form -> rows of it, each with what it says
    "prompt, chosen, rejected (TRL)": [
        ({"prompt": "q", "chosen": "c", "rejected": "r"}, ("q", "c", "r", None)),
        ({"prompt": [user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")]}, (*ONE_TURN, None)),
        ({"prompt": "q", "chosen": assistant("c"), "rejected": assistant("r")}, (*ONE_TURN, None)),
        ({"prompt": [user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")], "tools": "[]"},
         (*ONE_TURN, None)),
        ({"prompt": "q", "history": [["a", "b"]], "system": "s", "chosen": "c", "rejected": "r"},
         ([user("a"), assistant("b"), user("q")], *ONE_TURN[1:], "s")),
        ({"prompt": "q", "history": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                                     {"from": "gpt", "value": "b"}], "chosen": "c", "rejected": "r"},
         ([user("a"), assistant("b"), user("q")], *ONE_TURN[1:], "s")),
        ({"prompt": [user("q")], "chosen": {"role": "assistant", "tool_calls": [{"name": "f"}]}, "rejected": "r"},
         ([user("q")], [assistant("") | {"tool_calls": [{"name": "f"}]}], [assistant("r")], None)),
    ],
    "conversations, chosen, rejected (ShareGPT)": [
        ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "c"},
          "rejected": {"from": "gpt", "value": "r"}, "system": "s"}, (*ONE_TURN, "s")),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                            {"from": "gpt", "value": "b"}, {"from": "human", "value": "q"}],
          "chosen": {"from": "gpt", "value": "c"}, "rejected": {"from": "gpt", "value": "r"}},
         ([user("a"), assistant("b"), user("q")], *ONE_TURN[1:], "s")),
    ],
    "messages, rejected_response (ms-swift)": [
        ({"messages": [user("q"), assistant("c")], "rejected_response": "r"}, (*ONE_TURN, None)),
        ({"messages": [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("q"), assistant("c")],
          "rejected_response": "r"}, ([user("a"), assistant("b"), user("q")], *ONE_TURN[1:], "s")),
    ],
    "messages, rejected_messages (ms-swift)": [
        ({"messages": [user("q"), assistant("c")], "rejected_messages": [user("q"), assistant("r")]},
         (*ONE_TURN, None)),
    ],
    "messages, chosen, rejected (axolotl)": [
        ({"messages": [user("q")], "chosen": assistant("c"), "rejected": assistant("r")}, (*ONE_TURN, None)),
        ({"messages": [user("q")], "chosen": "c", "rejected": "r"}, (*ONE_TURN, None)),
    ],
    "instruction, chosen, rejected (alpaca)": [
        ({"instruction": "q", "input": "", "chosen": "c", "rejected": "r"}, (*ONE_TURN, None)),
        ({"instruction": "q", "input": "n", "chosen": "c", "rejected": "r", "history": [["a", "b"]], "system": "s"},
         ([user("a"), assistant("b"), user("q\nn")], *ONE_TURN[1:], "s")),
    ],
    "instruction, output: the better first (alpaca)": [
        ({"instruction": "q", "input": "n", "output": ["c", "r"]}, ([user("q\nn")], *ONE_TURN[1:], None)),
    ],
    "instruction, chosen_response, rejected_response (Argilla)": [
        ({"instruction": "q", "chosen_response": "c", "rejected_response": "r", "system": "s"}, (*ONE_TURN, "s")),
    ],
    "question, chosen, rejected (Intel)": [
        ({"system": "s", "question": "q", "chosen": "c", "rejected": "r"}, (*ONE_TURN, "s")),
    ],
    "input, chosen, rejected (OpenRLHF)": [
        ({"input": "q", "chosen": "c", "rejected": "r"}, (*ONE_TURN, None)),
        ({"input": [user("a"), assistant("b"), user("q")], "chosen": "c", "rejected": "r"},
         ([user("a"), assistant("b"), user("q")], *ONE_TURN[1:], None)),
    ],
    "chosen and rejected that begin alike (TRL, HH)": [
        ({"chosen": "\n\nHuman: q\n\nAssistant: c", "rejected": "\n\nHuman: q\n\nAssistant: r"}, (*ONE_TURN, None)),
        ({"chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")],
          "messages": [user("q"), assistant("c")]}, (*ONE_TURN, None)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("form, row, expected", [(form, *one) for form, rows in FORMS.items() for one in rows])
def test_a_row_of_each_form_becomes_its_pair(form, row, expected):
    got, (pair,) = read_row(row)
    assert got == form
    assert parts(pair) == expected


@pytest.mark.parametrize("form, row, expected", [(form, *one) for form, rows in FORMS.items() for one in rows])
def test_a_row_of_each_form_survives_a_table_with_all_columns(form, row, expected):
    """Parquet fills the columns of the other forms with nulls."""
    others = {name for rows in FORMS.values() for other, _ in rows for name in other} - {"prompt"}
    got, (pair,) = read_row(dict.fromkeys(others) | row)
    assert got == form
    assert parts(pair) == expected


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "q", "chosen": "c", "rejected": "r", "tools": {"name": "f"}},
         "tools are not a list of JSON schemas"),
        ({"prompt": [user("q"), 3], "chosen": "c", "rejected": "r"}, "prompt is neither text nor a list of messages"),
        ({"conversations": "q", "chosen": assistant("c"), "rejected": assistant("r")},
         "conversations is not a list of messages"),
        ({"conversations": [{"from": "function_call", "value": "f"}], "chosen": "c", "rejected": "r"},
         "prompt is neither text nor a list of messages"),
        ({"messages": [user("q")], "rejected_response": "r"}, "messages do not end with the chosen answer"),
        ({"messages": "q", "rejected_response": "r"}, "messages do not end with the chosen answer"),
        ({"messages": [user("q"), assistant("c")], "rejected_response": "c"}, "identical answers"),
        ({"messages": [user("q"), assistant("c")], "rejected_messages": "r"},
         "no prompt, and the answers are neither text nor lists of messages"),
        ({"instruction": "q", "chosen_response": "c", "rejected_response": 3},
         "rejected is neither text nor a list of messages"),
        ({"prompt": "q", "answers": ["a", "b"]}, "fewer than two rated answers"),
        ({"prompt": "q", "answers": ["a", "b"], "ratings": [1]}, "2 answers with 1 ratings"),
        ({"prompt": "q", "answers": ["a", "b"], "ratings": [1, None]}, "fewer than two rated answers"),
        ({"prompt": "q", "answers": ["a", "b"], "ratings": [3, 3.0]}, "tie"),
        ({"prompt": "q", "answers": ["a", 3], "ratings": [3, 2]}, "rejected is neither text nor a list of messages"),
        ({"prompt": "q", "answers": ["a", "a"], "ratings": [3, 2]}, "identical answers"),
        ({"prompt": "q", "system": 1, "answers": ["a", "b"], "ratings": [3, 2]}, "system is not text"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_pair_says_why(row, reason):
    assert read_row(row)[1] == [reason]


# --- several answers

LONG_FORM = {  # UltraFeedback: overall 6.5, 8, 4, 8
    "instruction": "q",
    "completions": [
        {"response": text, "overall_score": score, "fine-grained_score": 1.0, "model": "m"}
        for text, score in (("a", 6.5), ("b", 8), ("c", 4.0), ("d", 8.0))
    ],
}


def answers(choose: str, row: dict = LONG_FORM, seed: int = 0) -> list:
    """Chosen and rejected text of each pair with their ratings, or the reason there is none."""
    found = read_row(row, choose=choose, seed=seed)[1]
    sides = ("chosen", "rejected")
    return [
        one if isinstance(one, str)
        else (*(json.loads(one[side])[0]["content"] for side in sides), *(one[f"rating_{side}"] for side in sides))
        for one in found
    ]  # fmt: skip


def test_the_best_of_rated_answers_is_set_against_the_worst():
    # b and d are both the best: the first of them is taken
    assert read_row(LONG_FORM)[0] == "a prompt with rated or ranked answers (UltraFeedback)"
    assert answers("best_worst") == [("b", "c", 8.0, 4.0)]


def test_the_best_is_set_against_one_drawn_from_those_below_it():
    drawn = [answers("best_random", seed=seed) for seed in range(20)]
    assert {pairs[0] for pairs in drawn} == {("b", "a", 8.0, 6.5), ("b", "c", 8.0, 4.0)}  # never d, which is as good
    assert drawn[3] == answers("best_random", seed=3)


def test_every_two_answers_make_a_pair_but_those_rated_alike():
    # best first: b 8, d 8, a 6.5, c 4
    assert answers("all") == [
        "tie", ("b", "a", 8.0, 6.5), ("b", "c", 8.0, 4.0), ("d", "a", 8.0, 6.5), ("d", "c", 8.0, 4.0),
        ("a", "c", 6.5, 4.0),
    ]  # fmt: skip


def test_an_answer_without_a_rating_is_counted_where_all_are_asked_for():
    row = {"prompt": "q", "answers": ["a", "b", "c"], "ratings": [2, float("nan"), 5]}
    # 3 twos; two of them hold b, which has no rating
    assert answers("all", row) == [("c", "a", 5.0, 2.0), *["an answer without a rating"] * 2]
    assert answers("best_worst", row) == [("c", "a", 5.0, 2.0)]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}, ("b", "a", 2.0, 1.0)),
        ({"prompt": "q", "generations": ["a", "b"], "rating": ["1", "2"]}, ("b", "a", 2.0, 1.0)),
        ({"prompt": "q", "all_generated_responses": ["a", "b"], "all_rm_scores": [0.5, -1]}, ("a", "b", 0.5, -1.0)),
        ({"prompt": "q", "answers": ["a", "b", "c"], "ranks": [2, 3, 1]}, ("c", "b", None, None)),
        ({"prompt": "q", "answers": [{"answer": "a", "rank": 2}, {"answer": "b", "rank": 1}]}, ("b", "a", None, None)),
        ({"prompt": "q", "completions": [[assistant("a")], [assistant("b")]], "ratings": [0, 1]}, ("b", "a", 1.0, 0.0)),
        (
            {"instruction": "q", "completions": [
                {"response": "a", "annotations": {"honesty": {"Rating": "5"}, "truth": {"Rating": "2"}}},  # mean 3.5
                {"response": "b", "annotations": {"honesty": {"Rating": "4"}, "truth": {"Rating": "N/A"}}},  # mean 4
            ]},
            ("b", "a", 4.0, 3.5),
        ),
    ],
)  # fmt: skip
def test_ratings_and_ranks_are_read_where_they_stand(row, expected):
    assert answers("best_worst", row) == [expected]


@given(
    st.lists(st.sampled_from([1.0, 2.0, 3.0, None]), min_size=2, max_size=6),
    st.sampled_from(["best_worst", "best_random", "all"]),
)
def test_a_chosen_answer_is_always_rated_above_its_rejected_one(ratings, choose):
    row = {"prompt": "q", "answers": [f"a{place}" for place in range(len(ratings))], "ratings": ratings}
    found = answers(choose, row)
    assert len(found) == (len(ratings) * (len(ratings) - 1) // 2 if choose == "all" else 1)
    rated = [one for one in ratings if one is not None]
    for one in found:
        if not isinstance(one, str):
            assert one[2] > one[3]
            assert one[2] == ratings[int(one[0][1:])]
    if choose != "all" and len(set(rated)) > 1:
        assert found[0][2] == max(rated)


ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
ANSWER = st.text(max_size=3) | st.dictionaries(st.sampled_from(["response", "rating", "rank", "role", "content"]), ANY)


@given(st.lists(ANSWER | ANY, max_size=5), st.none() | st.lists(ANY, max_size=5), ANY)
def test_every_two_of_any_answers_are_a_pair_or_a_reason(given_answers, ratings, prompt):
    row = {"prompt": prompt, "answers": given_answers, "ratings": ratings}
    found = read_row(row, choose="all")[1]
    count = len(given_answers)
    unusable = prompt is None or not isinstance(prompt, str) or (ratings is not None and len(ratings) != count)
    assert len(found) == (1 if unusable or count < 2 else count * (count - 1) // 2)
    assert all(isinstance(one, str | dict) for one in found)


# --- shown, overridden, mixed


def write(folder, name: str, rows: list[dict]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(name: str, count: int) -> list[dict]:
    return [{"prompt": f"{name}{number}", "chosen": "c", "rejected": "r"} for number in range(count)]


def collect(*sources: str, **config):
    return collect_pairs(PairsConfig(source=list(sources), hold_out=0.0, **config))


def test_the_forms_of_a_source_are_shown(tmp_path, caplog):
    caplog.set_level(logging.INFO, "sdpo_data")
    rows = [*rows_of("p", 2), {"instruction": "q", "input": "", "chosen": "c", "rejected": "r"}, [1]]
    collect(write(tmp_path, "mixed", rows))
    assert (
        "mixed: 2 rows as prompt, chosen, rejected (TRL); 1 rows as instruction, chosen, rejected (alpaca); "
        "1 rows as no form known"
    ) in caplog.messages


def test_a_column_map_names_what_no_form_knows(tmp_path):
    rows = [{"q": "p", "good": "c", "bad": "r", "points": 7, "source": "inner"}]
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "rating_chosen": "points", "source": ""}
    pair = collect(write(tmp_path, "odd", rows), columns=columns).pairs.row(0, named=True)
    assert (pair["prompt"], pair["chosen"], pair["rejected"], pair["rating_chosen"]) == ("p", "c", "r", 7.0)
    assert pair["source"] == "odd"  # its own source column is left out


def test_a_column_map_goes_before_what_a_form_would_read(tmp_path):
    rows = [{"prompt": "raw", "clean": "p", "chosen": "c", "rejected": "r"}]
    assert collect(write(tmp_path, "both", rows), columns={"prompt": "clean"}).pairs["prompt"].to_list() == ["p"]


def test_a_column_map_may_swap_two_columns(tmp_path):
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
    pairs = collect(write(tmp_path, "turned", rows), columns={"chosen": "rejected", "rejected": "chosen"}).pairs
    assert pairs.select("chosen", "rejected").rows() == [("r", "c")]


@pytest.mark.parametrize("columns", [{"prompt": "q", "odd:prompt": "p"}, {"odd:prompt": "p", "prompt": "q"}])
def test_a_column_map_for_one_source_goes_before_that_for_all(tmp_path, columns):
    rows = [{"q": "of all", "p": "its own", "chosen": "c", "rejected": "r"}]
    pairs = collect(write(tmp_path, "odd", rows), write(tmp_path, "other", rows), columns=columns).pairs
    assert pairs["prompt"].to_list() == ["its own", "of all"]


def test_a_column_map_may_be_for_one_source(tmp_path):
    odd = write(tmp_path, "odd", [{"q": "p", "chosen": "c", "rejected": "r"}])
    pairs = collect(odd, write(tmp_path, "plain", rows_of("x", 1)), columns={"odd:prompt": "q"}).pairs
    assert pairs["prompt"].to_list() == ["p", "x0"]


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"columns": {"prompt": "q"}},
            r"pairs\.columns reads prompt from 'q', which no row of .*a\.jsonl has\. It has",
        ),
        ({"columns": {"promt": "q"}}, r"pairs\.columns has 'promt', which is none of our columns\. There are: prompt"),
        ({"columns": {"c:prompt": "q"}}, r"pairs\.columns has 'c:prompt', .*one of the sources a, b and a colon"),
        ({"caps": {"c": 1}}, r"pairs\.caps names 'c', which is no source\. There are: a, b\."),
        ({"weights": {"c": 1.0, "a": 1.0, "b": 2.0}}, r"pairs\.weights names 'c', which is no source"),
        ({"weights": {"a": 1.0}}, r"pairs\.weights has no weight for 'b'\. Give every source one, or leave weights"),
    ],
)
def test_a_map_that_fits_no_source_is_refused(tmp_path, config, message):
    sources = [write(tmp_path, name, rows_of(name, 2)) for name in "ab"]
    with pytest.raises(SdpoError, match=message):
        collect(*sources, **config)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"caps": {"a": 3}}, {"a": 3, "b": 8}),
        ({"caps": {"a": 3}, "limit": 5}, {"a": 3, "b": 5}),
        ({"caps": {"a": 6}, "limit": 5}, {"a": 5, "b": 5}),
        # 12 of a and 8 of b: 12/2 = 6 and 8/1 = 8 units, so 6 units: 12 and 6
        ({"weights": {"a": 2.0, "b": 1.0}}, {"a": 12, "b": 6}),
        # 12/1 = 12 and 8/3 = 2.67 units: 2 and 8
        ({"weights": {"a": 0.25, "b": 0.75}}, {"a": 2, "b": 8}),
        # a is capped at 3 first: 3/2 = 1.5 and 8/2 = 4 units: 3 and 3
        ({"weights": {"a": 2, "b": 2}, "caps": {"a": 3}}, {"a": 3, "b": 3}),
    ],
)
def test_sources_are_mixed_by_cap_and_weight(tmp_path, config, expected):
    got = collect(write(tmp_path, "a", rows_of("a", 12)), write(tmp_path, "b", rows_of("b", 8)), **config)
    assert dict(got.pairs.group_by("source").len().rows()) == expected
    assert got.pairs.height + got.dropped.height == 20
    assert set(got.dropped["reason"]) <= {"beyond pairs.limit", "beyond pairs.caps", "beyond pairs.weights"}


def test_a_mixture_is_of_sources_as_they_were_named_not_of_their_own_source_columns(tmp_path):
    inner = [row | {"source": f"s{number % 2}"} for number, row in enumerate(rows_of("a", 6))]
    got = collect(write(tmp_path, "a", inner), write(tmp_path, "b", rows_of("b", 2)), weights={"a": 1, "b": 1})
    assert dict(got.pairs.group_by(pl.col("prompt").str.head(1)).len().rows()) == {"a": 2, "b": 2}
    assert set(got.pairs["source"]) <= {"s0", "s1", "b"}


def test_columns_and_weights_are_flags_too(tmp_path, run_command):
    a = write(tmp_path, "a", [{"q": f"p{n}", "chosen": "c", "rejected": "r"} for n in range(8)])
    b = write(tmp_path, "b", rows_of("b", 8))
    flags = ["--source", a, b, "--columns", "a:prompt", "q", "--weights", "a", "3", "b", "1", "--hold-out", "0"]
    code, out, err = run_command("sdpo_data.pairs", tmp_path / "run", *flags)
    assert code == 0, err
    assert "5 beyond pairs.weights" not in err
    assert "6 beyond pairs.weights" in err  # 8/3 units: 8 of a, 2 of b
    assert "a: 8 rows as prompt, chosen, rejected (TRL)" in err
    code, out, err = run_command("sdpo_data.pairs", tmp_path / "run")  # remembered
    assert (code, out) == (0, f"up to date: {tmp_path / 'run' / 'pairs.parquet'}\n")


# --- real data


def test_real_files_read_as_their_form(shared_data, caplog):
    caplog.set_level(logging.INFO, "sdpo_data")
    names = {
        "llmbar/llmbar": "419 rows as prompt, chosen, rejected (TRL)",
        "piqa/piqa_train": "16,113 rows as prompt, chosen, rejected (TRL)",
        "hh_rlhf_test/harmless-base_test.original": "2,312 rows as chosen and rejected that begin alike (TRL, HH)",
        "llama_factory_dpo_demo/dpo_en_demo": "300 rows as prompt, chosen, rejected (TRL)",
    }
    for name, form in names.items():
        read_pairs(shared_data / "prefs" / f"{name}.jsonl.gz")
        assert f"{name.split('/')[1]}: {form}" in caplog.messages


def test_the_forms_of_the_peers_say_the_same_of_real_pairs(shared_data, tmp_path):
    """LLaMA-Factory's demo in ShareGPT's, ms-swift's, axolotl's and alpaca's form: the same pair ids."""
    path = shared_data / "prefs" / "llama_factory_dpo_demo" / "dpo_en_demo.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    says = {"user": "human", "assistant": "gpt", "system": "system"}
    forms: dict[str, list[dict]] = {"sharegpt": [], "swift": [], "axolotl": [], "alpaca": []}
    for row in rows:
        roles = {"human": "user", "gpt": "assistant", "system": "system"}
        turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["history"]]
        turns.append(user(row["prompt"]))
        both = {side: row[side] for side in ("chosen", "rejected")}
        rest = {"system": row["system"]}
        forms["sharegpt"].append(
            {"conversations": [{"from": says[turn["role"]], "value": turn["content"]} for turn in turns]}
            | {side: {"from": "gpt", "value": text} for side, text in both.items()} | rest
        )  # fmt: skip
        forms["swift"].append(
            {"messages": [*turns, assistant(row["chosen"])], "rejected_response": row["rejected"]} | rest
        )
        forms["axolotl"].append({"messages": turns} | {side: assistant(text) for side, text in both.items()} | rest)
        forms["alpaca"].append({"instruction": row["prompt"], "history": row["history"]} | both | rest)
    expected = read_pairs(path, PairsConfig(prompt_format="messages"))
    assert expected.height == 295  # 5 are duplicates
    assert sum(len(row["history"]) > 0 for row in rows) > 0
    for name, form in forms.items():
        assert read_pairs(write(tmp_path, name, form)).drop("source").equals(expected.drop("source")), name
