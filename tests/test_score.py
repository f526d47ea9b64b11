"""Scores: by hand, against a plain forward, against TRL's own reference pass."""

import json
import math

import polars as pl
import pytest
import torch

from sdpo_data.encode import encode_pairs
from sdpo_data.models import load_model, model_key
from sdpo_data.pairs import read_pairs
from sdpo_data.score import ScoreConfig, completion_logps, score_and_drop, score_pairs
from sdpo_data.tables import SCORES, SdpoError, check


def test_rows_do_not_change_the_numbers(tiny_model, pairs):
    model, tokenizer = load_model(tiny_model)
    encoded = encode_pairs(pairs, tokenizer, 256, "drop")
    for side in ("chosen", "rejected"):
        sequences = [(p + a, len(p)) for p, a in encoded.select("prompt_ids", f"{side}_ids").iter_rows()]
        for budget in (1, 200, 4096):  # one by one, some together, all in one row
            for sequence, logp in zip(sequences, completion_logps(model, sequences, budget), strict=True):
                assert logp == pytest.approx(plain_logp(model, *sequence), abs=1e-4)


def plain_logp(model, ids, start):
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logps[place - 1, ids[place]].item() for place in range(start, len(ids)))


def test_scores_keep_the_order_of_the_pairs_and_name_the_weights(tiny_model, pairs):
    scores = score_pairs(pairs, tiny_model)
    check(scores, SCORES, "scores")
    assert scores["pair_id"].to_list() == pairs["pair_id"].to_list()
    assert scores["model_key"].unique().to_list() == [model_key(tiny_model)]
    assert (scores["chosen_logp"] < 0).all()


def test_a_loaded_model_scores_as_its_folder_does(tiny_model, pairs):
    from_folder = score_pairs(pairs, tiny_model)
    loaded = load_model(tiny_model)
    assert score_pairs(pairs, loaded).equals(from_folder)
    assert score_pairs(pairs, loaded[0]).equals(from_folder)  # finds its own tokenizer


def test_pairs_that_are_too_long_are_dropped_with_the_side_that_was(tiny_model, pairs):
    lengths = encode_pairs(pairs, load_model(tiny_model)[1], 10_000, "drop").select(
        "pair_id",
        chosen=pl.col("prompt_ids").list.len() + pl.col("chosen_ids").list.len(),
        rejected=pl.col("prompt_ids").list.len() + pl.col("rejected_ids").list.len(),
    )
    limit = int(lengths["chosen"].median())
    scores, dropped = score_and_drop(pairs, tiny_model, ScoreConfig(max_length=limit))
    fits = (lengths["chosen"] <= limit) & (lengths["rejected"] <= limit)
    assert scores["pair_id"].to_list() == lengths.filter(fits)["pair_id"].to_list()
    assert set(dropped["pair_id"]) == set(lengths.filter(~fits)["pair_id"])
    only_chosen = lengths.filter((pl.col("chosen") > limit) & (pl.col("rejected") <= limit))["pair_id"]
    reasons = dict(dropped.select("pair_id", "reason").iter_rows())
    assert only_chosen.len()
    assert {reasons[pair_id] for pair_id in only_chosen} == {f"over {limit} tokens (chosen)"}
    assert json.loads(dropped["content"][0])["chosen"]  # nothing lost


def test_no_pair_that_fits_is_an_error(tiny_model, pairs):
    with pytest.raises(SdpoError, match=r"None of 8 pairs can be scored: over 4 tokens .* Raise score.max_length"):
        score_pairs(pairs, tiny_model, ScoreConfig(max_length=4))


def test_weights_that_are_not_finite_are_refused(tiny_model, pairs):
    model, tokenizer = load_model(tiny_model)
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(SdpoError, match="8 of 8 pairs have a non-finite log-probability"):
        score_pairs(pairs, (model, tokenizer))


@pytest.mark.real
def test_scores_equal_trls_reference_pass(shared_data, tmp_path):
    """The oracle: TRL 1.16 tokenises and scores the raw pairs by itself, two at a time, unsorted."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    from sdpo_data.assets import model_folder

    folder = model_folder("embedded:smollm2-135m")
    for name in ("orca_dpo_sample/validation.jsonl.gz", "ultrafeedback_sample/train.jsonl.gz"):  # messages, plain text
        short = pl.sum_horizontal(pl.col("prompt", "chosen", "rejected").str.len_chars()) < 1500
        pairs = read_pairs(shared_data / "prefs" / name).filter(short).head(16)
        assert pairs.height == 16
        ours = score_pairs(pairs, folder)
        model, tokenizer = load_model(folder)
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=str(tmp_path), precompute_ref_log_probs=True, max_length=1024, bf16=False,
                activation_checkpointing=False, report_to="none", per_device_train_batch_size=2, disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list([trl_row(row) for row in pairs.iter_rows(named=True)]),
            processing_class=tokenizer,
        )  # fmt: skip
        for side in ("chosen", "rejected"):
            theirs = pl.Series(trainer.train_dataset[f"ref_{side}_logps"][:], dtype=pl.Float64)
            assert (ours[f"{side}_logp"] - theirs).abs().max() < 1e-3


def trl_row(row: dict) -> dict:
    if row["format"] == "text":
        return {name: row[name] for name in ("prompt", "chosen", "rejected")}
    fields = {name: json.loads(row[name]) for name in ("prompt", "chosen", "rejected")}
    system = [{"role": "system", "content": row["system"]}] if row["system"] is not None else []
    return fields | {"prompt": system + fields["prompt"]}
