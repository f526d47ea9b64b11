"""Scores: by hand, against a plain forward, against TRL's own reference pass."""

import hashlib
import json
import math
import re
import shutil

import polars as pl
import pytest
import torch
import transformers

from sdpo_data.encode import encode_pairs
from sdpo_data.models import load_model, load_tokenizer, model_key
from sdpo_data.pairs import read_pairs
from sdpo_data.prefix import score_bin
from sdpo_data.score import ScoreConfig, rescore_sample, score_and_drop, score_pairs
from sdpo_data.store import PLAN, ScoreStore
from sdpo_data.tables import SCORES, SdpoError, check
from sdpo_data.tree import request_key


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """Every test asks for the first time, unless it asks twice."""
    monkeypatch.setattr("sdpo_data.store.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "scores"


def test_rows_do_not_change_the_numbers(tiny_model, pairs, tmp_path):
    model, tokenizer = load_model(tiny_model)
    encoded = encode_pairs(pairs, tokenizer, 256, "drop")
    for budget in (1, 30, 4096):  # cut anywhere, some together, all in one row
        scores = score_pairs(pairs, tiny_model, ScoreConfig(token_budget=budget, store=str(tmp_path / str(budget))))
        for side in ("chosen", "rejected"):
            requests = [(p + a, len(p)) for p, a in encoded.select("prompt_ids", f"{side}_ids").iter_rows()]
            for request, logp in zip(requests, scores[f"{side}_logp"], strict=True):
                assert logp == pytest.approx(plain_logp(model, *request), abs=1e-4)


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


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_pairs_longer_than_a_model_reads_are_refused(kind, tiny_model, pairs):
    """Learned positions would be an IndexError; rotary ones would go on, and be wrong."""
    tokenizer = load_tokenizer(tiny_model)
    names = {"gpt2": ("n_embd", "n_layer", "n_head", "n_positions")}
    names["llama"] = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    lengths = pl.Series([len(ids) for ids, _ in requests_of(pairs, tokenizer).values()])
    limit = int(lengths.median())
    sizes = dict(zip(names[kind], (32, 2, 4, limit), strict=True))
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)
    model = (transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer)
    with pytest.raises(SdpoError) as error:
        score_pairs(pairs, model)
    assert re.search(
        rf"of 8 pairs are longer than the {limit} tokens that \w+ was made to read, e\.g\. pair_id '\w+' with "
        rf"{lengths.max()}\. Set score\.max_length .* to {limit} at most",
        str(error.value),
    )
    scores, dropped = score_and_drop(pairs, model, ScoreConfig(max_length=limit))
    assert scores.height + dropped.height == 8
    assert scores.height > 0
    at_most = ScoreConfig(max_length=lengths.max())  # more than the model reads, but no pair of these is
    assert score_pairs(pairs.join(scores.select("pair_id"), on="pair_id"), model, at_most).height == scores.height


@pytest.fixture
def asked(monkeypatch):
    """Counts the answers that are computed, not read from the store."""
    answers = []

    def counted(model, requests, *args, **kwargs):
        answers.extend(requests)
        return score_bin(model, requests, *args, **kwargs)

    monkeypatch.setattr("sdpo_data.scorer.score_bin", counted)
    return answers


def test_what_was_scored_is_not_computed_again_and_new_pairs_are(tiny_model, pairs, asked):
    some = score_pairs(pairs.head(5), tiny_model)
    assert len(asked) == 10
    everything = score_pairs(pairs, tiny_model)
    assert len(asked) == 16  # the three new pairs
    assert everything.head(5).equals(some)
    assert score_pairs(pairs[::-1], tiny_model)[::-1].equals(everything)
    assert len(asked) == 16


def test_an_answer_that_several_pairs_share_is_computed_once(tiny_model, pairs, asked):
    again = pairs.with_columns(pair_id="again-" + pl.col("pair_id"), rejected=pl.lit(pairs["rejected"][0]))
    score_pairs(pl.concat([pairs, again]), tiny_model)
    assert len(asked) == 16 + 7  # the chosen ones are known; the first pair's rejected one too


def test_settings_that_change_tokens_or_numbers_are_asked_anew_and_others_are_not(tiny_model, pairs, asked, tmp_path):
    """FIELD.md, TRL fact 5: its cache misses where nothing changed, and hits where something did."""
    score_pairs(pairs, tiny_model)
    assert len(asked) == 16
    score_pairs(pairs, tiny_model, ScoreConfig(dtype="bfloat16"))
    assert len(asked) == 32  # other numbers
    lengths = encode_pairs(pairs, load_model(tiny_model)[1], 999, "drop").select(
        longest=pl.col("prompt_ids").list.len() + pl.max_horizontal(pl.col("chosen_ids", "rejected_ids").list.len())
    )
    score_pairs(pairs, tiny_model, ScoreConfig(max_length=lengths["longest"].max() - 1, truncation="cut"))
    assert len(asked) == 33  # one answer is cut: other tokens; the rest is what it was
    score_pairs(pairs, tiny_model, ScoreConfig(token_budget=64))
    assert len(asked) == 33  # only how it is computed
    model, tokenizer = load_model(tiny_model)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>assistant", "<|im_start|>helper")
    score_pairs(pairs, (model, tokenizer))
    assert len(asked) == 49  # other tokens before every answer


@pytest.mark.real
def test_runs_that_differ_in_training_alone_share_the_scores_of_s(
    tiny_model, pair_file, tmp_path, run_command, monkeypatch
):
    """Two run folders, one store; then a run with another max_length, and one with another dtype."""
    key, asked, models = model_key(tiny_model), [], []

    def counted(model, requests, *args, **kwargs):
        models.append(model_key(model))
        asked.extend(requests if models[-1] == key or model.dtype != torch.float32 else [])
        return score_bin(model, requests, *args, **kwargs)

    monkeypatch.setattr("sdpo_data.scorer.score_bin", counted)
    given = ("--pairs.source", pair_file, "--pairs.hold-out", 0, "--model", tiny_model, "--parts", 2)
    given = (*given, "--score.store", tmp_path / "store")
    tuned = {"first": ("--learning-rate", 1e-3), "other": ("--learning-rate", 3e-3, "--seeds", 5, "--lora-rank", 2)}
    for name, settings in tuned.items():
        for command in (("sdpo_data.partition", tmp_path / name, *given),
                        ("sdpo_train", tmp_path / name, "--batch-pairs", 4, "--warmup", 0, *settings)):  # fmt: skip
            code, _, err = run_command(*command)
            assert code == 0, err
        assert len(asked) == 16  # both answers of 8 pairs, by the first run
    assert len(set(models)) == 1 + 2 + 2  # S, and two steps' models of each run: those were scored
    one, other = (pl.read_parquet(tmp_path / name / "scores.parquet") for name in tuned)
    assert one.equals(other)
    longest = (
        one["prompt_tokens"] + one.select(pl.max_horizontal("chosen_tokens", "rejected_tokens")).to_series()
    ).max()
    shorter = ("--score.max-length", longest - 1, "--score.truncation", "cut")
    for name, changed, computed in (("shorter", shorter, 17), ("coarse", ("--score.dtype", "bfloat16"), 33)):
        code, _, err = run_command("sdpo_data.partition", tmp_path / name, *given, *changed)
        assert code == 0, err
        assert len(asked) == computed  # the one answer that was cut; all of them


def test_a_folder_with_other_weights_under_the_old_name_is_another_model(tiny_model, pairs, asked, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    before = score_pairs(pairs, folder)
    model, tokenizer = load_model(folder)
    with torch.no_grad():
        model.model.norm.weight *= 2
    model.save_pretrained(folder)
    after = score_pairs(pairs, folder)
    assert len(asked) == 32
    assert before["model_key"][0] != after["model_key"][0]
    assert (before["chosen_logp"] != after["chosen_logp"]).all()
    assert after.equals(score_pairs(pairs, (model, tokenizer)))


def test_a_killed_scoring_goes_on_with_the_very_same_bins(tiny_model, pairs, monkeypatch, tmp_path):
    """Bins of one row of 8 tokens, killed after the third: the rest is computed, and every bit is as if unbroken."""
    monkeypatch.setattr("sdpo_data.tree.BIN_ROWS", 1)
    settings = ScoreConfig(token_budget=8, store=str(tmp_path / "unbroken"))
    unbroken = score_pairs(pairs, tiny_model, settings)
    broken, done = settings.model_copy(update={"store": str(tmp_path / "broken")}), []

    def dies(model, requests, *args, **kwargs):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(len(requests))
        return score_bin(model, requests, *args, **kwargs)

    monkeypatch.setattr("sdpo_data.scorer.score_bin", dies)
    with pytest.raises(KeyboardInterrupt):
        score_pairs(pairs, tiny_model, broken)
    rest = []
    monkeypatch.setattr("sdpo_data.scorer.score_bin", lambda *a, **k: rest.append(len(a[1])) or score_bin(*a, **k))
    more = pairs.head(1).with_columns(
        pair_id=pl.lit("new"), chosen=pairs["rejected"][3:4], rejected=pairs["chosen"][3:4]
    )
    assert (
        score_pairs(pl.concat([pairs, more]), tiny_model, broken).head(8).equals(unbroken)
    )  # new pairs do not move it
    assert sum(done) + sum(rest) == 18
    assert list((tmp_path / "broken").glob("*/plans/*")) == []


@pytest.fixture
def windowed(tiny_model):
    """A model with the tiny one's tokenizer that sees 40 tokens back: all pairs but the shortest are longer."""
    tokenizer = load_tokenizer(tiny_model)
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, sliding_window=40,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config).eval(), tokenizer


def requests_of(pairs, tokenizer):
    encoded = encode_pairs(pairs, tokenizer, 1024, "drop")
    sides = [encoded.select("prompt_ids", f"{side}_ids").rows() for side in ("chosen", "rejected")]
    found = [(prompt + answer, len(prompt)) for side in sides for prompt, answer in side]
    return {request_key(request): request for request in found}


@pytest.mark.parametrize("budget, ways", [(16, {True}), (100, {True, False})], ids=["trees", "with padded batches"])
def test_the_store_tells_how_to_compute_its_bits_again(
    budget, ways, tiny_model, windowed, pairs, monkeypatch, tmp_path
):
    """bin, place, row_tokens and packed are the plan: any one bin, computed from them alone, gives the stored bits."""
    monkeypatch.setattr("sdpo_data.tree.BIN_ROWS", 2)
    model, tokenizer = windowed if False in ways else load_model(tiny_model)
    score_pairs(pairs, (model, tokenizer), ScoreConfig(token_budget=budget, store=str(tmp_path / "store")))
    rows = pl.concat([pl.read_parquet(path) for path in (tmp_path / "store").glob("*/*.parquet")])
    assert rows["bin"].n_unique() > 2
    assert set(rows["packed"]) == ways
    requests = requests_of(pairs, tokenizer)
    for bin_ in rows.partition_by("bin"):
        bin_ = bin_.sort("place")
        own = [requests[key] for key in bin_["request"]]
        again = score_bin(model, own, bin_["row_tokens"][0], packed=bin_["packed"][0])
        assert [float(one.logps.sum(dtype="float64")) for one in again] == bin_["logp"].to_list()


def test_old_answers_past_a_window_are_not_believed(windowed, pairs, asked, tmp_path):
    """Of before `packed` was kept: those may be of a tree. Within the window every way gives the same."""
    settings = ScoreConfig(store=str(tmp_path / "store"))
    right = score_pairs(pairs, windowed, settings)
    for shard in list((tmp_path / "store").glob("*/*.parquet")):
        old = pl.read_parquet(shard).with_columns(logp=pl.lit(-1.0)).drop("packed")
        old.write_parquet(shard)
        shard.rename(shard.with_stem(hashlib.sha256(shard.read_bytes()).hexdigest()[:32]))
    lengths = {key: len(ids) for key, (ids, _) in requests_of(pairs, windowed[1]).items()}
    past = sum(length > 40 for length in lengths.values())
    assert 0 < past < len(lengths) == 16
    for _ in range(2):
        again = score_pairs(pairs, windowed, settings)
        assert len(asked) == 16 + past  # the second time none
        for side in ("chosen", "rejected"):
            length = right["prompt_tokens"] + right[f"{side}_tokens"]
            expected = pl.select(pl.when(length > 40).then(right[f"{side}_logp"]).otherwise(-1.0)).to_series()
            assert (again[f"{side}_logp"] - expected).abs().max() < 1e-4


def test_a_begun_tree_past_a_window_is_planned_anew(windowed, pairs, asked, tmp_path):
    """As an earlier version that overlooked the window may have left it."""
    settings = ScoreConfig(store=str(tmp_path / "store"))
    store = ScoreStore(tmp_path / "store", model_key(windowed[0]), "float32")
    keys = list(requests_of(pairs, windowed[1]))
    begun = [("old", place, key, True, 512, 999) for place, key in enumerate(keys)]
    store.begin(pl.DataFrame(begun, PLAN, orient="row"))
    scores = score_pairs(pairs, windowed, settings)
    store.refresh()
    assert "old" not in set(store.find(keys)["bin"])
    logps = [*scores["chosen_logp"], *scores["rejected_logp"]]
    for (ids, start), logp in zip(requests_of(pairs, windowed[1]).values(), logps, strict=True):
        assert logp == pytest.approx(plain_logp(windowed[0], ids, start), abs=1e-4)


def test_memory_that_runs_out_is_said_with_the_setting(tiny_model, pairs, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("sdpo_data.scorer.score_bin", full)
    with pytest.raises(
        SdpoError, match=r"forward pass of 512 tokens\. Set score\.token_budget to 256, or score\.dtype"
    ):
        score_pairs(pairs, tiny_model)


def test_token_log_probabilities_add_up(tiny_model, pairs, asked):
    plain = score_pairs(pairs, tiny_model)
    scores = score_pairs(pairs, tiny_model, ScoreConfig(keep_token_logps=True))
    assert len(asked) == 32  # the store held sums only
    for side in ("chosen", "rejected"):
        lists = scores[f"{side}_token_logps"]
        assert lists.list.len().to_list() == scores[f"{side}_tokens"].to_list()
        assert (lists.list.sum() - scores[f"{side}_logp"]).abs().max() < 1e-4
    assert scores.select(plain.columns).equals(plain)
    assert score_pairs(pairs, tiny_model).equals(plain)  # and the fuller rows serve both
    assert len(asked) == 32


def test_scores_carry_prompt_source_and_ratings(tiny_model, pairs):
    rated = pairs.with_columns(rating_chosen=pl.lit(4.0), rating_rejected=pl.int_range(pl.len()).cast(pl.Float64))
    scores = score_pairs(rated, tiny_model)
    for column in ("prompt_id", "source", "rating_chosen", "rating_rejected"):
        assert scores[column].to_list() == rated[column].to_list()
    assert scores["against_key"].null_count() == 8


def test_a_second_model_is_asked_about_the_same_tokens(tiny_model, pairs, tmp_path):
    model, tokenizer = load_model(tiny_model)
    with torch.no_grad():
        model.model.norm.weight *= 2
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "other")
    scores = score_pairs(pairs, tiny_model, ScoreConfig(against=str(tmp_path / "other")))
    other = score_pairs(pairs, tmp_path / "other")
    assert scores["against_key"].unique().to_list() == [model_key(tmp_path / "other")]
    assert scores["against_chosen_logp"].to_list() == other["chosen_logp"].to_list()
    assert scores["against_rejected_logp"].to_list() == other["rejected_logp"].to_list()
    assert scores["chosen_logp"].to_list() == score_pairs(pairs, tiny_model)["chosen_logp"].to_list()


def test_a_second_model_that_is_the_first_or_speaks_otherwise_is_refused(tiny_model, pairs, tmp_path):
    with pytest.raises(SdpoError, match=r"score\.against .* its implicit reward is 0 for every pair by definition"):
        score_pairs(pairs, tiny_model, ScoreConfig(against=str(tiny_model)))
    model, tokenizer = load_model(tiny_model)
    with torch.no_grad():
        model.model.norm.weight *= 2
    tokenizer.add_tokens(["<other>"])
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "other")
    with pytest.raises(SdpoError, match=r"score\.against .* has another tokenizer"):
        score_pairs(pairs, tiny_model, ScoreConfig(against=str(tmp_path / "other")))


def test_processes_that_do_not_share_a_store_are_told(tiny_model, pairs, tmp_path, monkeypatch):
    """What the other of two computed never comes into this one's folder."""
    monkeypatch.setattr("sdpo_data.tree.BIN_ROWS", 1)
    monkeypatch.setattr("sdpo_data.scorer.workers.count", lambda: 2)
    settings = ScoreConfig(store=str(tmp_path / "own"), token_budget=16)
    with pytest.raises(SdpoError, match=r"of 16 answers are not in this process's score store .* all processes share"):
        score_pairs(pairs, tiny_model, settings)


def test_a_coarse_dtype_is_measured_against_float32(tiny_model, pairs):
    settings = ScoreConfig(dtype="bfloat16")
    scores = score_pairs(pairs, tiny_model, settings)
    again = rescore_sample(scores, pairs, tiny_model, settings)
    exact = score_pairs(pairs, tiny_model)
    assert again.sort("pair_id").equals(exact.sort("pair_id"))  # of 8 pairs at least 8
    gap = (scores["chosen_logp"] - exact["chosen_logp"]).abs()
    assert 0 < gap.max() < 0.5
    model, tokenizer = load_model(tiny_model, "bfloat16")
    key = model_key(model)
    rescore_sample(scores, pairs, (model, tokenizer), settings)
    assert model_key(model) == key  # a loaded model is given back as it was
    assert model.dtype == torch.bfloat16


def test_the_command_writes_the_noise_of_a_coarse_dtype(tiny_model, pair_file, tmp_path, run_command):
    run = tmp_path / "run"
    args = ("--pairs.source", pair_file, "--model", tiny_model, "--pairs.hold-out", "0")
    code, out, err = run_command("sdpo_data.score", run, *args, "--dtype", "bfloat16")
    assert (code, "reward_accuracy" in out) == (0, True), err
    assert "noise of bfloat16: 95 % of re-scored pairs move less than the band" in out
    assert pl.read_parquet(run / "noise.parquet")["dtype"].unique().to_list() == ["float32"]
    assert "8 pairs: 0 answers from the store, 16 computed" in err
    assert "of the floor" in err


@pytest.mark.real
def test_scores_equal_trls_reference_pass(shared_data, tmp_path):
    """The oracle: TRL 1.16 tokenises and scores the raw pairs by itself, one by one."""
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
                activation_checkpointing=False, report_to="none", per_device_train_batch_size=1, disable_tqdm=True,
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
