"""The Python API: load a model, ask it for logits, losses, gradients and text.

m = megatron_b2.load("runs/toy", dtype="float32")
m.logits(input_ids)
m.loss(input_ids, labels).total.backward(); m.hf_gradients()
m.generate(input_ids, max_new_tokens=32)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megatron_b2.checkpoint.hf_names import hf_tensors
from megatron_b2.checkpoint.logical import LogicalTensor, Piece
from megatron_b2.checkpoint.weights import DTYPES, MODEL, load_weights, open_weights
from megatron_b2.config.schema import ModelConfig
from megatron_b2.errors import InputError
from megatron_b2.model.cache import KVCache
from megatron_b2.model.model import BaichuanModel
from megatron_b2.model.sampling import sample
from megatron_b2.ops.head_loss import IGNORE_INDEX
from megatron_b2.ops.norm_head import inverse_row_norms, norm_head_logits

DType = Literal["float32", "bfloat16", "float16"]


class Loss(NamedTuple):
    """0-dim fp32 means."""

    total: Tensor
    """ce + max_z_weight * max_z; call backward on it."""
    ce: Tensor
    """Cross-entropy over the shifted positions whose label is not -100."""
    max_z: Tensor
    """Square of the largest logit, over all shifted positions."""


def load(
    path: Path | str,
    dtype: DType = "float32",
    *,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> LoadedModel:
    """Open one of our checkpoints (or a run folder: its newest) or a Hugging Face folder of either size.

    Args:
        path: the folder.
        dtype: of weights and activations.
        device: where the model computes.
        verify: hash every file of one of our checkpoints first; false trusts the disk and starts sooner.

    Raises:
        CheckpointError: the folder holds no model, is damaged, or does not fit its configuration.
    """
    source = open_weights(path, verify=verify)
    model = BaichuanModel(source.config, dtype=_dtype(dtype), device=device)
    state = {
        MODEL + name: LogicalTensor(tuple(p.shape), p.dtype, (Piece(p.detach(), (0,) * p.dim()),))
        for name, p in model.named_parameters()
    }
    load_weights(source, state)
    return LoadedModel(model)


class LoadedModel:
    """A model in memory. Token ids are int64 tensors or lists, [S] or [B, S]."""

    def __init__(self, model: BaichuanModel) -> None:
        self.model = model

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.model.config

    def logits(self, input_ids: Tensor | Sequence[Any], segment_ids: Tensor | None = None) -> Tensor:
        """fp32 logits [B, S, V].

        Args:
            input_ids: [S] or [B, S].
            segment_ids: integer, the shape of input_ids, non-decreasing along S; positions of different
                segments do not see each other and positions restart in each.
        """
        ids = self._ids(input_ids)
        return self.model.logits(ids, segment_ids=self._segments(segment_ids, ids))

    def loss(
        self,
        input_ids: Tensor | Sequence[Any],
        labels: Tensor | Sequence[Any],
        segment_ids: Tensor | None = None,
        max_z_weight: float = 0.0,
    ) -> Loss:
        """Language-model loss with the published semantics: position t predicts labels[t + 1].

        Args:
            input_ids: [S] or [B, S], S >= 2.
            labels: the same shape, normally the same ids; -100 is ignored by the cross-entropy only.
            segment_ids: as in `logits`.
            max_z_weight: factor of max_z in `total`.
        """
        ids = self._ids(input_ids)
        targets = self._like_ids(labels, ids, what="labels")[:, 1:]
        if ids.shape[1] < 2:
            raise InputError(
                f"the loss needs at least 2 tokens a row, got input_ids of shape {list(ids.shape)}"
            )
        counted = targets != IGNORE_INDEX
        self._check_range(targets[counted], "labels")
        segments = self._segments(segment_ids, ids)
        num_targets, num_positions = max(1, int(counted.sum())), targets.numel()
        out = self.model(
            ids[:, :-1],
            targets,
            segment_ids=None if segments is None else segments[:, :-1],
            ce_scale=1 / num_targets,
            z_scale=max_z_weight / num_positions,
        )
        return Loss(out.total, out.ce / num_targets, out.max_z / num_positions)

    def hf_gradients(self) -> dict[str, Tensor]:
        """Gradients under the published parameter names, after `loss(...).total.backward()`."""
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        missing = [name for name, grad in gradients.items() if grad is None]
        if missing:
            raise InputError(f"no gradient for {missing[0]}: call .total.backward() on a loss first")
        return {
            tensor.name: gradients[tensor.ours][tensor.row : tensor.row + tensor.shape[0]]  # type: ignore[index]
            for tensor in hf_tensors(self.config, style="baichuan")
        }

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.model.zero_grad(set_to_none=True)

    def generate(
        self,
        input_ids: Tensor | Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop_ids: Sequence[int] = (),
    ) -> list[int]:
        """The tokens that follow one prompt, without the prompt; ends after a stop id or `max_new_tokens`.

        Args:
            input_ids: [S], at least one token.
            max_new_tokens: most tokens to add.
            temperature: 0 takes the most likely token.
            top_k: keep the k most likely tokens; 0 keeps all.
            top_p: keep the smallest set with this probability; 1 keeps all.
            repetition_penalty: divides the score of tokens already there; 1 is off.
            seed: of the draws; none draws from torch's global generator.
            stop_ids: end after any of these; the stop id is part of the result.
        """
        return list(
            self.stream(
                input_ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                stop_ids=stop_ids,
            )
        )

    def stream(
        self,
        input_ids: Tensor | Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[int]:
        """As `generate`, one token at a time as it is made."""
        ids = self._ids(input_ids)
        if ids.shape[0] != 1 or ids.shape[1] == 0:
            raise InputError(
                f"generation takes one prompt of at least one token, got shape {list(ids.shape)}"
            )
        device = ids.device
        generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
        weight = self.model.head.weight
        cache = KVCache(
            self.config,
            batch_size=1,
            max_length=ids.shape[1] + max_new_tokens,
            dtype=weight.dtype,
            device=device,
        )
        with torch.no_grad():
            inverse_norms = inverse_row_norms(weight)
        seen, step = ids, ids
        for _ in range(max_new_tokens):
            with torch.no_grad():
                hidden = self.model.hidden_states(step, cache=cache)[:, -1]
                logits = norm_head_logits(hidden, weight, inverse_norms=inverse_norms)
                step = sample(
                    logits,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    repetition_penalty=repetition_penalty,
                    previous_ids=seen,
                    generator=generator,
                ).unsqueeze(1)
            seen = torch.cat([seen, step], dim=1)
            token = int(step)
            yield token
            if token in stop_ids:
                return

    def _ids(self, input_ids: Tensor | Sequence[Any]) -> Tensor:
        ids = torch.as_tensor(input_ids, dtype=torch.int64, device=self.model.head.weight.device)
        ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
        if ids.dim() != 2:
            raise InputError(f"input_ids must have shape [S] or [B, S], got {list(ids.shape)}")
        self._check_range(ids, "input_ids")
        return ids

    def _segments(self, segment_ids: Tensor | None, ids: Tensor) -> Tensor | None:
        if segment_ids is None:
            return None
        segments = self._like_ids(segment_ids, ids, what="segment_ids")
        falls = (segments.diff(dim=1) < 0).nonzero()
        if len(falls):
            row, column = falls[0].tolist()
            raise InputError(
                f"segment_ids must not decrease, but row {row} goes from {int(segments[row, column])} to "
                f"{int(segments[row, column + 1])} at position {column + 1}: number documents 0, 1, 2, ..."
            )
        return segments

    def _like_ids(self, values: Tensor | Sequence[Any], ids: Tensor, *, what: str) -> Tensor:
        tensor = torch.as_tensor(values, device=ids.device)
        tensor = tensor.unsqueeze(0) if tensor.dim() == 1 else tensor
        if tensor.shape != ids.shape or tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"{what} of shape {list(tensor.shape)} and type {kind} must be integers of the shape of "
                f"input_ids, {list(ids.shape)}: give one a token"
            )
        return tensor

    def _check_range(self, ids: Tensor, what: str) -> None:
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size):
            raise InputError(
                f"{what} must be in [0, {self.config.vocab_size}), found {int(ids.min())} to "
                f"{int(ids.max())}: do they come from another tokenizer?"
            )


def _dtype(name: DType) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not known: use one of {', '.join(DTYPES)}")
    return DTYPES[name]
