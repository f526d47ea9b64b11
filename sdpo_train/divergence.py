"""How far a step's model is from its reference and from S: KL divergences on answers that it writes itself."""

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from sdpo_data.models import load_model
from sdpo_data.prefix import score_completions
from sdpo_data.tables import METRICS
from sdpo_data.tree import Request
from sdpo_train.config import StepConfig
from sdpo_train.diagnostics import kl_estimate
from sdpo_train.work import StepWork

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 64  # of a sampled answer: its KL is that of answers cut there


def measure_divergence(
    work: StepWork,
    config: StepConfig,
    encoded: pl.DataFrame,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    update: int,
) -> pl.DataFrame:
    """Estimate KL(model || reference) and KL(model || S) per answer, nats, on sampled answers.

    Answers are sampled at temperature 1 from the whole distribution, to the first `kl_samples` prompts of
    the step (by pair_id), up to NEW_TOKENS tokens; log-probabilities are of the same engine that scores.

    Returns:
        METRICS rows kl_ref/* and kl_base/*, see `kl_estimate`.
    """
    chosen = encoded.sort("pair_id").unique("prompt_ids", maintain_order=True).head(config.kl_samples)
    requests = _sample(model, tokenizer, [ids.to_numpy() for ids in chosen["prompt_ids"]], work.seed)
    own = _logps(model, requests, work.token_budget)
    rows: list[tuple[str, int, int, int, str, float]] = []
    known: dict[str, list[float]] = {}
    for name, folder in (("ref", work.reference), ("base", work.base or work.start)):
        if folder not in known:
            other, _ = load_model(folder, str(model.dtype).removeprefix("torch."))
            known[folder] = _logps(other, requests, work.token_budget)
        found = kl_estimate(own, known[folder])
        rows += [(work.arm, work.seed, work.step, update, f"kl_{name}/{what}", value) for what, value in found.items()]
    return pl.DataFrame(rows, METRICS, orient="row")


def _sample(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: list[np.ndarray], seed: int
) -> list[Request]:
    import torch

    torch.manual_seed(seed)
    length, pad = max(map(len, prompts)), tokenizer.pad_token_id
    ids = np.full((len(prompts), length), pad)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
    seen = np.arange(length)[None] >= length - np.array([[len(prompt)] for prompt in prompts])
    with torch.inference_mode():
        written = model.generate(  # type: ignore[operator]
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=torch.from_numpy(seen.astype(np.int64)).to(model.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=pad,
        )[:, length:].cpu()
    stops: Any = model.generation_config
    ends = set(np.atleast_1d(stops.eos_token_id if stops.eos_token_id is not None else tokenizer.eos_token_id).tolist())
    requests: list[Request] = []
    for prompt, answer in zip(prompts, written.tolist(), strict=True):
        stop = next((place + 1 for place, token in enumerate(answer) if token in ends), len(answer))
        requests.append((np.concatenate([prompt, answer[:stop]]), len(prompt)))
    return requests


def _logps(model: "PreTrainedModel", requests: list[Request], token_budget: int | None) -> list[float]:
    """Log-probability of each answer, nats."""
    found = [0.0] * len(requests)
    for places, completions in score_completions(model, requests, token_budget):
        for place, completion in zip(places, completions, strict=True):
            found[place] = float(completion.logps.sum(dtype=np.float64))
    return found
