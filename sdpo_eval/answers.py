"""Have a model answer questions on the prefix engine, and score its answers as lm-eval does."""

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from sdpo_data.models import load_model, load_tokenizer, model_key
from sdpo_data.prefix import score_together
from sdpo_data.tables import SdpoError
from sdpo_eval import h4
from sdpo_eval.plan import Candidate, Plan
from sdpo_eval.questions import adds_bos, sequences_of, slices

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
    Engine = Callable[[], Loaded]

SAVE_SECONDS = 60.0  # between two writes: what a kill can cost


def answer_requests(
    model: "PreTrainedModel",
    task: h4.Task,
    requests: pl.DataFrame,
    token_budget: int | None,
    advance: Callable[[int], None],
) -> Iterator[list[dict[str, Any]]]:
    """Have a model weigh the choices of each question, and score its answers.

    A whole slice goes through the engine together, so that shots which its questions share are
    computed once. Several processes share the work, and each gets every answer.

    Args:
        requests: REQUESTS frame.
        advance: is told how many questions are done.

    Yields:
        Every minute, and at the end of a slice, the questions answered since: of each item_id,
        subject, correct, score, gold_logp and choice_logps (nats), the columns of ITEMS that do
        not say which model it was.

    Raises:
        SdpoError: a log-probability is not finite.
    """
    done, saved = [], time.monotonic()
    for part in slices(requests):
        questions = sequences_of(part)
        owners = [(row, place) for row, question in enumerate(questions) for place in range(len(question))]
        logps = [[math.nan] * len(question) for question in questions]
        left = [len(question) for question in questions]
        items = part.select("item_id", "lengths", "gold").rows(named=True)
        flat = [sequence for question in questions for sequence in question]
        for places, completions in score_together(model, flat, token_budget):
            for owner, completion in zip(places, completions, strict=True):
                row, place = owners[owner]
                logps[row][place] = float(completion.logps.sum(dtype="float64"))
                left[row] -= 1
                if not left[row]:
                    done.append(score_answers(task, **items[row], logps=logps[row]))
                    advance(1)
            if time.monotonic() - saved > SAVE_SECONDS:
                yield done
                done, saved = [], time.monotonic()
        yield done
        done, saved = [], time.monotonic()


def score_answers(
    task: h4.Task, item_id: str, lengths: list[int], gold: list[bool], logps: list[float]
) -> dict[str, Any]:
    """Score the choices of one question as lm-eval does.

    Args:
        lengths: characters of each choice, its leading blank not counted.
        gold: which choices are right.
        logps: of each choice, nats.

    Source: `process_results` of lm-eval 0.4.13: acc, acc_norm; for mc2 the share of probability on
        the right choices. Deviation: mc2's exponentials are taken from the largest downwards, so
        that they cannot all underflow.
    """
    values = np.asarray(logps)
    if task.metric == "mc2":
        shares = np.exp(values - values.max())
        correct, score = None, float(shares[gold].sum() / shares.sum())
    else:
        with np.errstate(divide="ignore"):  # an empty choice has -inf, as in lm-eval
            weighed = values / np.asarray(lengths, dtype=float) if task.metric == "acc_norm" else values
        correct = score = float(gold[int(weighed.argmax())])
    if not np.isfinite([score, *logps]).all():
        raise SdpoError(
            f"{task.title}, item {item_id}: log-probabilities {logps} give no score. "
            "Set eval.dtype to float32, or look whether the model's weights are finite."
        )
    row = {"item_id": item_id, "subject": item_id.rpartition("/")[0], "correct": correct, "score": score}
    return row | {"gold_logp": float(values[gold].max()), "choice_logps": logps}


@contextmanager
def opened(candidate: Candidate, plan: Plan) -> "Iterator[Engine]":
    """Yield a function that loads the model when it is first called; free the model at the end."""
    loaded: list[Loaded] = []

    def engine() -> "Loaded":
        if not loaded:
            loaded.append(_load(candidate, plan.config.dtype))
            if plan.chain and candidate != plan.candidates[0]:
                _refuse_another_bos(candidate, plan.candidates[0], loaded[0][1])
        return loaded[0]

    yield engine
    if loaded:
        import torch

        loaded.clear()
        gc.collect()
        torch.cuda.empty_cache()


def _refuse_another_bos(candidate: Candidate, base: Candidate, tokenizer: "PreTrainedTokenizerBase") -> None:
    theirs = base.model[1] if isinstance(base.model, tuple) else load_tokenizer(base.model)
    if adds_bos(tokenizer) != adds_bos(theirs):
        verb = "adds" if adds_bos(tokenizer) else "does not add"
        raise SdpoError(
            f"The tokenizer in {candidate.model} {verb} BOS before a text, unlike the base model's: they would not be "
            "asked the same. Copy the base model's tokenizer files there."
        )


def _load(candidate: Candidate, dtype: str) -> Any:
    """Load a candidate's model and tokenizer, having seen that the weights are those it stands for."""
    import torch

    if isinstance(candidate.model, tuple):
        model, tokenizer = candidate.model
        if model.dtype != getattr(torch, dtype):
            raise SdpoError(
                f"The model {candidate.arm!r} is in {str(model.dtype)[6:]}, but eval.dtype is {dtype}: "
                "all models must be in one. Convert it, or set the other."
            )
        return model, tokenizer
    stored = model_key(candidate.model) == candidate.model_key  # if not, it may be the key of its float32 weights
    model, tokenizer = load_model(candidate.model, dtype if stored else "float32")
    if not stored and model_key(model) != candidate.model_key:
        raise SdpoError(
            f"{candidate.model} does not hold the weights of arm {candidate.arm}, seed {candidate.seed}, step "
            f"{candidate.step}: their key is {candidate.model_key}. It has changed since, or is another model."
        )
    return model if stored else model.to(getattr(torch, dtype)), tokenizer  # what lies on several devices stays there
