import dataclasses
import gzip
import hashlib
import json

import pytest

from sdpo_eval import h4
from sdpo_eval.documents import load_documents
from sdpo_eval.h4_v1 import pose, write_items

ARC, HELLASWAG, MMLU, TRUTHFULQA = h4.TASKS.values()

# Of lm-eval b281b09's own requests, sha256 of json.dumps([[context, continuation], ...], sort_keys=True), documents in
# the order of its shuffle. ZERO_SHOT is published with it. ALL_SHOTS is what its code, run at that commit on the same
# files (Random(42), fewshot_context, construct_requests), gives; MMLU's subjects in alphabetical order.
ZERO_SHOT = {
    "arc_challenge": (4687, "41c34c96cca8ace661911d0033d630c554b283f5a3953bcdc50720ae6b00a9c1"),
    "hellaswag": (40168, "abb808c97d6529eda6c11067837a132c62d25cba0394d720f80cca6df9f7196e"),
    "truthfulqa_mc2": (9996, "1e07020e9cf41d46ed65312eb39d2b8e6599673d4f0d6b67c0d0eba0efb493bb"),
}
ALL_SHOTS = {
    "arc_challenge": (4687, "939209d3f0b11f27b2659ec8291af08b6a842c0f1fb15c2d8672cca65edf0dfb"),
    "hellaswag": (40168, "127183dd339fe73d2a00af0d2308fb2abc23bfddf49c2634c934fabb3c0e1202"),
    "mmlu": (56168, "3e5364db7dcd80d1c803396bde7bf398b878f0806704e12ffd70c84d8b29e9ec"),
    "truthfulqa_mc2": (5882, "aa2092155d60302a6ce66570256d5e093fbe4e1d89f1a5689d0a0f981c2ad166"),
}


def every(documents):
    return [
        f"{subject}/{row}" for subject, splits in documents.items() for row in range(len(list(splits.values())[-1]))
    ]


def hashed(requests):
    return len(requests), hashlib.sha256(json.dumps(requests, sort_keys=True).encode()).hexdigest()


def requests_of(items):
    return [[item.context, choice] for item in items for choice in item.choices]


@pytest.mark.real
@pytest.mark.parametrize("name", ZERO_SHOT)
def test_published_hashes_of_the_questions_without_shots(name, shared_data):
    data, task = shared_data / "benchmarks", dataclasses.replace(h4.TASKS[name], shots=0)
    documents = load_documents(task, str(data))
    requests = requests_of(write_items(task, documents, every(documents)))
    if name == "truthfulqa_mc2":  # the hash is over mc1's choices too, which stand before those of mc2
        with gzip.open(data / task.files["validation"]) as lines:
            first = {row["question"]: row["mc1_targets"]["choices"] for row in map(json.loads, lines)}
        requests = []
        for item in write_items(task, documents, every(documents)):
            question = item.context.rpartition("\n\nQ: ")[2].removesuffix("\nA:")
            requests += [[item.context, choice] for choice in [*(f" {one}" for one in first[question]), *item.choices]]
    assert hashed(requests) == ZERO_SHOT[name]


@pytest.mark.real
@pytest.mark.parametrize("name", ALL_SHOTS)
def test_every_request_is_the_old_lm_evals(name, shared_data):
    documents = load_documents(h4.TASKS[name], str(shared_data / "benchmarks"))
    assert hashed(requests_of(write_items(h4.TASKS[name], documents, every(documents)))) == ALL_SHOTS[name]


def arc(count, prefix):
    choices = {"text": [f"{prefix} yes", f"{prefix} no"], "label": ["A", "B"]}
    return [{"question": f"{prefix}{row}?", "choices": choices, "answerKey": "AB"[row % 2]} for row in range(count)]


def test_shots_do_not_depend_on_what_is_asked():
    task = dataclasses.replace(ARC, shots=3)
    documents = {"arc_challenge": {"train": arc(9, "shot"), "test": arc(6, "test")}}
    whole = {item.item_id: item for item in write_items(task, documents, every(documents))}
    assert set(whole) == {f"arc_challenge/{row}" for row in range(6)}
    for item_id, item in whole.items():
        assert list(write_items(task, documents, [item_id])) == [item]
    assert len({item.context.rpartition("\n\n")[0] for item in whole.values()}) > 1  # drawn anew for each


def test_a_question_by_hand():
    task = dataclasses.replace(ARC, shots=1)
    documents = {"arc_challenge": {"train": arc(2, "shot")[1:], "test": arc(1, "test")}}
    [item] = write_items(task, documents, ["arc_challenge/0"])
    assert item.context == "Question: shot1?\nAnswer: shot no\n\nQuestion: test0?\nAnswer:"
    assert item.choices == [" test yes", " test no"]
    assert item.gold == [True, False]


def test_truthfulqa_counts_what_stands_before_the_first_wrong_answer():
    # the old code splits at the first 0; two documents of the real file have a 1 after it. lm-eval 0.4.13 counts the 1s
    targets = {"choices": list("wxyz"), "labels": [1, 0, 1, 0]}
    _, _, gold = pose(TRUTHFULQA, {"question": "q", "mc2_targets": targets})
    assert gold == [True, False, False, False]


def test_hellaswag_is_cleaned_in_the_protocols_order():
    story = {"activity_label": " Cook", "ctx_a": "a [title] b  [x] c", "ctx_b": "NEXT she"}
    document = story | {"endings": ["[step]d  e"], "label": "0"}
    # " [title]" -> ". ", which leaves "a.  b"; "[x]" goes and leaves three blanks; then pairs of blanks become one
    assert pose(HELLASWAG, document)[:2] == ("Cook: a. b  c Next she", ["d e"])
