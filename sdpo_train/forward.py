"""An update's pairs through the model as prefix trees, with gradients, under TRL's own loss.

Two pieces, made for each other. `share_prefixes` takes the place of the fused forward that TRL's
trainers call: it gives the same log-probabilities, and computes what the answers share once.
`WholeUpdates` has a trainer take one batch per update and cut it into forward passes by content:
pairs with a common prompt together, no more tokens than suit the device. So the order of the data
across updates is kept, whatever the lengths inside one, and no token is padding.

The gradient of an update is a sum over its pairs, so neither changes what is computed. It is the
mean over the update's pairs even where they do not divide evenly, as in the last update of an epoch.
"""

import contextlib
import logging
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sdpo_data import flex
from sdpo_data.prefix import read_tree
from sdpo_data.probe import read_model
from sdpo_data.tables import SdpoError
from sdpo_data.tree import Request, count_tokens
from sdpo_train.config import ROW_TOKENS

log = logging.getLogger(__name__)

NOT_COMPUTED = ("entropy", "logits/chosen", "logits/rejected")  # a pass over (tokens, vocabulary) each, read by nothing


@dataclass(frozen=True)
class Sharing:
    """How a model's forward passes are to be cut."""

    row_tokens: int
    """Tokens of a forward pass; a pair with more has one to itself."""
    packed_length: int
    """Longest sequence that is computed in a tree; longer ones come padded, to TRL's own forward."""


@dataclass
class Fused:
    """What TRL reads of a forward pass; the names are its own. A dataclass, as DDP looks for tensors in it."""

    log_probs: torch.Tensor
    is_top1: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor


def share_prefixes(
    model: PreTrainedModel, longest: int, token_budget: int | None = None, unless: str | None = None
) -> Sharing:
    """Have a model that TRL's trainer was given compute shared prefixes once, where it can be read so.

    Args:
        model: causal LM with TRL's fused forward; of a PeftModel its base model.
        longest: tokens of the longest prompt + answer to come.
        token_budget: tokens of a forward pass at most; None for what suits the device.
        unless: why trees will not do, if the caller knows a reason.

    Returns:
        How `WholeUpdates` is to cut updates for it.
    """
    size = token_budget or ROW_TOKENS.get(model.device.type, ROW_TOKENS["cuda"])
    training = model.training
    reading = read_model(model.eval(), longest)
    model.train(training)
    packed_length = 0 if unless else reading.packed_length
    if longest > packed_length:
        log.info(
            "trained in padded batches of like length where pairs have more than %d tokens: %s",
            packed_length,
            unless or f"prefix trees are not exact there for {type(model).__name__}",
        )
    if not packed_length:
        return Sharing(size, 0)
    if reading.flex:
        model.set_attn_implementation(flex.NAME)  # for good: layers that are checkpointed attend again later
    padded = model.forward

    def forward(_: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Any = None, **inputs: Any) -> Any:
        if not fused_lm_head or inputs["attention_mask"].sum(1).max() > packed_length:
            return padded(*args, fused_lm_head=fused_lm_head, labels=labels, **inputs)
        read = labels != -100
        requests = read_requests(inputs["input_ids"], inputs["attention_mask"], read)
        with _as_it_was(model, padded):
            logps, likeliest = read_tree(model, requests, flex=reading.flex)
        read = read[:, 1:]  # row by row, as the requests are
        log_probs = torch.zeros(read.shape, dtype=logps.dtype, device=logps.device).masked_scatter(read, logps)
        unknown = torch.full_like(log_probs, torch.nan)
        return Fused(log_probs, torch.zeros_like(read).masked_scatter(read, likeliest), unknown, unknown)

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
    return Sharing(size, packed_length)


@contextlib.contextmanager
def _as_it_was(model: PreTrainedModel, forward: Callable[..., Any]) -> Iterator[None]:
    """Let the head be run by the forward from before: accelerate's autocast, entered twice, would never be left."""
    wrapped = model.forward
    model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        model.forward = wrapped  # type: ignore[method-assign]


def read_requests(ids: torch.Tensor, attention: torch.Tensor, completion: torch.Tensor) -> list[Request]:
    """Take rows padded on the right apart: of each its tokens, and where its completion starts.

    Raises:
        ValueError: a completion is not the end of its row, is the whole of it, or is missing.
    """
    tokens, ends, reads = ids.cpu().numpy(), attention.sum(1).cpu().numpy(), completion.cpu().numpy().astype(bool)
    starts = ends - reads.sum(1)
    place = np.arange(tokens.shape[1])
    if not (reads == (place >= starts[:, None]) & (place < ends[:, None])).all():
        raise ValueError("a completion that is not the end of its row")
    if not ((starts >= 1) & (starts < ends)).all():
        raise ValueError("a row without a prompt or without a completion")
    return [(row[:end], int(start)) for row, end, start in zip(tokens, ends, starts, strict=True)]


def plan_passes(requests: Sequence[Request], sharing: Sharing) -> list[list[int]]:
    """Group an update's pairs into forward passes, the largest first, so that memory runs out at once or never.

    Args:
        requests: the chosen answers', then the rejected ones' in the same order.

    Returns:
        Numbers of pairs. They depend on what the pairs are, not on their order.
    """
    pairs = len(requests) // 2
    both = [(requests[pair], requests[pair + pairs]) for pair in range(pairs)]
    longest = [max(len(ids) for ids, _ in sides) for sides in both]
    content = [np.concatenate([ids for ids, _ in sides]).astype(">i4").tobytes() for sides in both]
    rows: list[list[int]] = []
    for pair in sorted(range(pairs), key=lambda pair: (content[pair], pair)):  # a common prompt stands together
        if longest[pair] > sharing.packed_length:
            continue
        row = rows[-1] if rows else []
        if row and count_tokens([side for other in (*row, pair) for side in both[other]]) <= sharing.row_tokens:
            row.append(pair)
        else:
            rows.append([pair])
    cost = {id(row): count_tokens([side for pair in row for side in both[pair]]) for row in rows}
    beyond = sorted((p for p in range(pairs) if longest[p] > sharing.packed_length), key=lambda p: (-longest[p], p))
    while beyond:
        size = max(1, sharing.row_tokens // (2 * longest[beyond[0]]))
        rows.append(beyond[:size])
        cost[id(rows[-1])] = 2 * longest[beyond[0]] * len(rows[-1])
        beyond = beyond[size:]
    return sorted(rows, key=lambda row: -cost[id(row)])


class WholeUpdates:
    """Mixed in before a TRL trainer: a batch of its loader is an update, of all processes together.

    Set `per_device_train_batch_size` to the pairs of an update and accumulate no gradients. Every
    process is given the whole update and takes its share of the forward passes, which are the same
    for any number of processes; `sharing` must be set before training.

    TRL's metrics are means over the update's pairs, or over its tokens where they are of tokens,
    and one value per update. Losses that compare pairs with each other (aot, aot_unpaired, sft) do
    so within a forward pass, as with any accumulation of gradients.
    """

    sharing: Sharing
    check_start: Callable[[float], None] | None = None
    """Told, after the first update's forward passes and before its optimiser step, the largest |policy -
    reference| of an answer's log-probability, nats. What it raises stops training."""
    _gaps: list[torch.Tensor] | None = None

    def share_prefixes(self: Any, longest: int, token_budget: int | None = None) -> None:
        """Share what the answers have in common, where this trainer's loss can be computed so."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise SdpoError("Sharded training (FSDP, DeepSpeed) is not supported; use accelerate's plain DDP, or LoRA.")
        unless = None
        if self.aux_loss_enabled:
            unless = "the loss of a mixture of experts' router is over all tokens"
        elif self.use_weighting:
            unless = "use_weighting needs the whole distribution of every token"
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.sharing = share_prefixes(base, longest, token_budget, unless)

    def get_train_dataloader(self: Any) -> torch.utils.data.DataLoader:
        """Give whole updates in the order of the data, to every process the same."""
        return torch.utils.data.DataLoader(
            self._remove_unused_columns(self.train_dataset, description="training"),
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def training_step(self: Any, model: Any, inputs: dict[str, Any], _: Any = None) -> torch.Tensor:
        """Compute the loss and gradients of one update, forward pass by forward pass."""
        inputs = self._prepare_inputs(inputs)
        pairs = len(inputs["input_ids"]) // 2
        requests = read_requests(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
        own = _deal(plan_passes(requests, self.sharing), self.accelerator)
        account, loss = _Account(self, inputs), 0.0
        self._gaps = [] if self.check_start is not None and self.state.global_step == 0 else None
        for number, (group, counts) in enumerate(own):
            part = _take(inputs, group)
            # the trainer divides a pass's mean by this, and DDP the sum over processes by their number
            share = len(group) * self.accelerator.num_processes / pairs if counts else 0.0
            self.current_gradient_accumulation_steps = 1 / share if share else float("inf")
            waits = contextlib.nullcontext() if number == len(own) - 1 else self.accelerator.no_sync(model)
            with account.alone(part, counts=counts), waits:
                loss += super().training_step(model, part)  # type: ignore[misc]
        account.close()
        if self._gaps:
            gaps = self.accelerator.gather(torch.stack(self._gaps).max()[None])
            self.check_start(float(gaps.max()))
        self._gaps = None
        return loss  # type: ignore[return-value]

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Have TRL compute it, and look at the log-probabilities of the first update."""
        if self._gaps is None:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

        def watched(**given: Any) -> Any:
            outputs = model(**given)
            reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            self._gaps.append((outputs.log_probs.detach().sum(1) - reference).abs().max())
            return outputs

        return super().compute_loss(watched, inputs, *args, **kwargs)  # type: ignore[misc]


def _deal(passes: list[list[int]], accelerator: Any) -> list[tuple[list[int], bool]]:
    """Give this process its share: every n-th, as they are sorted by size; where there is none, one that counts 0."""
    own = passes[accelerator.process_index :: accelerator.num_processes]
    return [(group, True) for group in own] or [(passes[-1], False)]


def _take(inputs: dict[str, torch.Tensor], group: list[int]) -> dict[str, torch.Tensor]:
    """Cut some pairs out of a batch of TRL's collator, and the columns that only others need."""
    pairs = len(inputs["input_ids"]) // 2
    rows = torch.tensor([*group, *(pair + pairs for pair in group)], device=inputs["input_ids"].device)
    length = int(inputs["attention_mask"][rows].sum(1).max())
    return {
        name: value[rows][:, :length] if value.dim() == 2 else value[rows[: len(group)]]
        for name, value in inputs.items()
    }


class _Account:
    """An update's metrics out of those of its forward passes, each with the weight it has in the mean."""

    def __init__(self, trainer: Any, inputs: dict[str, torch.Tensor]):
        self.trainer, self.inputs = trainer, inputs
        self.whole = self._weights(inputs)
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.tokens = trainer._total_train_tokens

    @contextlib.contextmanager
    def alone(self, part: dict[str, torch.Tensor], *, counts: bool) -> Iterator[None]:
        """Take what TRL notes in a forward pass, of this process only: they do not run equally many."""
        trainer, kept = self.trainer, self.trainer._metrics["train"]
        trainer._metrics["train"] = noted = defaultdict(list)
        trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda value: value
        try:
            yield
        finally:
            del trainer.accelerator.gather, trainer.accelerator.gather_for_metrics
            trainer._metrics["train"] = kept
        weights = self._weights(part)
        for name, values in noted.items():
            self.sums[name] += sum(values) * weights.get(name, weights[""]) if counts else 0.0

    def close(self) -> None:
        """Note the update's values, over all processes."""
        trainer = self.trainer
        names = sorted(self.sums)
        sums = torch.tensor([self.sums[name] for name in names], dtype=torch.float64, device=trainer.accelerator.device)
        totals = trainer.accelerator.reduce(sums, "sum").tolist()
        for name, total in zip(names, totals, strict=True):
            if name not in NOT_COMPUTED:
                trainer._metrics["train"][name].append(total / self.whole.get(name, self.whole[""]))
        trainer._total_train_tokens = self.tokens + int(self.inputs["attention_mask"].sum())
        trainer._metrics["train"]["num_tokens"] = [trainer._total_train_tokens]

    @staticmethod
    def _weights(inputs: dict[str, torch.Tensor]) -> dict[str, int]:
        """How much a metric weighs, by name: pairs unless it is of tokens."""
        chosen, _ = inputs["completion_mask"].sum(1).chunk(2)
        return {"": len(chosen), "mean_token_accuracy": int(chosen.sum())}
