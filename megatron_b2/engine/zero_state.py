"""Where each ZeRO stage of DeepSpeed keeps fp32 weights and AdamW moments; does not import it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_b2.checkpoint.logical import LogicalState
from megatron_b2.config.schema import ModelConfig
from megatron_b2.engine.sharded_state import KINDS, Fragment, logical_name, sharded_state
from megatron_b2.optim.adamw import create_state
from megatron_b2.parallel.layout import Coordinates, Layout


class ZeroState:
    """Fragments of one rank.

    Args:
        engine: a DeepSpeedEngine that was just initialised.
        stage: ZeRO stage.
        model: shape of the whole model.
        layout: sizes of the parallel dimensions.
        coordinates: this rank's place.
    """

    def __init__(
        self, engine: Any, *, stage: int, model: ModelConfig, layout: Layout, coordinates: Coordinates
    ) -> None:
        self._engine = engine
        self._stage = stage
        self._model = model
        self._layout = layout
        self._place = coordinates
        self._names = {p: logical_name(name) for name, p in engine.module.named_parameters()}
        self._zero = engine.optimizer
        self._adam = engine.basic_optimizer if stage == 0 else self._zero.optimizer
        create_state(self._adam, self._flat_masters())
        if stage in (1, 2):
            # Points every parameter at its slice of the moments just made.
            self._zero._lazy_init_hp_params_optimizer_state()

    @property
    def _is_bf16_optimizer(self) -> bool:
        """DeepSpeed's own optimizer for bf16 at stage 1 with fp32 accumulation."""
        return hasattr(self._zero, "fp32_groups_flat_partition")

    def _flat_masters(self) -> list[Tensor]:
        if self._stage == 0:
            return list(self._names)
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        if self._is_bf16_optimizer:
            return list(self._zero.fp32_groups_flat_partition)
        return list(self._zero.single_partition_of_fp32_groups)

    def logical_state(self, count: Tensor) -> LogicalState:
        """See `Engine.logical_state`; `count` [1] is the number of optimizer steps."""
        place, layout = self._place, self._layout
        shared_rank = place.dp * layout.context + place.cp
        return sharded_state(
            self._model,
            {kind: list(self._fragments(key)) for kind, key in KINDS},
            count,
            tensor_size=layout.tensor,
            tensor_rank=place.tp,
            write_copies=self._stage > 0 or shared_rank == 0,
            write_count=layout.rank_of(tp=place.tp, cp=place.cp, dp=place.dp, pp=place.pp) == 0,
        )

    def _fragments(self, key: str | None) -> Iterator[Fragment]:
        """Fragments of the weights, or of the moment `key`."""
        for parameter, name in self._names.items():
            if self._stage == 0:
                tensor = parameter if key is None else self._adam.state[parameter][key]
                yield Fragment(name, tuple(tensor.shape), 0, tensor.detach().view(-1))
            elif self._stage == 3:
                flat, _ = self._zero._get_fp32_opt_state_partition(parameter, True, optim_state_key=key)
                place = self._place.dp * self._layout.context + self._place.cp
                start = min(place * flat.numel(), parameter.ds_numel)
                held = flat.detach()[: parameter.ds_numel - start]
                yield Fragment(name, tuple(parameter.ds_shape), start, held)
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                start = mapping.lp_fragment_address.start
                yield Fragment(name, tuple(parameter.shape), start, mapping.get_hp_fragment(key).detach())

    @torch.no_grad()
    def refresh(self, count: Tensor) -> None:
        """Copy fp32 weights to the working weights and the step count to every partition."""
        for master in self._flat_masters():
            self._adam.state[master]["step"].copy_(count[0])
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        if self._stage == 3:
            self._zero._partition_all_parameters()
            for group in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
            # The copies that hpZ keeps in the node are of the weights before.
            self._zero.invalidate_secondary_tensor()

    def discard_gradients(self) -> None:
        """Drop the gradients of an unfinished step."""
        if self._stage == 0:
            self._engine.zero_grad()
            return
        self._zero.zero_grad()
        if self._stage in (1, 2) and not self._is_bf16_optimizer:
            self._zero.micro_step_id = -1
            for group in list(self._zero.averaged_gradients):
                self._zero.averaged_gradients[group] = None
                self._zero.all_grad_tensors[group] = None
            self._zero._release_preflattened_grad_buffers()
            if self._zero.cpu_offload:
                # DeepSpeed remembers an overflow until its next step, and would skip that one.
                self._zero.reset_cpu_buffers()
        if self._stage == 3:
            self._zero.micro_step_id = 0
            self._zero._epilogue_ran_this_backward = False
            self._zero.averaged_gradients = {}
