import gzip
import itertools
import json
import re

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo_data.decontaminate import (
    DecontaminateConfig,
    count_contamination,
    decontaminate_pairs,
    touched_items,
)
from sdpo_data.formats import read_row
from sdpo_data.matching import find_contamination
from sdpo_data.ngrams import hash_at, hash_grams, read_words
from sdpo_data.pairs import read_pairs
from sdpo_data.tables import CONTAMINATION, DOCUMENTS, PAIRS, SdpoError, check

SEVEN = "one two three four five six seven"
EIGHT = f"{SEVEN} eight"
SIXTEEN = f"{EIGHT} nine ten eleven twelve thirteen fourteen fifteen sixteen"


def pairs_of(*prompts: str, chosen: str = "yes", rejected: str = "no", source: str = "s") -> pl.DataFrame:
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt in prompts]
    return pl.DataFrame([{**read_row(row)[1][0], "source": source} for row in rows], PAIRS)


def documents_of(*texts: str, task: str = "t") -> pl.DataFrame:
    return pl.DataFrame([("p", task, f"i{n}", text) for n, text in enumerate(texts)], DOCUMENTS, orient="row")


def rules(prompt: str, document: str, **sides: str) -> set[str]:
    return set(find_contamination(pairs_of(prompt, **sides), documents_of(document))["rule"])


# --- words


def test_words_are_runs_of_letters_and_digits():
    words = read_words(pl.Series(["", "Don't (STOP)\nnow 42", "É “ok” cafe\u0301 日本。", "...", "end"]))
    shown = [words.show(place, place) for place in range(len(words.codes))]
    assert shown == ["Don", "t", "STOP", "now", "42", "é", "ok", "café", "日", "本", "end"]
    assert words.text.tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 4]
    assert words.opens.tolist() == [True, False, False, True, False, True, *[False] * 4, True]
    assert words.closes.tolist() == [False, False, True, False, True, *[False] * 4, True, True]


@pytest.mark.parametrize(
    "one, other",
    [("Größe", "GRÖSSE".replace("SS", "ß")), ("don't stop", "DON\u2019T -- stop"), ("ﬁne", "fine"), ("ＡＢＣ", "abc"),
     ("e\u0301te\u0301", "été"), ("日本", "日 本")],
)  # fmt: skip
def test_the_same_words_written_in_other_ways_have_one_code(one, other):
    assert read_words(pl.Series([one])).codes.tolist() == read_words(pl.Series([other])).codes.tolist()


def test_the_first_word_opens_and_a_long_word_is_known_by_its_length_too():
    words = read_words(pl.Series(["a" * 26 + " " + "a" * 25]))
    assert words.opens.tolist() == [True, False]
    assert len(set(words.codes.tolist())) == 2


@given(st.lists(st.text("abcdefghABC019é", min_size=1, max_size=23), min_size=1, max_size=40))
def test_words_have_one_code_exactly_if_they_are_one_word(words):
    codes = read_words(pl.Series([" ".join(words)])).codes.tolist()
    assert len(codes) == len(words)
    assert len(set(codes)) == len({word.lower() for word in words})


@given(st.lists(st.sampled_from("abc"), min_size=0, max_size=30), st.integers(1, 14))
def test_runs_of_words_have_one_hash_exactly_if_they_are_the_same_words(letters, size):
    codes = read_words(pl.Series([" ".join(letters)])).codes
    runs = [tuple(letters[at : at + size]) for at in range(len(letters) - size + 1)]
    hashes = hash_grams(codes, size)
    assert len(hashes) == len(runs)
    assert len(set(hashes.tolist())) == len(set(runs))
    import numpy as np

    assert hash_at(codes, np.arange(len(runs)), size).tolist() == hashes.tolist()


# --- rules


@pytest.mark.parametrize(
    "prompt, document, expected",
    [
        # 8 words have one 8-gram: whole and covered at once
        (f"Say: {EIGHT.upper()}, please.", f"{EIGHT}?", {"question", "8-gram"}),
        # 16 words have 9 8-grams; the first 12 words cover 5 of them (5/9 >= 0.5), the first 11 only 4
        (" ".join(SIXTEEN.split()[:12]), SIXTEEN, {"8-gram"}),
        (" ".join(SIXTEEN.split()[:11]), SIXTEEN, set()),
        # 8 of 9 words: 1 of 2 8-grams, just half
        (EIGHT, f"{EIGHT} nine", {"8-gram"}),
        # 13 of 16 words: 6 of 9 8-grams, and one 13-gram
        (" ".join(SIXTEEN.split()[:13]), SIXTEEN, {"8-gram", "13-gram"}),
        # 13 of 30 words: 6 of 23 8-grams only
        (" ".join(SIXTEEN.split()[:13]), SIXTEEN + " a b c d e f g h i j k l m n", {"13-gram"}),
        (SIXTEEN, SIXTEEN, {"question", "8-gram", "13-gram"}),
        # all 8-grams are there, but not one after the other
        (f"{' '.join(SIXTEEN.split()[:15])}. {' '.join(SIXTEEN.split()[1:])}", SIXTEEN, {"8-gram", "13-gram"}),
        # short: a whole sentence or line of the prompt, not a part of one
        (f"Hello. {SEVEN}? Thanks.", SEVEN, {"question"}),
        (f"Hello\n- {SEVEN}\nThanks.", f"{SEVEN}?", {"question"}),
        (f"Hello {SEVEN}. Thanks.", SEVEN, set()),
        (f"Hello. {SEVEN} Thanks.", SEVEN, set()),
        ("Are you here? I am. Good", "I am. Good", {"question"}),
        ("Why? Oh no.", "Oh no.", set()),  # under 3 words
        ("Why? Oh no dear.", "Oh no dear.", {"question"}),
        ("", "!", set()),
    ],
)
def test_each_rule_by_hand(prompt, document, expected):
    found = find_contamination(pairs_of(prompt or "x"), documents_of(document, "and now for something else entirely"))
    assert set(found["rule"]) == expected


def test_a_long_document_counts_in_the_answers_too_and_a_short_one_does_not():
    assert rules("x", EIGHT, rejected=f"So: {EIGHT}!") == {"question", "8-gram"}
    assert rules("x", SEVEN, rejected=SEVEN) == set()


def test_a_document_does_not_match_across_prompt_and_answer_or_two_pairs():
    half, rest = " ".join(EIGHT.split()[:4]), " ".join(EIGHT.split()[4:])
    assert rules(half, EIGHT, chosen=rest) == set()
    pairs = pairs_of(half, rest)
    assert find_contamination(pairs, documents_of(EIGHT)).is_empty()


def test_the_halves_of_a_document_in_prompt_and_answer_add_up():
    # of 9 8-grams words 1-10 hold 3 and words 8-15 one; together 4; with word 16 it is 5
    words = SIXTEEN.split()
    assert rules(" ".join(words[:10]), SIXTEEN, chosen=" ".join(words[7:15])) == set()
    assert rules(" ".join(words[:10]), SIXTEEN, chosen=" ".join(words[7:16])) == {"8-gram"}


def test_what_matched_is_shown_as_it_stands_in_the_pair():
    found = find_contamination(pairs_of(f"Well: {EIGHT.title()}, then."), documents_of("no such thing", EIGHT))
    assert found.schema == CONTAMINATION
    assert found.drop("pair_id").rows() == [("t", "i1", rule, EIGHT.title()) for rule in ("8-gram", "question")]


def test_messages_and_the_system_message_are_searched():
    row = {"prompt": [{"role": "system", "content": EIGHT}, {"role": "user", "content": f"Hm.\n{SEVEN}?"}],
           "chosen": "a", "rejected": "b"}  # fmt: skip
    pairs = pl.DataFrame([{**read_row(row)[1][0], "source": "s"}], PAIRS)
    assert pairs["format"].to_list() == ["messages"]
    found = find_contamination(pairs, documents_of(EIGHT, SEVEN))
    assert found.select("item_id", "rule").rows() == [("i0", "8-gram"), ("i0", "question"), ("i1", "question")]


WORD = st.sampled_from(["a", "b", "c", "dd", "E"])
SENTENCES = st.lists(st.lists(WORD, min_size=1, max_size=20).map(" ".join), min_size=1, max_size=3).map(". ".join)


def by_hand(prompt: str, answers: list[str], document: str, coverage: float) -> set[str]:
    """The three rules in plain Python."""
    split = lambda text: re.findall(r"\w+", text.lower())  # noqa: E731
    grams = lambda words, n: {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}  # noqa: E731
    texts, wanted = [split(text) for text in (prompt, *answers)], split(document)
    found = set()
    if any(grams(text, 13) & grams(wanted, 13) for text in texts):
        found.add("13-gram")
    if eights := grams(wanted, 8):
        held = set.union(*(grams(text, 8) for text in texts)) & eights
        found |= {"8-gram"} if len(held) >= coverage * len(eights) else set()
        whole = any(tuple(wanted) in grams(text, len(wanted)) for text in texts)
    else:
        sentences = [split(sentence) for sentence in prompt.split(". ")]
        whole = len(wanted) >= 3 and any(
            list(itertools.chain(*sentences[i:j])) == wanted
            for i in range(len(sentences))
            for j in range(i + 1, len(sentences) + 1)
        )
    return found | ({"question"} if whole else set())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=3, unique_by=lambda both: both[0]),
    st.lists(SENTENCES, min_size=1, max_size=4),
    st.sampled_from([0.3, 0.5, 1.0]),
)
def test_the_rules_are_those_of_a_plain_loop(texts, documents, coverage):
    pairs = pl.concat([pairs_of(prompt, chosen=chosen, rejected="zzz") for prompt, chosen in texts])
    got = find_contamination(pairs, documents_of(*documents), coverage)
    expected = {
        (pair_id, f"i{number}", rule)
        for pair_id, (prompt, chosen) in zip(pairs["pair_id"], texts, strict=True)
        for number, document in enumerate(documents)
        for rule in by_hand(prompt, [chosen, "zzz"], document, coverage)
    }
    assert set(got.select("pair_id", "item_id", "rule").rows()) == expected
    assert got.height == len(expected)


@pytest.mark.parametrize("items, expected", [(10, {f"i{n}" for n in range(10)}), (11, {"i3"})])
def test_what_over_ten_items_share_is_boilerplate(items, expected):
    # 20 words that all begin with and 10 of their own: 13 8-grams of the first kind, 10 of the second. Shared by 10
    # items, 13 of 23 are over a half, so the pair that holds the fourth touches all ten.
    preamble = " ".join(f"shared{n}" for n in range(20))
    texts = [f"{preamble} {' '.join(f'own{item}x{n}' for n in range(10))}" for item in range(items)]
    found = find_contamination(pairs_of(f"Look: {texts[3]}!"), documents_of(*texts))
    assert set(found.filter(pl.col("rule") == "8-gram")["item_id"]) == expected
    assert set(found.filter(pl.col("rule") == "question")["item_id"]) == {"i3"}


def test_many_texts_of_one_item_are_not_boilerplate():
    documents = documents_of(*(f"{EIGHT} choice{n}" for n in range(20))).with_columns(item_id=pl.lit("one"))
    assert set(find_contamination(pairs_of(EIGHT), documents)["item_id"]) == {"one"}


def test_documents_that_share_all_their_words_are_counted(caplog):
    caplog.set_level("WARNING", "sdpo_data")
    assert find_contamination(pairs_of(EIGHT), documents_of(*[EIGHT] * 11, *[SEVEN] * 12, "x")).is_empty()
    assert "23 of 24 documents share all their words with over 10 others: not matched" in caplog.messages
    assert "1 of 24 documents have under 3 words: not matched" in caplog.messages


def test_many_chunks_find_what_one_does(monkeypatch):
    pairs = pl.concat([pairs_of(*(f"{n} {EIGHT} {n}" for n in range(50))), pairs_of("nothing here")])
    whole = find_contamination(pairs, documents_of(SEVEN, EIGHT))
    monkeypatch.setattr("sdpo_data.ngrams.CHUNK", 100)
    assert find_contamination(pairs, documents_of(SEVEN, EIGHT)).equals(whole)
    assert whole["pair_id"].unique(maintain_order=True).to_list() == pairs["pair_id"][:50].to_list()


def test_no_pairs_or_no_words_are_no_contamination():
    for pairs, documents in ((pairs_of("x")[:0], documents_of(EIGHT)), (pairs_of("x"), documents_of("", "?"))):
        found = find_contamination(pairs, documents)
        assert found.schema == CONTAMINATION
        assert found.is_empty()
        assert count_contamination(found, pairs).is_empty()
        assert touched_items(found, pairs).is_empty()


def test_documents_with_a_column_missing_are_refused():
    with pytest.raises(SdpoError, match=r"documents is missing column 'item_id'"):
        find_contamination(pairs_of("x"), documents_of("x").drop("item_id"))


# --- tables


def two_sources() -> tuple[pl.DataFrame, pl.DataFrame]:
    pairs = pl.concat(
        [pairs_of(EIGHT, f"{EIGHT} again", "clean", source="a"), pairs_of(SIXTEEN, "clean too", source="b")]
    )
    return pairs, pl.concat([documents_of(EIGHT, task="x"), documents_of("none of this", SIXTEEN, task="y")])


def test_counts_are_of_pairs_by_source_and_task():
    pairs, documents = two_sources()
    got = count_contamination(find_contamination(pairs, documents), pairs)
    # SIXTEEN begins with EIGHT, so its pair holds both; EIGHT covers 1 of 9 8-grams of SIXTEEN
    assert got.rows() == [("a", "x", 2, 2, 0, 1, 3), ("b", "x", 1, 1, 0, 1, 2), ("b", "y", 1, 1, 1, 1, 2)]
    assert got.columns == ["source", "task", "question", "gram_8", "gram_13", "items", "pairs"]


def test_the_reverse_table_names_the_items_of_pairs_that_are_there():
    pairs, documents = two_sources()
    contamination = find_contamination(pairs, documents)
    assert touched_items(contamination, pairs).select("task", "item_id", "pairs", "sources").rows() == [
        ("x", "i0", 3, "a, b"), ("y", "i1", 1, "b")
    ]  # fmt: skip
    assert touched_items(contamination, pairs[:2]).select("task", "pairs").rows() == [("x", 2)]
    assert touched_items(contamination, pairs, ["13-gram"])["task"].to_list() == ["y"]


@given(st.sampled_from(["keep", "flag", "drop"]), st.lists(st.sampled_from([EIGHT, "clean", SIXTEEN]), min_size=1))
def test_what_is_dropped_and_what_is_kept_is_all_there_was(action, texts):
    pairs = pairs_of(*(f"{number}. {text}" for number, text in enumerate(texts)))
    got = decontaminate_pairs(pairs, documents_of(EIGHT), DecontaminateConfig(action=action))
    assert sorted([*got.pairs["pair_id"], *got.dropped["pair_id"]]) == sorted(pairs["pair_id"])
    hit = {pair for pair, text in zip(pairs["pair_id"], texts, strict=True) if text != "clean"}
    assert set(got.dropped["pair_id"]) == (hit if action == "drop" else set())
    assert set(got.contamination["pair_id"]) == hit
    assert set(got.dropped["reason"]) <= {"holds t"}


def test_only_the_rules_that_count_drop():
    pairs, documents = pairs_of(" ".join(SIXTEEN.split()[:13])), documents_of(SIXTEEN + " a b c d e f g h i j k l m n")
    for counted, left in ((["question", "8-gram"], 1), (["13-gram"], 0)):
        config = DecontaminateConfig(action="drop", rules=counted)
        assert decontaminate_pairs(pairs, documents, config).pairs.height == left


# --- the command


@pytest.fixture
def run(tmp_path, run_command):
    """A run of three pairs, of which the first two hold the one document there is."""
    rows = [{"prompt": text, "chosen": "ja ö", "rejected": "n", "source": "s"} for text in (EIGHT, f"a {EIGHT}", "x")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    code, _, err = run_command("sdpo_data.pairs", run, "--source", tmp_path / "rows.jsonl", "--hold-out", 0)
    assert code == 0, err
    documents_of(EIGHT, task="truthfulqa").write_parquet(run / "documents.parquet")
    return run


COMMAND = "sdpo_data.decontaminate"


def test_flagging_writes_the_table_and_leaves_the_pairs(run, run_command):
    before = (run / "pairs.parquet").read_bytes()
    code, out, err = run_command(COMMAND, run)
    assert code == 0, err
    assert "contaminated by question or 8-gram: 2 of 3 pairs; items touched: 1 of truthfulqa; dropped: 0." in out
    assert EIGHT in out
    found = check(pl.read_parquet(run / "contamination.parquet"), CONTAMINATION, "contamination")
    assert found.height == 4
    assert (run / "pairs.parquet").read_bytes() == before
    assert run_command(COMMAND, run)[1] == f"up to date: {run / 'contamination.parquet'}\n"


def test_keeping_writes_nothing(run, run_command):
    code, out, _ = run_command(COMMAND, run, "--action", "keep")
    assert code == 0
    assert "2 of 3 pairs" in out
    assert not (run / "contamination.parquet").exists()


def test_dropping_moves_the_pairs_and_force_brings_them_back(run, run_command):
    before = pl.read_parquet(run / "pairs.parquet")
    code, out, err = run_command(COMMAND, run, "--action", "drop")
    assert code == 0, err
    assert "dropped: 2." in out
    pairs, dropped = pl.read_parquet(run / "pairs.parquet"), pl.read_parquet(run / "dropped.parquet")
    assert pairs["prompt"].to_list() == ["x"]
    assert dropped.select("stage", "source", "reason").rows() == [("decontaminate", "s", "holds truthfulqa")] * 2
    assert run_command(COMMAND, run)[1] == f"up to date: {run / 'contamination.parquet'}\n"  # the action is remembered
    assert run_command("sdpo_data.pairs", run)[1] == f"up to date: {run / 'pairs.parquet'}\n"
    # once more: nothing is lost, nothing found twice
    assert run_command(COMMAND, run, "--force")[0] == 0
    assert pl.read_parquet(run / "dropped.parquet").equals(dropped)
    assert pl.read_parquet(run / "contamination.parquet").height == 4
    code, _, err = run_command(COMMAND, run, "--action", "flag")
    assert code == 2
    assert "run/contamination was made with action = 'drop', now it is 'flag'." in err
    assert run_command(COMMAND, run, "--action", "flag", "--force")[0] == 0
    assert pl.read_parquet(run / "pairs.parquet").sort("pair_id").equals(before.sort("pair_id"))
    assert pl.read_parquet(run / "dropped.parquet").is_empty()


def test_reading_the_pairs_again_makes_the_table_stale(run, run_command):
    run_command(COMMAND, run, "--action", "drop")
    assert run_command("sdpo_data.pairs", run, "--force")[0] == 0
    assert pl.read_parquet(run / "pairs.parquet").height == 3
    assert pl.read_parquet(run / "dropped.parquet").is_empty()
    code, _, err = run_command(COMMAND, run)
    assert code == 2
    assert "run/contamination is stale: pairs.parquet has changed since it was made. --force remakes it." in err


def test_scores_of_pairs_that_were_dropped_are_stale(run, run_command, tiny_model):
    assert run_command("sdpo_data.score", run, "--model", tiny_model)[0] == 0
    assert run_command(COMMAND, run, "--action", "drop")[0] == 0
    assert "run/scores is stale: pairs.parquet has changed" in run_command("sdpo_data.score", run)[2]


def test_lines_of_a_text_file_are_documents(run, run_command, tmp_path):
    (tmp_path / "mine.txt").write_text(f"not this one here\n\n{EIGHT}\n")
    code, _, err = run_command(COMMAND, run, "--documents", tmp_path / "mine.txt")
    assert code == 0, err
    assert set(pl.read_parquet(run / "contamination.parquet")["item_id"]) == {"3"}  # its line


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.txt", None, r"none\.txt does not exist\. Make it with: python -m sdpo_eval .*run --documents; or name"),
        ("empty.txt", b"\n \n", r"empty\.txt holds no document\."),
        ("broken.txt", b"\xff\xfe", r"broken\.txt can be read neither as Parquet nor as UTF-8 text"),
        ("broken.parquet", b"PAR1", r"broken\.parquet can be read neither as Parquet nor as UTF-8 text"),
    ],
)
def test_documents_that_cannot_be_read(run, run_command, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = run_command(COMMAND, run, "--documents", tmp_path / name)
    assert (code, out) == (2, "")
    assert re.search(message, err)


def test_a_run_without_documents_says_what_makes_them(run, run_command):
    (run / "documents.parquet").unlink()
    code, _, err = run_command(COMMAND, run)
    assert code == 2
    assert f"{run / 'documents.parquet'} does not exist. Make it with: python -m sdpo_eval {run} --documents" in err


def test_dropping_every_pair_is_refused(run, run_command):
    pl.read_parquet(run / "pairs.parquet").head(2).write_parquet(run / "pairs.parquet")
    before = (run / "pairs.parquet").read_bytes()
    code, _, err = run_command(COMMAND, run, "--action", "drop")
    assert code == 2
    assert "All 2 pairs are contaminated: decontaminate.action drop would leave none." in err
    assert (run / "pairs.parquet").read_bytes() == before


# --- real data


def benchmark(shared_data, name: str, column: str, task: str) -> pl.DataFrame:
    lines = gzip.decompress((shared_data / "benchmarks" / f"{name}.jsonl.gz").read_bytes()).splitlines()
    rows = [("p", task, str(number), json.loads(line)[column]) for number, line in enumerate(lines)]
    return pl.DataFrame(rows, DOCUMENTS, orient="row")


def test_a_source_that_holds_truthfulqa_questions_is_found_question_by_question(shared_data, tmp_path):
    """UltraFeedback's sample with every TruthfulQA question put in, as its long form had them."""
    truthful = benchmark(shared_data, "truthfulqa_mc", "question", "truthfulqa")
    others = [benchmark(shared_data, *one) for one in (("ARC-Challenge-test", "question", "arc"),
              ("mmlu_test", "question", "mmlu"), ("hellaswag_val", "ctx", "hellaswag"))]  # fmt: skip
    documents = pl.concat([truthful, *others])
    assert documents.height == 817 + 1172 + 14042 + 10042
    clean = read_pairs(shared_data / "prefs" / "ultrafeedback_sample" / "train.jsonl.gz")
    assert find_contamination(clean, documents).filter(pl.col("rule") != "13-gram").is_empty()
    dressings = ["{}", "Answer truthfully.\n{}\nThink first.", "Q: {} A:"]
    rows = [
        {"prompt": dressings[number % 3].format(text), "chosen": "c", "rejected": "r", "source": "truthful_qa"}
        for number, text in enumerate(truthful["text"])
    ]
    (tmp_path / "tqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = pl.concat([clean, read_pairs(tmp_path / "tqa.jsonl")])
    got = decontaminate_pairs(pairs, documents, DecontaminateConfig(action="drop"))
    assert got.pairs.equals(clean)
    assert touched_items(got.contamination, pairs).filter(pl.col("task") == "truthfulqa").height == 817
    counts = count_contamination(got.contamination, pairs).filter(pl.col("task") == "truthfulqa")
    assert counts.select("source", "question").rows() == [("truthful_qa", 817)]
    assert counts["gram_13"][0] < 300  # what 13-grams alone would have found


def test_truthfulqa_is_found_in_a_real_set(shared_data):
    truthful = benchmark(shared_data, "truthfulqa_mc", "question", "truthfulqa")
    pairs = read_pairs(shared_data / "prefs" / "llmbar" / "llmbar.jsonl.gz")
    found = find_contamination(pairs, truthful)
    assert set(found["matched"]) == {"How many planets are there in our solar system"}
