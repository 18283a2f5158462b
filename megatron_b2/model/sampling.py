"""From the logits of the last position to the next token: pure functions.

Shapes: B batch, V vocabulary, T tokens so far. The order is the one of `transformers`: repetition penalty,
temperature, top-k, top-p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_b2.errors import InputError


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    previous_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row: logits [V] or [B, V] give ids int64 [] or [B].

    `temperature` 0 takes the most likely token (ties: the lowest id). `previous_ids` int64 [T] or [B, T] are
    what `repetition_penalty` looks at. Raises InputError for settings out of range.
    """
    filtered = filter_logits(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        previous_ids=previous_ids,
    )
    if temperature == 0.0:
        return filtered.argmax(dim=-1)
    return torch.multinomial(filtered.softmax(dim=-1), num_samples=1, generator=generator).squeeze(-1)


def filter_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    previous_ids: Tensor | None = None,
) -> Tensor:
    """The fp32 logits that are sampled from, same shape; excluded tokens are -inf.

    `top_k` 0 and `top_p` 1 keep everything; `top_p` keeps the smallest set of tokens whose probability
    reaches it. With `temperature` 0 only the repetition penalty applies.
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
    scores = logits.float()
    if repetition_penalty != 1.0 and previous_ids is not None and previous_ids.numel() > 0:
        scores = _penalize(scores, previous_ids, repetition_penalty)
    if temperature == 0.0:
        return scores
    scores = scores / temperature
    if 0 < top_k < scores.shape[-1]:
        smallest_kept = scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < smallest_kept, -torch.inf)
    if top_p < 1.0:
        scores = _keep_nucleus(scores, top_p)
    return scores


def check_sampling(*, temperature: float, top_k: int, top_p: float, repetition_penalty: float) -> None:
    """Raise InputError naming the first setting that is out of range."""
    if temperature < 0.0:
        raise InputError(f"temperature {temperature} is negative; 0 is greedy, 1 is the model's distribution")
    if top_k < 0:
        raise InputError(f"top-k {top_k} is negative; 0 keeps every token")
    if not 0.0 < top_p <= 1.0:
        raise InputError(f"top-p {top_p} is outside (0, 1]; 1 keeps every token")
    if repetition_penalty <= 0.0:
        raise InputError(f"repetition penalty {repetition_penalty} is not positive; 1 is off")


def _penalize(scores: Tensor, previous_ids: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative scores of the tokens seen, once each."""
    seen = scores.gather(-1, previous_ids)
    return scores.scatter(-1, previous_ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def _keep_nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Drop the least likely tokens whose probabilities add up to at most 1 - top_p; the best one stays."""
    ascending, order = scores.sort(dim=-1)
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    dropped[..., -1] = False
    return scores.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
