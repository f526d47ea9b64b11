import dataclasses

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpo_data.models import load_model, load_tokenizer
from sdpo_data.tables import SdpoError
from sdpo_eval import h4, harness, questions
from sdpo_eval.documents import load_documents
from sdpo_eval.questions import REQUESTS, Item, Questions, encode_items, sequences_of, slices, tokenizer_key

ARC = dataclasses.replace(h4.TASKS["arc_challenge"], shots=1, published={})
ITEMS = [
    Item("arc_challenge/0", "What is 12 + 30?", [" 42", " forty-two, I think"], [True, False]),
    Item("arc_challenge/1", "Blanks before the answer:  ", [" yes", "no"], [False, True]),
]


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def with_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def arc_documents(count):
    choices = {"text": ["yes", "no"], "label": ["A", "B"]}
    rows = [{"question": f"Is it {row}?", "choices": choices, "answerKey": "A"} for row in range(count)]
    return {"arc_challenge": {"train": rows[:1], "test": rows}}


# Token ids


@pytest.mark.parametrize("bos", [False, True])
def test_ids_are_those_of_lm_eval(bos, tiny_model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    model, _ = load_model(tiny_model)
    lm = HFLM(pretrained=model, tokenizer=with_bos(tokenizer) if bos else tokenizer)
    requests = encode_items(ITEMS, tokenizer, "tokenizer")
    assert requests.schema == REQUESTS
    for item, row in zip(ITEMS, requests.iter_rows(named=True), strict=True):
        theirs = [lm._encode_pair(item.context, choice) for choice in item.choices]
        assert [(row["context"], answer) for answer in row["answers"]] == theirs
    assert requests["gold"].to_list() == [[True, False], [False, True]]
    assert requests["lengths"].to_list() == [[2, 18], [3, 1]]  # the leading blank is none of the choice's
    never = encode_items(ITEMS, tokenizer, "never")["context"].to_list()
    whole = requests["context"].to_list()
    assert never == ([ids[1:] for ids in whole] if bos else whole)


@pytest.mark.real
def test_real_ids_are_those_of_lm_eval(tiny_model, shared_data):
    from lm_eval.models.huggingface import HFLM

    model, _ = load_model(tiny_model)
    tokenizer = load_tokenizer("embedded:smollm2-135m")
    lm = HFLM(pretrained=model, tokenizer=tokenizer)
    for task in h4.TASKS.values():
        documents = load_documents(task, str(shared_data / "benchmarks"))
        sizes = {subject: len(splits[task.split]) for subject, splits in documents.items()}
        items = list(harness.write_items(task, documents, h4.select_items(sizes, 6)))
        for item, row in zip(items, encode_items(items, tokenizer, "tokenizer").iter_rows(named=True), strict=True):
            theirs = [lm._encode_pair(item.context, choice) for choice in item.choices]
            assert [(row["context"], answer) for answer in row["answers"]] == theirs, item.item_id


def test_a_sequence_is_context_and_answer():
    requests = pl.DataFrame([("a/0", [1, 2, 3], [[4], [5, 6]], [1, 2], [True, False])], REQUESTS, orient="row")
    assert sequences_of(requests) == [[([1, 2, 3, 4], 3), ([1, 2, 3, 5, 6], 3)]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 7))
def test_slices_hold_every_question_once_and_cut_no_subject_that_fits(sizes, size):
    rows = [(f"s{number}/{row}", [1], [[2]], [1], [True]) for number, count in enumerate(sizes) for row in range(count)]
    requests = pl.DataFrame(rows, REQUESTS, orient="row")
    before, questions.SLICE = questions.SLICE, size
    try:
        parts = list(slices(requests))
    finally:
        questions.SLICE = before
    assert pl.concat(parts).equals(requests)
    assert max(part.height for part in parts) <= size
    for number, count in enumerate(sizes):
        holders = [part for part in parts if part["item_id"].str.starts_with(f"s{number}/").any()]
        assert len(holders) == 1 or count > size


# Kept per run folder


def test_questions_are_written_once_for_all_models(tmp_path, tokenizer, tiny_model, monkeypatch):
    asked = Questions(ARC, "h4-v1@1", [], arc_documents(4))
    first = asked.encode(["arc_challenge/2", "arc_challenge/0"], tokenizer, tmp_path)
    assert first["item_id"].to_list() == ["arc_challenge/0", "arc_challenge/2"]
    wrote = []
    write = questions.encode_items
    monkeypatch.setattr(questions, "encode_items", lambda items, *rest: wrote.append(0) or write(items, *rest))
    again = load_tokenizer(tiny_model)  # another step's copy of it
    assert asked.encode(["arc_challenge/2"], again, tmp_path).equals(first[1:])
    assert wrote == []
    more = asked.encode(["arc_challenge/1", "arc_challenge/2"], again, tmp_path)
    assert more["item_id"].to_list() == ["arc_challenge/1", "arc_challenge/2"]
    assert wrote == [0]
    assert len(list(tmp_path.iterdir())) == 1
    dataclasses.replace(asked, protocol="h4-v1@2").encode(["arc_challenge/2"], again, tmp_path)
    asked.encode(["arc_challenge/2"], with_bos(again), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # another protocol, another tokenizer


def test_a_broken_file_of_questions_is_made_anew(tmp_path, tokenizer):
    asked = Questions(ARC, "h4-v1@1", [], arc_documents(2))
    first = asked.encode(["arc_challenge/0"], tokenizer, tmp_path)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    assert asked.encode(["arc_challenge/0"], tokenizer, tmp_path).equals(first)


def test_a_tokenizers_key_is_what_it_does(tokenizer, tiny_model):
    key = tokenizer_key(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)  # leaves traces in the tokenizer
    assert tokenizer_key(tokenizer) == key == tokenizer_key(load_tokenizer(tiny_model))
    assert tokenizer_key(with_bos(load_tokenizer(tiny_model))) != key


# Refusals


def test_the_marks_of_a_chat_template_are_refused(tmp_path, tokenizer):
    documents = arc_documents(2)
    documents["arc_challenge"]["test"][1] = documents["arc_challenge"]["test"][1] | {"question": "<|im_start|>user"}
    asked = Questions(ARC, "h4-v1@1", [], documents)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    asked.encode(["arc_challenge/0"], tokenizer, tmp_path)
    with pytest.raises(SdpoError, match=r"item arc_challenge/1: the question holds the special token '<\|im_start\|>'"):
        asked.encode(["arc_challenge/1"], tokenizer, tmp_path)


def test_a_bos_that_the_protocol_has_not_is_refused(tmp_path, tokenizer, monkeypatch):
    tokenizer = with_bos(tokenizer)
    asked = Questions(ARC, "h4-v1@1", [], arc_documents(1))
    asked.encode(["arc_challenge/0"], tokenizer, tmp_path)  # told to add none, it adds none
    monkeypatch.setattr(questions, "encode_items", lambda items, own, bos: encode_items(items, own, "tokenizer"))
    with pytest.raises(SdpoError, match=r"begins a question with '<\|im_start\|>' though told to add nothing"):
        asked.encode(["arc_challenge/0"], tokenizer, tmp_path / "other")


def test_an_answer_without_a_token_is_refused(tmp_path, tokenizer, monkeypatch):
    asked = Questions(ARC, "h4-v1@1", [], arc_documents(1))
    empty = encode_items(ITEMS[:1], tokenizer, "never").with_columns(answers=pl.lit([[1], []], REQUESTS["answers"]))
    monkeypatch.setattr(questions, "encode_items", lambda *_: empty)
    with pytest.raises(SdpoError, match="leaves an answer without a token of its own"):
        asked.encode(["arc_challenge/0"], tokenizer, tmp_path)
