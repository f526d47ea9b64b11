import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import logging
from collections import Counter

import polars as pl
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from sdpo_data import assets
from sdpo_data.tables import ITEMS, SdpoError
from sdpo_eval import documents as h4_documents
from sdpo_eval import h4
from sdpo_eval.documents import fingerprint, load_documents

ARC, HELLASWAG, MMLU, TRUTHFULQA = h4.TASKS.values()
QUESTION = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
SIZES = st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 12), min_size=1)


def write(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


@pytest.fixture
def small(monkeypatch):
    """ARC with two questions."""
    task = dataclasses.replace(ARC, n_full=2, shots=1, published={})
    monkeypatch.setitem(h4.TASKS, "arc_challenge", task)
    return task


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / ARC.files["train"], [QUESTION | {"question": "shot"}])
    write(tmp_path / ARC.files["test"], [QUESTION | {"id": 1}, QUESTION | {"id": 2, "question": "r"}])
    return tmp_path


# Selection


def test_the_same_items_as_ever():
    # the smallest sha256 of "arc_challenge/<row>"; of three subjects taking turns in the order of theirs
    assert h4.select_items({"arc_challenge": 1172}, 4) == [f"arc_challenge/{row}" for row in (962, 1012, 100, 741)]
    three = h4.select_items({"virology": 166, "anatomy": 135, "astronomy": 152}, 4)
    assert three == ["astronomy/122", "virology/79", "anatomy/111", "astronomy/51"]


@given(SIZES, st.integers(1, 60), st.integers(1, 60))
def test_a_smaller_limit_chooses_a_subset(sizes, one, two):
    few, many = sorted((one, two))
    assert h4.select_items(sizes, few) == h4.select_items(sizes, many)[:few]


@given(SIZES, st.integers(1, 60))
def test_subjects_take_turns(sizes, limit):
    chosen = h4.select_items(sizes, limit)
    assert len(set(chosen)) == len(chosen) == min(limit, sum(sizes.values()))
    counts = Counter(item.split("/")[0] for item in chosen)
    left = [counts[subject] for subject, size in sizes.items() if counts[subject] < size]  # not used up
    assert max(counts.values()) - min(left, default=max(counts.values())) <= 1


@given(SIZES)
def test_no_limit_is_every_item_once(sizes):
    every = {f"{subject}/{row}" for subject, size in sizes.items() for row in range(size)}
    chosen = h4.select_items(sizes, None)
    assert len(chosen) == len(every)
    assert set(chosen) == every


# Documents


def test_documents_keep_what_the_task_reads(small, folder):
    documents = load_documents(small, str(folder))
    assert documents == {
        "arc_challenge": {"train": [QUESTION | {"question": "shot"}], "test": [QUESTION, QUESTION | {"question": "r"}]}
    }


def test_mmlu_is_sorted_under_its_subjects(monkeypatch, tmp_path):
    task = dataclasses.replace(MMLU, n_full=3, shots=1, published={})
    rows = [{"subject": s, "question": q, "choices": list("wxyz"), "answer": 1} for s, q in ("ap", "bq", "ar")]
    write(tmp_path / "mmlu_dev.jsonl.gz", rows[:2])
    write(tmp_path / "mmlu_test.jsonl.gz", rows)
    documents = load_documents(task, str(tmp_path))
    assert {s: [d["question"] for d in splits["test"]] for s, splits in documents.items()} == {
        "a": ["p", "r"],
        "b": ["q"],
    }
    assert {s: [d["question"] for d in splits["dev"]] for s, splits in documents.items()} == {"a": ["p"], "b": ["q"]}


def test_a_missing_file(small, tmp_path):
    with pytest.raises(SdpoError, match=r"ARC-Challenge-train.jsonl.gz does not exist; ARC-Challenge is read from it"):
        load_documents(small, str(tmp_path))


def test_a_folder_that_is_none():
    with pytest.raises(SdpoError, match="no benchmark folder nowhere"):
        load_documents(ARC, "nowhere")


def test_half_a_task(folder):
    with pytest.raises(SdpoError, match=r"holds 1 train documents of ARC-Challenge, the task has 1,119"):
        load_documents(ARC, str(folder))


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b'{"a": 1}')[:-9], gzip.compress(b'{"a": 1')])
def test_a_broken_file(small, folder, content):
    (folder / small.files["test"]).write_bytes(content)
    with pytest.raises(SdpoError, match=r"ARC-Challenge-test.jsonl.gz cannot be read as JSON lines"):
        load_documents(small, str(folder))


def test_a_row_without_its_answer(small, folder):
    write(folder / small.files["test"], [QUESTION, {"question": "q", "choices": QUESTION["choices"]}])
    with pytest.raises(
        SdpoError, match=r"row 1 of ARC-Challenge's test documents lacks one of question, choices, answerKey"
    ):
        load_documents(small, str(folder))


def test_the_hub_gives_the_same_documents(small, folder, monkeypatch):
    asked = []

    def hub_dataset(repo, config, split):
        asked.append((repo, config, split))
        with gzip.open(folder / small.files[split]) as lines:
            return Dataset.from_list([json.loads(line) for line in lines])

    monkeypatch.setattr(assets, "hub_dataset", hub_dataset)
    assert load_documents(small, "hub") == load_documents(small, str(folder))
    assert asked == [("allenai/ai2_arc", "ARC-Challenge", "train"), ("allenai/ai2_arc", "ARC-Challenge", "test")]


def unreachable(*_):
    raise SdpoError("The hub did not answer.")


def test_truthfulqa_out_of_reach_is_said_and_left_out(folder, monkeypatch, caplog):
    monkeypatch.setattr(assets, "hub_dataset", unreachable)
    monkeypatch.setattr(assets, "require_hub", unreachable)
    with caplog.at_level(logging.WARNING):
        assert load_documents(TRUTHFULQA, str(folder)) is None
    assert "TruthfulQA is not asked, and H4 needs it. The hub did not answer." in caplog.text


def test_a_hub_that_answers_and_does_not_know_truthfulqa_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(assets, "hub_dataset", unreachable)
    monkeypatch.setattr(assets, "require_hub", lambda what: None)
    with pytest.raises(SdpoError, match="did not answer"):
        load_documents(TRUTHFULQA, str(folder), "truthfulqa/misspelt")


def test_truthfulqa_from_a_file(folder, tmp_path):
    task = dataclasses.replace(TRUTHFULQA, n_full=1, published={})
    row = {"question": "q", "mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]}}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row | {"mc1_targets": {}}) + "\n")
    assert load_documents(task, str(folder), str(path)) == {"truthfulqa_mc2": {"validation": [row]}}


def test_truthfulqa_from_a_file_that_is_not_there(folder):
    with pytest.raises(SdpoError, match=r"typo.jsonl does not exist; TruthfulQA is read from it"):
        load_documents(TRUTHFULQA, str(folder), "typo.jsonl")


# Documents that are not the published ones


def published(rows, checksum):
    return {"test": (rows, checksum)}


def test_the_published_documents_are_known_by_their_rows_and_texts(monkeypatch, folder):
    # sha256 of the two rows as _essence writes them, computed here once more by hand
    texts = [{"question": question, "choices": ["a", "b"], "answerKey": 1} for question in ("q", "r")]
    lines = "".join(json.dumps(text, sort_keys=True) + "\n" for text in texts)
    checksum = hashlib.sha256(lines.encode()).hexdigest()[:16]
    task = dataclasses.replace(ARC, shots=1, published=published(2, checksum))
    assert load_documents(task, str(folder))
    numbered = QUESTION | {"choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}  # as on the hub
    write(folder / ARC.files["test"], [numbered, numbered | {"question": "r"}])
    assert load_documents(task, str(folder))
    write(folder / ARC.files["test"], [numbered, numbered | {"question": "r "}])
    with pytest.raises(
        SdpoError, match=rf"ARC-Challenge's test documents have checksum \w+, the published ones {checksum}"
    ):
        load_documents(task, str(folder))
    with pytest.raises(SdpoError, match="holds 2 test documents of ARC-Challenge, the task has 3"):
        load_documents(dataclasses.replace(ARC, shots=1, published=published(3, checksum)), str(folder))


def test_too_few_shots_are_refused(folder):
    with pytest.raises(SdpoError, match="holds 1 train documents of arc_challenge, which needs 2 shots"):
        load_documents(dataclasses.replace(ARC, shots=2, published={}), str(folder))


def test_a_missing_subject_is_refused(shared_data, tmp_path):
    for file in MMLU.files.values():
        with gzip.open(shared_data / "benchmarks" / file) as lines:
            rows = [row for row in map(json.loads, lines) if row["subject"] != "virology"]
        write(tmp_path / file, rows)
    with pytest.raises(SdpoError, match="holds 280 dev documents of MMLU in 56 subjects, the task has 285"):
        load_documents(MMLU, str(tmp_path))


# Budgets


FULL = {name: {name: task.n_full} for name, task in h4.TASKS.items()}
MMLU_SIZES = {f"s{number}": 100 for number in range(57)}


def test_a_budget_lies_within_the_next_larger_one():
    for small, large in (("tiny", "small"), ("small", "standard"), ("standard", "full")):
        for name, count in h4.BUDGETS[small].items():
            sizes = MMLU_SIZES if name == "mmlu" else FULL[name]
            few, many = (h4.select_items(sizes, h4.BUDGETS[budget].get(name)) for budget in (small, large))
            assert len(few) == count
            assert set(few) < set(many)


def test_standard_is_35_of_each_subject():
    chosen = h4.select_items(MMLU_SIZES, h4.BUDGETS["standard"]["mmlu"])
    assert set(Counter(item.split("/")[0] for item in chosen).values()) == {35}


def test_the_error_that_a_budget_buys():
    # an item's SD is 50 at most. ARC 50 / sqrt(1172) = 1.4605; HellaSwag 50 / sqrt(2000) = 1.1180;
    # MMLU sqrt(57 * 2500 / 35) / 57 = 1.1194; TruthfulQA 50 / sqrt(817) = 1.7493;
    # H4 sqrt(1.4605^2 + 1.1180^2 + 1.1194^2 + 1.7493^2) / 4 = sqrt(7.6962) / 4 = 0.6935
    counts = FULL | {"hellaswag": {"hellaswag": 2000}, "mmlu": dict.fromkeys(MMLU_SIZES, 35)}
    alone = {name: {subject: [1] * count for subject, count in own.items()} for name, own in counts.items()}
    errors = h4.largest_stderr(alone)
    assert list(errors.values()) == pytest.approx([1.4605, 1.1180, 1.1194, 1.7493, 0.6935], abs=1e-4)
    assert "h4" not in h4.largest_stderr({"mmlu": alone["mmlu"]})
    # clusters of 3, 1 and 2 of six items: 50 * sqrt(9 + 1 + 4) / 6 = 31.1805
    assert h4.largest_stderr({"hellaswag": {"hellaswag": [3, 1, 2]}})["hellaswag"] == pytest.approx(31.1805, abs=1e-4)


# Fingerprint


def test_a_fingerprint_is_of_all_that_changes_numbers(small, folder, monkeypatch):
    documents = load_documents(small, str(folder))
    same = fingerprint("h4-lmeval", small, documents, "float32")
    assert same.startswith("h4-lmeval@")
    assert same == fingerprint("h4-lmeval", small, load_documents(small, str(folder)), "float32")
    test = documents["arc_challenge"]["test"]
    others = [
        fingerprint("h4-v1", small, documents, "float32"),
        fingerprint("h4-lmeval", small, documents, "bfloat16"),
        fingerprint("h4-lmeval", dataclasses.replace(small, shots=24), documents, "float32"),
        fingerprint("h4-lmeval", dataclasses.replace(small, sources=MMLU.sources), documents, "float32"),
        fingerprint("h4-lmeval", small, {"arc_challenge": {"train": [], "test": test}}, "float32"),
        fingerprint(
            "h4-lmeval", small, {"arc_challenge": documents["arc_challenge"] | {"test": test[::-1]}}, "float32"
        ),
    ]
    monkeypatch.setitem(h4_documents.SHOTS_SEED, "h4-lmeval", 1235)
    others.append(fingerprint("h4-lmeval", small, documents, "float32"))
    monkeypatch.setitem(h4_documents.BOS, "h4-lmeval", "never")
    others.append(fingerprint("h4-lmeval", small, documents, "float32"))
    assert len({other.split("@")[1] for other in [same, *others]}) == 1 + len(others)


def test_another_lm_eval_is_another_protocol(small, folder, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.14")
    with pytest.raises(SdpoError, match=r"h4-lmeval is defined by lm-eval 0.4.13; here it is 0.4.14"):
        fingerprint("h4-lmeval", small, load_documents(small, str(folder)), "float32")


# Results


def items(task, scores, subject=None, arm="base", step=0):
    rows = [
        {"arm": arm, "seed": 0, "step": step, "model_key": f"{arm}{step}", "protocol": f"h4-lmeval@{task}",
         "task": task, "item_id": f"{subject or task}/{row}", "subject": subject or task,
         "cluster": f"{subject or task}/{row}", "correct": None,
         "score": score, "gold_logp": -1.0, "choice_logps": [-1.0, -2.0]}
        for row, score in enumerate(scores)
    ]  # fmt: skip
    return pl.DataFrame(rows, ITEMS)


def test_results_by_hand():
    # ARC 1/4 -> 25, s^2 = (9/16 + 3/16) / 3 = 1/4, SE 100 / 4 = 25.  HellaSwag 1, 0 -> 50 ± 50.
    # MMLU a: 1, 0 -> 1/2; b: 0, 0, 0 -> 0; macro 25 (micro 20); SE as in test_stats, 100 sqrt(1/6) / 2.
    # TruthfulQA .2, .4 -> 30, s^2 = .02, SE 100 * .1 = 10.
    # H4 (25 + 50 + 25 + 30) / 4 = 32.5; SE sqrt(25^2 + 50^2 + 10000 / 24 + 10^2) / 4
    frame = pl.concat([
        items("truthfulqa_mc2", [0.2, 0.4]), items("mmlu", [1, 0], "a"), items("mmlu", [0, 0, 0], "b"),
        items("hellaswag", [1, 0]), items("arc_challenge", [0, 0, 1, 0]),
    ])  # fmt: skip
    results = h4.summarise_items(frame)
    assert results.select("task", "metric", "n", "n_full").rows() == [
        ("arc_challenge", "acc_norm", 4, 1172), ("hellaswag", "acc_norm", 2, 10042), ("mmlu", "acc", 5, 14042),
        ("truthfulqa_mc2", "mc2", 2, 817), ("h4", "mean", 13, 26073),
    ]  # fmt: skip
    assert results["value"].to_list() == pytest.approx([25, 50, 25, 30, 32.5])
    mmlu = 10_000 / 24
    assert results["stderr"].to_list() == pytest.approx([25, 50, mmlu**0.5, 10, (3225 + mmlu) ** 0.5 / 4])
    assert results["subset"].unique().to_list() == ["all"]


def test_hellaswags_questions_of_one_document_are_one_draw():
    # 1, 1 of x and 0, 0 of y: mean 50; residues of their sums 1 and -1; SE 100 sqrt(2 / 1 * (1 + 1)) / 4 = 50.
    # As four draws it would be 100 sqrt(1/3 / 4) = 28.87.
    frame = items("hellaswag", [1, 1, 0, 0])
    assert h4.summarise_items(frame)["stderr"][0] == pytest.approx(100 * (1 / 12) ** 0.5)
    documents = pl.Series(["x", "x", "y", "y"])
    assert h4.summarise_items(frame.with_columns(cluster=documents))["stderr"][0] == pytest.approx(50)


TABLE_2 = [  # arXiv 2403.19270: H4, ARC, HellaSwag, MMLU, TruthfulQA
    (74.31, 71.33, 88.08, 65.39, 72.45), (72.67, 69.62, 87.16, 66.00, 67.90), (73.40, 70.22, 87.63, 71.16, 64.58),
    (72.95, 71.08, 87.89, 70.58, 62.25),  # SOLAR-0-70B: printed as 72.93, which its parts do not give
    (72.17, 65.19, 85.94, 77.37, 60.19), (70.72, 64.59, 85.69, 76.35, 56.23), (69.51, 67.32, 85.96, 65.95, 58.80),
    (69.27, 63.14, 84.88, 60.78, 68.26), (68.57, 69.45, 88.86, 70.50, 45.47), (67.78, 66.04, 86.49, 71.82, 46.78),
    (67.35, 67.32, 87.33, 69.83, 44.92), (66.36, 62.03, 84.52, 61.44, 57.44), (64.85, 58.28, 83.99, 67.70, 49.43),
    (64.27, 61.95, 84.60, 65.48, 45.04), (62.40, 59.98, 83.31, 64.16, 42.15), (72.56, 69.20, 87.27, 65.96, 67.81),
]  # fmt: skip


@pytest.mark.parametrize("row", TABLE_2, ids=str)
def test_h4_of_the_papers_table(row):
    printed, *parts = row
    frame = pl.concat([items(task, [part / 100]) for task, part in zip(h4.TASKS, parts, strict=True)])
    assert h4.summarise_items(frame).filter(task="h4")["value"][0] == pytest.approx(printed, abs=0.0051)


def test_no_h4_without_all_four():
    results = h4.summarise_items(pl.concat([items(task, [1, 0]) for task in list(h4.TASKS)[:3]]))
    assert results["task"].to_list() == ["arc_challenge", "hellaswag", "mmlu"]


def test_unknown_error_of_a_task_is_unknown_in_h4():
    frame = pl.concat([items(task, [1] if task == "mmlu" else [1, 0]) for task in h4.TASKS])
    assert h4.summarise_items(frame)["stderr"].is_null().to_list() == [False, False, True, False, True]


def test_the_base_model_comes_first():
    frame = pl.concat(
        [items("mmlu", [1, 0], arm=arm, step=step) for arm, step in (("arm", 2), ("arm", 1), ("base", 0))]
    )
    assert h4.summarise_items(frame).select("arm", "step").rows() == [("base", 0), ("arm", 1), ("arm", 2)]


def test_nothing_evaluated_gives_no_rows():
    assert h4.summarise_items(ITEMS.to_frame()).height == 0


# The real files


def test_shots_are_those_of_lm_evals_openllm_group():
    import lm_eval
    import yaml

    path = f"{lm_eval.__path__[0]}/tasks/benchmarks/openllm.yaml"
    with open(path) as file:  # noqa: PTH123
        group = {task["task"]: task for task in yaml.safe_load(file)["task"]}
    for name, ours in {"arc_challenge": ARC, "hellaswag": HELLASWAG, "mmlu": MMLU, "truthfulqa": TRUTHFULQA}.items():
        assert ours.shots == group[name]["num_fewshot"]
    assert group["arc_challenge"]["fewshot_split"] == group["hellaswag"]["fewshot_split"] == "train"


@pytest.mark.real
def test_counts_and_chance_on_the_real_files(shared_data):
    documents = {name: load_documents(task, str(shared_data / "benchmarks")) for name, task in h4.TASKS.items()}
    assert len(documents["mmlu"]) == 57
    assert all(len(splits["dev"]) == 5 for splits in documents["mmlu"].values())
    shares = [sum(doc["mc2_targets"]["labels"]) / len(doc["mc2_targets"]["labels"])
              for doc in documents["truthfulqa_mc2"]["truthfulqa_mc2"]["validation"]]  # fmt: skip
    assert 100 * sum(shares) / len(shares) == pytest.approx(TRUTHFULQA.chance, abs=0.005)
    arc = [1 / len(doc["choices"]["text"]) for doc in documents["arc_challenge"]["arc_challenge"]["test"]]
    assert 100 * sum(arc) / len(arc) == pytest.approx(ARC.chance, abs=0.02)  # a few have three or five choices
    assert {len(doc["endings"]) for doc in documents["hellaswag"]["hellaswag"]["validation"]} == {4}
    assert {len(doc["choices"]) for splits in documents["mmlu"].values() for doc in splits["test"]} == {4}


@pytest.mark.real
def test_embedded_documents_are_those_of_the_files(shared_data):
    for task in list(h4.TASKS.values())[:3]:
        embedded = load_documents(task, "embedded:h4")
        assert embedded == load_documents(task, str(shared_data / "benchmarks")), task.name
