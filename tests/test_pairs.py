import gzip
import hashlib
import json
import logging

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdpo_data.pairs import PairsConfig, collect_pairs, read_pairs
from sdpo_data.tables import PAIRS, SdpoError, check

PLAIN = {"prompt": "p", "chosen": "c", "rejected": "r"}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def messages(*contents: str) -> str:
    """A dialogue as PAIRS holds it: user first, then by turns."""
    turns = [said(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return json.dumps(turns, ensure_ascii=False)


def answer(content: str) -> str:
    return json.dumps([said("assistant", content)], ensure_ascii=False)


@pytest.fixture
def collect(tmp_path):
    """Write rows as JSON lines and collect their pairs, with nothing held out unless asked for."""

    def collect(*rows: object, name: str = "rows.jsonl", **config):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return collect_pairs(PairsConfig(**{"source": [str(path)], "hold_out": 0.0} | config))

    return collect


@pytest.fixture
def read(collect):
    """Read one row: the pair it becomes."""
    return lambda row, **config: collect(row, **config).pairs.row(0, named=True)


@pytest.fixture
def lose(collect):
    """Read one row that is no pair, beside one that is: the reason it is dropped for."""
    return lambda row, **config: collect(row, PLAIN | {"prompt": "fine"}, **config).dropped["reason"].to_list()


# --- identity


def test_ids_never_change(read):
    # blake2b, 16 bytes, of the JSON list [system, prompt, chosen, rejected], or of [system, prompt]
    pair = read(PLAIN)
    assert pair["pair_id"] == "6f2dd5557818e7392636cdba7c996e99"
    assert pair["pair_id"] == hashlib.blake2b(b'[null, "p", "c", "r"]', digest_size=16).hexdigest()
    assert pair["prompt_id"] == hashlib.blake2b(b'[null, "p"]', digest_size=16).hexdigest()
    chat = {"prompt": [said("user", "q")], "chosen": [said("assistant", "yes")], "rejected": [said("assistant", "no")]}
    assert read(chat | {"system": "Sei höflich."})["pair_id"] == "6b46625b10a9d9f8db97e9703a021d9c"


def test_an_id_is_of_the_content_alone(collect):
    one = collect(PLAIN, name="one.jsonl").pairs
    other = collect(PLAIN | {"id": 7, "prompt": "x"}, PLAIN | {"source": "elsewhere", "score_chosen": 3}).pairs
    assert other["pair_id"][1] == one["pair_id"][0]
    assert other["pair_id"][0] != one["pair_id"][0]
    assert one["source"][0] == "one"
    assert other["source"].to_list() == ["rows", "elsewhere"]


def test_an_id_tells_apart_what_moves_between_the_columns(collect):
    rows = [
        {"prompt": "ab", "chosen": "c", "rejected": "d"},
        {"prompt": "a", "chosen": "bc", "rejected": "d"},
        {"prompt": "ab", "chosen": "d", "rejected": "cd"},
        {"prompt": [said("user", "ab")], "chosen": [said("assistant", "c")], "rejected": [said("assistant", "d")]},
        {"prompt": "ab", "chosen": "c", "rejected": "d", "system": "s"},
    ]
    pairs = collect(*rows).pairs
    assert pairs["pair_id"].n_unique() == 5
    assert pairs["prompt_id"].n_unique() == 4  # the first and the third share theirs


def test_the_order_of_a_message_s_keys_and_a_null_key_do_not_change_the_pair(collect):
    plain = {"prompt": [said("user", "q")], "chosen": [said("assistant", "c")], "rejected": [said("assistant", "r")]}
    turned = plain | {"prompt": [{"content": "q", "name": None, "role": "user"}]}
    got = collect(plain, turned)
    assert got.pairs.height == 1
    assert got.dropped["reason"].to_list() == ["duplicate"]


# --- forms


HUMAN = "\n\nHuman: "
ASSISTANT = "\n\nAssistant:"
FORMS = {
    "plain text stays raw": (PLAIN, ("p", "c", "r", "text", None)),
    "messages": (
        {"prompt": [said("user", "q")], "chosen": [said("assistant", "c")], "rejected": [said("assistant", "r")]},
        (messages("q"), answer("c"), answer("r"), "messages", None),
    ),
    "a text prompt with message answers": (
        {"prompt": "q", "chosen": [said("assistant", "c")], "rejected": [said("assistant", "r")]},
        (messages("q"), answer("c"), answer("r"), "messages", None),
    ),
    "a message prompt with text answers": (
        {"prompt": [said("user", "q")], "chosen": " c", "rejected": "r"},
        (messages("q"), answer(" c"), answer("r"), "messages", None),
    ),
    "UltraFeedback: the answers repeat a text prompt": (
        {"prompt": "q", "chosen": [said("user", "q"), said("assistant", "c")],
         "rejected": [said("user", "q"), said("assistant", "r")]},
        (messages("q"), answer("c"), answer("r"), "messages", None),
    ),
    "the answers repeat a message prompt": (
        {"prompt": [said("user", "q")], "chosen": [said("user", "q"), said("assistant", "c")],
         "rejected": [said("user", "q"), said("assistant", "r")]},
        (messages("q"), answer("c"), answer("r"), "messages", None),
    ),
    "implicit prompt, messages": (
        {"chosen": [said("user", "q"), said("assistant", "c"), said("user", "more"), said("assistant", "d")],
         "rejected": [said("user", "q"), said("assistant", "c"), said("user", "more"), said("assistant", "e")]},
        (messages("q", "c", "more"), answer("d"), answer("e"), "messages", None),
    ),
    "implicit prompt, HH turns": (
        {"chosen": f"{HUMAN}q{ASSISTANT} c{HUMAN}more{ASSISTANT} the same d",
         "rejected": f"{HUMAN}q{ASSISTANT} c{HUMAN}more{ASSISTANT} the same e"},
        (messages("q", "c", "more"), answer("the same d"), answer("the same e"), "messages", None),
    ),
    "implicit prompt, text: the blank belongs to the answer's first word": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        ("The sky is", " blue.", " black.", "text", None),
    ),
    "HH with an explicit prompt": (
        {"prompt": f"{HUMAN}q{ASSISTANT}", "chosen": " c", "rejected": "r "},
        (messages("q"), answer("c"), answer("r"), "messages", None),
    ),
    "orca: a system message makes messages": (
        {"system": "Be brief.", "prompt": "q", "chosen": "c", "rejected": "r"},
        (messages("q"), answer("c"), answer("r"), "messages", "Be brief."),
    ),
    "an empty system message is none": (PLAIN | {"system": ""}, ("p", "c", "r", "text", None)),
    "a system message inside the prompt": (
        {"prompt": [said("system", "Be brief."), said("user", "q")], "chosen": "c", "rejected": "r"},
        (messages("q"), answer("c"), answer("r"), "messages", "Be brief."),
    ),
    "alpaca-eval: the second is preferred": (
        {"instruction": "i", "input": None, "output_1": "x", "output_2": "y", "preference": 2},
        (messages("i"), answer("y"), answer("x"), "messages", None),
    ),
    "alpaca-eval with an input": (
        {"instruction": "i", "input": "n", "output_1": "x", "output_2": "y", "preference": 1},
        (messages("i\n\nn"), answer("x"), answer("y"), "messages", None),
    ),
    "piqa: the second is right": (
        {"goal": "g", "sol1": "x", "sol2": "y", "label": 1},
        (messages("g"), answer("y"), answer("x"), "messages", None),
    ),
    "piqa: the first is right, as CSV has it": (
        {"goal": "g", "sol1": "x", "sol2": "y", "label": "0"},
        (messages("g"), answer("x"), answer("y"), "messages", None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_becomes_a_pair(read, form):
    row, expected = FORMS[form]
    pair = read(row)
    assert tuple(pair[name] for name in ("prompt", "chosen", "rejected", "format", "system")) == expected


def test_a_plain_prompt_becomes_a_user_message_where_asked(read):
    pair = read(PLAIN, prompt_format="messages")
    assert (pair["prompt"], pair["chosen"], pair["format"]) == (messages("p"), answer("c"), "messages")


def test_turns_stay_raw_where_asked(read):
    prompt = f"{HUMAN}q{ASSISTANT}"
    pair = read({"prompt": prompt, "chosen": " c", "rejected": " r"}, prompt_format="text")
    assert (pair["prompt"], pair["chosen"], pair["format"]) == (prompt, " c", "text")


@pytest.mark.parametrize("name", ["rating_{}", "score_{}", "{}_score", "{}_rating"])
def test_ratings_are_read_under_their_usual_names(read, name):
    pair = read(PLAIN | {name.format("chosen"): 7.5, name.format("rejected"): 3})
    assert (pair["rating_chosen"], pair["rating_rejected"]) == (7.5, 3.0)


@pytest.mark.parametrize("rating", [None, float("nan"), float("inf"), 10**400, "good", [3], ""])
def test_a_rating_that_is_no_number_is_none(read, rating):
    assert read(PLAIN | {"score_chosen": rating, "score_rejected": 2})["rating_chosen"] is None


# --- drops


@pytest.mark.parametrize(
    "row, reason",
    [
        ("text", "not a JSON object"),
        ([1], "not a JSON object"),
        (None, "not a JSON object"),
        ({"question": "q"}, "no columns of a known form (prompt, chosen, rejected)"),
        ({"prompt": "p", "chosen": "c"}, "no rejected"),
        (PLAIN | {"prompt": None}, "no prompt"),
        (PLAIN | {"chosen": None}, "no chosen"),
        (PLAIN | {"prompt": 3}, "prompt is neither text nor a list of messages"),
        (PLAIN | {"chosen": [{"role": "assistant"}]}, "chosen is neither text nor a list of messages"),
        (PLAIN | {"rejected": []}, "rejected is neither text nor a list of messages"),
        (PLAIN | {"prompt": " \n"}, "empty prompt"),
        (PLAIN | {"chosen": ""}, "empty chosen"),
        (PLAIN | {"rejected": [said("assistant", " ")]}, "empty rejected"),
        (PLAIN | {"rejected": "c"}, "identical answers"),
        (PLAIN | {"system": 3}, "system is not text"),
        (PLAIN | {"prompt": "\ud800"}, "text is not valid Unicode"),
        ({"chosen": "abc", "rejected": "xyz"}, "empty prompt"),
        (PLAIN | {"history": [["q"]]}, "history is not a list of turns"),
        (PLAIN | {"history": "q"}, "history is not a list of turns"),
        ({"chosen": 1, "rejected": 2}, "no prompt, and the answers are neither text nor lists of messages"),
        (
            {"prompt": [said("system", "a"), said("user", "q")], "system": "b", "chosen": "c", "rejected": "r"},
            "two system messages",
        ),
        ({"instruction": "i", "input": "", "output_1": "x", "output_2": "y", "preference": 0}, "tie"),
        ({"instruction": "i", "output_1": "x", "output_2": "y", "preference": None}, "tie"),
        ({"instruction": "i", "output_1": "x", "output_2": "x", "preference": 1}, "identical answers"),
        ({"instruction": 5, "output_1": "x", "output_2": "y", "preference": 1}, "prompt is not text"),
        ({"instruction": "i", "output_1": "x", "output_2": 5, "preference": 1}, "rejected is not text"),
        ({"instruction": "", "output_1": "x", "output_2": "y", "preference": 1}, "empty prompt"),
        ({"goal": "g", "sol1": "x", "sol2": "y", "label": -1}, "no label"),
        ({"goal": ["g"], "sol1": "x", "sol2": "y", "label": 0}, "prompt is not text"),
    ],
)
def test_a_row_that_is_no_pair_is_dropped_with_its_reason(lose, row, reason):
    assert lose(row) == [reason]


def test_a_system_message_is_not_lost_where_text_is_asked_for(lose):
    reasons = lose(PLAIN | {"system": "Be brief."}, prompt_format="text")
    assert reasons == ["a system message beside plain text"]


def test_a_source_s_name_that_is_not_valid_unicode_can_be_kept(collect):
    assert collect(PLAIN | {"source": "a\ud800"}).pairs["source"].to_list() == ["a?"]


def test_a_dropped_row_keeps_its_place_its_source_and_its_content(collect):
    dropped = collect(PLAIN, {"prompt": "größe", "source": "mine"}).dropped
    assert dropped.drop("content").rows() == [("pairs", "mine", 1, None, "no chosen")]
    assert json.loads(dropped["content"][0]) == {"prompt": "größe", "source": "mine"}


def test_a_line_that_is_not_json_costs_only_itself(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(PLAIN).encode()
    deep = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    path.write_bytes(b"\n".join([b"{broken", b'["\xff"]', b"", good, deep, b'{"prompt": NaN}']))
    got = collect_pairs(PairsConfig(source=[str(path)], hold_out=0.0))
    assert got.pairs.height == 1
    assert got.dropped.select("row", "reason").rows() == [
        (0, "not a JSON object"), (1, "not a JSON object"), (3, "not a JSON object"),
        (4, "prompt is neither text nor a list of messages"),
    ]  # fmt: skip
    assert got.dropped["content"].str.len_chars().to_list() == [8, 6, 20_000, 15]  # what can be shown of them
    assert got.dropped["content"][1] == '["?"]\n'


# --- repeated and contradictory pairs


def test_a_repeated_pair_keeps_its_first_source(tmp_path):
    for name in ("first", "second"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(PLAIN))
    got = collect_pairs(
        PairsConfig(source=[str(tmp_path / f"{name}.jsonl") for name in ("first", "second")], hold_out=0)
    )
    assert got.pairs["source"].to_list() == ["first"]
    assert got.dropped.select("source", "row", "reason").rows() == [("second", 0, "duplicate")]


def test_answers_labelled_both_ways_are_dropped_on_both_sides(collect):
    turned = {"prompt": "p", "chosen": "r", "rejected": "c"}
    other_prompt = turned | {"prompt": "q"}
    got = collect(PLAIN, PLAIN, other_prompt, turned)
    assert got.pairs["prompt"].to_list() == ["q"]
    assert got.dropped.select("row", "reason").rows() == [(row, "contradiction") for row in (0, 1, 3)]


def test_answers_that_only_join_to_the_same_text_do_not_contradict(collect):
    rows = [PLAIN | {"chosen": "ab", "rejected": "c"}, PLAIN | {"chosen": "bc", "rejected": "a"}]
    assert collect(*rows).pairs.height == 2


def test_several_answers_to_one_prompt_are_several_pairs(collect):
    assert collect(PLAIN, PLAIN | {"rejected": "worse"}, PLAIN | {"chosen": "r", "rejected": "worse"}).pairs.height == 3


# --- limit and hold-out


def rows_of(prompts: range, answers: int = 1) -> list[dict[str, str]]:
    return [{"prompt": f"p{p}", "chosen": f"c{a}", "rejected": "r"} for p in prompts for a in range(answers)]


def test_the_limit_is_of_each_source_and_counts_what_it_leaves_out(tmp_path):
    for name, rows in (("a", rows_of(range(9))), ("b", rows_of(range(4, 8))), ("c", rows_of(range(20, 22)))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    got = collect_pairs(PairsConfig(source=sources, limit=3, hold_out=0.0))
    # b repeats four of a's pairs: they are a's, and b has none left
    assert got.pairs["source"].value_counts().sort("source").rows() == [("a", 3), ("c", 2)]
    assert sorted(got.dropped.select("source", "reason").rows()) == [
        *[("a", "beyond pairs.limit")] * 6, *[("b", "duplicate")] * 4
    ]  # fmt: skip


def test_the_limit_is_drawn_by_the_seed_and_not_by_the_order(collect):
    rows = rows_of(range(40))
    drawn = [set(collect(*given, limit=8, seed=seed).pairs["pair_id"]) for given, seed in
             ((rows, 0), (rows[::-1], 0), (rows, 1))]  # fmt: skip
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_the_hold_out_never_splits_a_prompt(collect):
    got = collect(*rows_of(range(60), answers=3), hold_out=0.3)
    train, held = set(got.pairs["prompt_id"]), set(got.held_out["prompt_id"])
    assert not train & held
    assert got.held_out.height == 3 * len(held)
    assert got.pairs.height == 3 * len(train)
    assert 8 <= len(held) <= 28  # 60 draws at 0.3: 18, and 3 standard deviations of 3.5 either way


@pytest.mark.parametrize("hold_out", [0.05, 0.3, 0.5])
def test_rows_added_later_move_no_prompt(collect, hold_out):
    few, more = (collect(*rows_of(range(n)), hold_out=hold_out) for n in (50, 200))
    assert set(few.held_out["pair_id"]) <= set(more.held_out["pair_id"])
    assert set(few.pairs["pair_id"]) <= set(more.pairs["pair_id"])


def test_the_hold_out_is_drawn_by_the_seed(collect):
    held = [set(collect(*rows_of(range(60)), hold_out=0.3, seed=seed).held_out["pair_id"]) for seed in (0, 0, 1)]
    assert held[0] == held[1]
    assert held[0] != held[2]


def test_a_larger_share_holds_out_the_same_and_more(collect):
    few, more = (set(collect(*rows_of(range(60)), hold_out=share).held_out["pair_id"]) for share in (0.2, 0.5))
    assert few < more


def test_a_hold_out_of_everything_is_refused(collect):
    with pytest.raises(
        SdpoError, match=r"leaves no pair to train on: pairs\.hold_out 0\.999 keeps 2 out, dropped are 1 d"
    ):
        collect(*rows_of(range(2)), *rows_of(range(1)), hold_out=0.999)


# --- files


def write(rows: list[dict], folder, suffix: str):
    """Write rows as data.<suffix>; `folder` is one saved by datasets."""
    path = folder / f"data{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    elif suffix == ".csv":
        pl.DataFrame(rows).write_csv(path)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


TEXT_ROWS = [
    {
        "prompt": 'Say "a, b"\nand\tc',
        "chosen": " größer, 大きい 🙂",
        "rejected": "'no'",
        "score_chosen": 7.25,
        "source": "x",
    },
    {"prompt": "[1, 2]", "chosen": "null", "rejected": "NaN", "score_chosen": 3.0, "source": "y"},
]
MESSAGE_ROWS = [
    {"prompt": [said("user", f"q{i}\n"), said("assistant", "a"), said("user", "ü")], "chosen": [said("assistant", "c")],
     "rejected": [said("assistant", "r")], "system": system, "score_chosen": 1.5 + i}
    for i, system in enumerate(["Be brief.", None])
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv", "-folder"])
def test_text_is_the_same_in_every_format(tmp_path, suffix):
    expected = [("x", *[TEXT_ROWS[0][name] for name in ("prompt", "chosen", "rejected", "score_chosen")]),
                ("y", *[TEXT_ROWS[1][name] for name in ("prompt", "chosen", "rejected", "score_chosen")])]  # fmt: skip
    got = check(read_pairs(write(TEXT_ROWS, tmp_path, suffix)), PAIRS, "pairs")
    assert got.select("source", "prompt", "chosen", "rejected", "rating_chosen").rows() == expected
    assert got["format"].to_list() == ["text", "text"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json", ".parquet", "-folder"])
def test_messages_are_the_same_in_every_format(tmp_path, suffix):
    expected = read_pairs(write(MESSAGE_ROWS, tmp_path, ".jsonl"))
    assert expected["system"].to_list() == ["Be brief.", None]
    assert expected["format"].unique().to_list() == ["messages"]
    assert read_pairs(write(MESSAGE_ROWS, tmp_path, suffix)).drop("source").equals(expected.drop("source"))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", "-folder"])
def test_pairs_written_by_us_read_back_as_they_are(tmp_path, suffix):
    (tmp_path / "raw").mkdir()
    raw = [write(rows, tmp_path / "raw", f) for rows, f in ((TEXT_ROWS, ".jsonl"), (MESSAGE_ROWS, ".json"))]
    pairs = read_pairs(raw)
    assert sorted(pairs["format"].unique()) == ["messages", "text"]
    assert read_pairs(write(pairs.to_dicts(), tmp_path, suffix)).equals(pairs)


def test_two_files_of_one_name_are_two_sources(tmp_path):
    sources = []
    for folder, prompt in (("a", "p"), ("b", "q")):
        (tmp_path / folder).mkdir()
        sources.append(write([PLAIN | {"prompt": prompt}], tmp_path / folder, ".jsonl"))
    assert read_pairs(sources)["source"].to_list() == [str(source) for source in sources]


def test_several_sources_are_read_in_their_order(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(PLAIN | {"prompt": name * n}) for n in (1, 2)))
    pairs = read_pairs([tmp_path / f"{name}.jsonl" for name in "cab"])
    assert pairs["prompt"].to_list() == ["c", "cc", "a", "aa", "b", "bb"]
    assert pairs["source"].to_list() == ["c", "c", "a", "a", "b", "b"]


@pytest.mark.parametrize(
    "source, asked",
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:test", ("org/name", None, "test")),
        ("org/truthy-dpo-v0.1", ("org/truthy-dpo-v0.1", None, "train")),
    ],
)
def test_a_hub_id_may_name_a_split_and_a_version(monkeypatch, source, asked):
    calls = []
    monkeypatch.setattr("sdpo_data.sources.hub_dataset", lambda *given: calls.append(given) or [PLAIN])
    assert read_pairs(source)["source"].to_list() == [source]
    assert calls == [asked]


BROKEN = {
    r"none\.jsonl' is neither a file nor a hub dataset\. Give a path ending in one of \.jsonl, .*or embedded:": (
        "none.jsonl", None),
    r"rows\.txt has an unknown suffix\. It must be one of \.jsonl, \.jsonl\.gz, \.json, \.parquet, \.csv\.": (
        "rows.txt", b"{}"),
    r"rows\.parquet cannot be read \(.*Parquet": ("rows.parquet", b"PAR1 half"),
    r"rows\.json cannot be read \(Expecting value": ("rows.json", b"["),
    r"rows2\.json cannot be read \('utf-8' codec": ("rows2.json", b'["\xff"]'),
    r"rows3\.json cannot be read \(maximum recursion": ("rows3.json", b"[" * 100_000),
    r"rows4\.json holds a JSON dict, expected a list of rows\.": ("rows4.json", b"{}"),
    r"rows\.csv cannot be read \(invalid utf-8": ("rows.csv", b"prompt,chosen,rejected\na,\xff,c\n"),
    r"empty\.csv cannot be read \(empty CSV\)": ("empty.csv", b""),
    r"rows\.jsonl\.gz cannot be read \(Not a gzipped file": ("rows.jsonl.gz", b"{}"),
    r"half\.jsonl\.gz cannot be read \(Compressed file ended": ("half.jsonl.gz", gzip.compress(b"x" * 999)[:-12]),
    r"flipped\.jsonl\.gz cannot be read \(Error -3": (
        "flipped.jsonl.gz", gzip.compress(b"x")[:10] + b"\xff" * 20),
    r"empty\.jsonl gave no usable pair \(it is empty\)\.": ("empty.jsonl", b""),
    r"header\.csv gave no usable pair \(it is empty\)\.": ("header.csv", b"prompt,chosen,rejected\n"),
    r"other\.jsonl gave no usable pair \(2 no columns of a known form .*, 1 not a JSON object\)\.": (
        "other.jsonl", b'{"a": 1}\n{"b": 1}\n[]\n'),
}  # fmt: skip


@pytest.mark.parametrize("message", BROKEN)
def test_a_source_that_cannot_be_read_is_named(tmp_path, message):
    name, content = BROKEN[message]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SdpoError, match=message):
        read_pairs(tmp_path / name)


def test_a_source_without_pairs_is_named_though_another_has_some(tmp_path):
    (tmp_path / "full.jsonl").write_text(json.dumps(PLAIN))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SdpoError, match=r"empty\.jsonl gave no usable pair \(it is empty\)"):
        read_pairs([tmp_path / "full.jsonl", tmp_path / "empty.jsonl"])


def test_a_folder_that_datasets_did_not_save_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SdpoError, match=r"folder is not a folder saved by `datasets`"):
        read_pairs(tmp_path / "folder")


def test_a_folder_of_several_splits_asks_for_one(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([PLAIN])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(SdpoError, match=r"both holds the splits train, test\. Name one: .*/both/train"):
        read_pairs(tmp_path / "both")
    assert read_pairs(tmp_path / "both" / "train").height == 1


def test_reading_logs_nothing_of_the_rows(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "sdpo_data")
    read_pairs(write([PLAIN | {"prompt": "secret"}], tmp_path, ".jsonl"))
    assert "secret" not in caplog.text


# --- any rows at all


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[]), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CONTENT = st.sampled_from(["a", "b", "ab", "", " ", "\ud800", "\x00", "x" * 70_000]) | JSON
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.sampled_from(["a", "b", ""]) | CONTENT},
    optional={"name": st.none() | st.just("n") | JSON},
)
CELL = CONTENT | st.lists(MESSAGE | JSON, max_size=3) | st.lists(MESSAGE, min_size=1, max_size=3)
RATING = st.sampled_from([1, 2.5, "3", None, float("nan"), float("-inf"), 10**400]) | JSON
LIKELY = {  # beside any cell
    "preference": st.sampled_from([1, 2, 0, "1", 2.0]),
    "label": st.sampled_from([0, 1, "1", -1]),
    "format": st.sampled_from(["messages", "text"]),
    "output": st.lists(CELL, min_size=2, max_size=2),
    "responses": st.lists(CELL, max_size=4),
    "ratings": st.lists(RATING, max_size=4),
    "completions": st.lists(
        st.fixed_dictionaries({"response": CELL}, optional={"overall_score": RATING, "rank": RATING}) | CELL, max_size=4
    ),
}
FORM_COLUMNS = [
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("instruction", "output_1", "output_2", "preference"),
    ("goal", "sol1", "sol2", "label"),
    ("pair_id", "format", "prompt", "chosen", "rejected"),
    ("conversations", "chosen", "rejected"),
    ("messages", "rejected_response"),
    ("messages", "rejected_messages"),
    ("messages", "chosen", "rejected"),
    ("instruction", "input", "chosen", "rejected"),
    ("instruction", "chosen_response", "rejected_response"),
    ("instruction", "output"),
    ("prompt", "responses", "ratings"),
    ("instruction", "completions"),
]
EXTRA = st.sampled_from(
    ["prompt", "chosen", "system", "source", "history", "input", "score_chosen", "label", "tools", "messages", "ranks"]
)


@st.composite
def table_rows(draw) -> dict:
    names = [*draw(st.sampled_from(FORM_COLUMNS)), *draw(st.lists(EXTRA, max_size=2))]
    row = {name: draw(LIKELY.get(name, CELL) | CELL) for name in names}
    if "format" in row and draw(st.booleans()):
        row |= {name: json.dumps(row[name]) for name in ("prompt", "chosen", "rejected")}
    return row


@settings(max_examples=60, deadline=None)
@given(
    st.lists(table_rows() | JSON, max_size=8),
    st.lists(st.binary(max_size=20), max_size=2),
    st.sampled_from(["auto", "messages", "text"]),
    st.sampled_from(["best_worst", "best_random"]),  # all: see test_formats.py, whose rows stand for several pairs
)
def test_every_row_is_a_pair_or_held_out_or_dropped_with_a_reason(
    tmp_path_factory, rows, garbage, prompt_format, choose
):
    folder = tmp_path_factory.getbasetemp()
    rows = [*rows, PLAIN, PLAIN, PLAIN | {"prompt": "other"}]
    (folder / "any.json").write_text(json.dumps(rows))
    lines = [json.dumps(row).encode() for row in rows] + [line.replace(b"\n", b"") + b"x" for line in garbage]
    (folder / "any.jsonl").write_bytes(b"\n".join(lines))
    for name, count in (("any.json", len(rows)), ("any.jsonl", len(lines))):
        # by seed 2 "other" is trained on and "p" held out: neither table is empty
        config = PairsConfig(
            source=[str(folder / name)], hold_out=0.3, seed=2, prompt_format=prompt_format, choose=choose
        )
        got = collect_pairs(config)
        assert got.pairs.height + got.held_out.height + got.dropped.height == count
        assert got.dropped["row"].n_unique() == got.dropped.height
        assert got.dropped["reason"].null_count() == 0
        pairs = check(pl.concat([got.pairs, got.held_out]), PAIRS, "pairs")
        for pair in pairs.iter_rows(named=True):
            for name in ("prompt", "chosen", "rejected"):
                turns = json.loads(pair[name]) if pair["format"] == "messages" else [said("", pair[name])]
                assert any(message["content"].strip() for message in turns)
            assert pair["chosen"] != pair["rejected"]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.gz", ".csv", ".json", ".jsonl"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=4), st.floats(0.05, 1))
def test_a_damaged_file_is_read_or_refused_in_one_sentence(tmp_path, suffix, changes, kept):
    content = bytearray(write(TEXT_ROWS, tmp_path, suffix).read_bytes())
    for place, byte in changes:
        content[int(place * len(content))] = byte
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content[: int(kept * len(content)) + 1])
    said = ""
    try:
        check(collect_pairs(PairsConfig(source=[str(path)], hold_out=0)).pairs, PAIRS, "pairs")
    except SdpoError as error:
        said = str(error)
    assert not said or (str(path) in said and "\n" not in said)


def test_a_parquet_file_on_which_polars_panics_is_refused(tmp_path, monkeypatch):
    def panic(_: object) -> None:
        raise pl.exceptions.PanicException("called `Result::unwrap()`")

    monkeypatch.setattr(pl, "read_parquet", panic)
    with pytest.raises(SdpoError, match=r"data\.parquet cannot be read \(called `Result"):
        read_pairs(write(TEXT_ROWS, tmp_path, ".parquet"))


# --- real data


def test_the_implicit_form_of_hh_gives_the_pairs_of_the_explicit_one(shared_data):
    folder = shared_data / "prefs" / "hh_rlhf_test"
    implicit, explicit = (
        collect_pairs(PairsConfig(source=[str(folder / f"{name}.jsonl.gz")], hold_out=0.0))
        for name in ("harmless-base_test.original", "harmless")
    )
    assert implicit.pairs.height == 2308
    assert implicit.pairs.drop("source").equals(explicit.pairs.drop("source"))
    assert implicit.pairs["format"].unique().to_list() == ["messages"]
    assert implicit.dropped["reason"].to_list() == ["empty chosen"] * 4
    assert explicit.dropped.is_empty()
    roles = [[message["role"] for message in json.loads(prompt)] for prompt in implicit.pairs["prompt"]]
    assert all(turns[0] == turns[-1] == "user" for turns in roles)


def test_orca_keeps_its_system_message(shared_data):
    path = shared_data / "prefs" / "orca_dpo_sample" / "validation.jsonl.gz"
    raw = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    pairs = read_pairs(path)
    assert pairs["system"].to_list() == [row["system"] or None for row in raw]
    assert [json.loads(prompt) for prompt in pairs["prompt"]] == [[said("user", row["prompt"])] for row in raw]


def test_ultrafeedback_keeps_its_ratings(shared_data):
    path = shared_data / "prefs" / "ultrafeedback_sample" / "eval.jsonl.gz"
    raw = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    got = collect_pairs(PairsConfig(source=[str(path)], hold_out=0.0))
    kept = [row for number, row in enumerate(raw) if number not in set(got.dropped["row"])]
    assert got.dropped["reason"].to_list() == ["identical answers"]
    assert got.pairs.select("rating_chosen", "rating_rejected").rows() == [
        (row["score_chosen"], row["score_rejected"]) for row in kept
    ]
    assert got.pairs["prompt"].to_list() == [row["prompt"] for row in kept]
