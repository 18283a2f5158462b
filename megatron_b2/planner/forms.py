"""What a row of BLOOM's log or of FSDP's tables says: its workload, cluster and measurements.

What a source leaves open is filled in with what its programs did at the time, and listed in `assumed`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from megatron_b2.planner.flops import Convention, seconds_from_tflops, step_flops
from megatron_b2.planner.hardware import Cluster, load_hardware
from megatron_b2.planner.megatron_rows import FP8, LARGEST_MICRO, is_possible, shape_of
from megatron_b2.planner.models import MODELS, known_model, llama_named
from megatron_b2.planner.rows import (
    THOUSANDS,
    PublishedRun,
    Row,
    RowError,
    cluster_of,
    fitted_batch,
    memory_of,
    needed,
    number,
    positive,
    ran_out,
    recompute_of,
    stage_of,
    whole,
)
from megatron_b2.planner.workload import ModelShape, Recompute, Workload

BLOOM_VOCABULARY: Final = 250_880
"""Rows of BLOOM's embedding (bigscience, tr11-176B)."""
BLOOM_HEADS: Final = 64
"""Heads where a row's are not known: those of all rows before the comparison of heads, by the log."""
BLOOM_FP32_SUMS: Final = (2, 28)
"""Month and day of 2022 from which BLOOM's log has BF16 with unsharded fp32 gradients (its section
"Rebalancing layers")."""
WORK_TOLERANCE: Final = 0.15
"""Between the work of a row's batch and its seconds times TFLOP/s, whose early formula was 3 % low."""
THREE_DIGITS: Final = 3
"""Digits of a printed size from which it tells one layer more or less apart."""


def bloom_run(row: Row) -> PublishedRun:
    """A row of BLOOM's log."""
    assumed: list[str] = []
    t, p, micro = (needed(row, name) for name in ("tp", "pp", "mbs"))
    given, nodes = whole(row, "dp"), whole(row, "nodes")
    data = given or 1
    if nodes is not None:
        if 8 * nodes % (t * p):
            raise RowError(f"{nodes} nodes of 8 GPUs are no multiple of tensor x pipeline = {t} x {p}")
        data = 8 * nodes // (t * p)
    if given is not None and given != data:
        assumed.append(f"data {data} instead of {given}, by the number of nodes")
    batch, note = fitted_batch(needed(row, "gbs"), micro=micro, data=data)
    stage = number(row.get("zs", ""))
    if stage not in (None, 0, 1):
        raise RowError(f"zs = {row['zs']!r}: BLOOM's log has ZeRO stages 0 and 1")
    is_late = _month_and_day(row.get("notes", "")) >= BLOOM_FP32_SUMS
    work = Workload(
        shape=_bloom_shape(row, p, assumed),
        seq_len=2048,
        micro_batch_size=micro,
        global_batch=batch,
        tensor=t,
        pipeline=p,
        data=data,
        zero_stage=0 if stage == 0 else 1,
        recompute="full",
        attention="unfused",
        # ZeRO-0 ran only on the branch that had fp32 sums before the others.
        gradient_bytes=4 if is_late or stage == 0 else 2,
        overlap_data=False,
        chunked_head=False,
        balanced_stages=is_late,
    )
    work = _by_stated_work(work, row, assumed)
    seconds, tflops = positive(row, "sec_it"), positive(row, "tflops")
    if seconds is None and tflops is not None:
        seconds = seconds_from_tflops(work, tflops, "sc21")
    return PublishedRun(
        form="bloom",
        row=0,
        source="BLOOM",
        workload=work,
        cluster=load_hardware("a100-80g", node="opa100x4"),
        measured_time=seconds,
        measured_memory=memory_of(row),
        out_of_memory=ran_out(row),
        assumed=(*assumed, *note),
    )


def _month_and_day(notes: str) -> tuple[int, int]:
    found = re.search(r"\b(\d\d)-(\d\d)\b", notes)
    return (int(found[1]), int(found[2])) if found else (2, 20)


def _bloom_shape(row: Row, pipeline: int, assumed: list[str]) -> ModelShape:
    """GPT with a tied table. The layers are those of the section's heading, but where a size of three digits
    says that a row has others, or the pipeline does not divide them, they are a multiple of the pipeline."""
    h, given = needed(row, "hidden"), whole(row, "layers")
    shape = ModelShape(
        hidden_size=h,
        ffn_hidden_size=4 * h,
        num_layers=given or 1,
        num_heads=_bloom_heads(row, h, assumed),
        vocab_size=BLOOM_VOCABULARY,
        gated=False,
        tied=True,
    )
    printed = re.search(r"\d+(?:\.(\d+))?", row.get("size", ""))
    if printed is None:
        if given is None:
            raise RowError("layers and size are missing")
        return shape
    size, unit = float(printed[0]), 10.0 ** -len(printed[1] or "")
    if given is not None:
        is_telling = len(printed[0].replace(".", "")) >= THREE_DIGITS or given % pipeline
        if not is_telling or abs(shape.parameters / 1e9 - size) <= unit / 2:
            return shape
    layers = (size * 1e9 - shape.table_parameters) / shape.layer_parameters
    rounded = max(1, round(layers / pipeline)) * pipeline
    if rounded != given:
        assumed.append(f"{rounded} layers, by the size")
    return replace(shape, num_layers=rounded)


def _bloom_heads(row: Row, hidden: int, assumed: list[str]) -> int:
    given = whole(row, "nheads")
    if given is not None and hidden % given == 0:
        return given
    heads = next(heads for heads in (BLOOM_HEADS, 80, 96, 112, 40, 32, 16, 1) if hidden % heads == 0)
    why = f" instead of {given}, which do not divide {hidden}" if given else ""
    assumed.append(f"{heads} heads{why}")
    return heads


def _by_stated_work(work: Workload, row: Row, assumed: list[str]) -> Workload:
    """Seconds times TFLOP/s are the work that was done. Where it is not that of the row's batch, the batch is
    another (a heading of the log says so for some): take what the work says."""
    seconds, tflops = positive(row, "sec_it"), positive(row, "tflops")
    if seconds is None or tflops is None:
        return work
    ratio = seconds * tflops * 1e12 * work.gpus / step_flops(work, "sc21")
    if abs(ratio - 1) <= WORK_TOLERANCE:
        return work
    unit = work.micro_batch_size * work.data
    batch = max(1, round(work.global_batch * ratio / unit)) * unit
    assumed.append(f"global batch {batch} instead of {work.global_batch}, by seconds times TFLOP/s")
    return replace(work, global_batch=batch)


def fsdp_run(row: Row) -> PublishedRun:
    """A row of llm-foundry's or torchtitan's tables."""
    text = " ".join((row.get("parallel", ""), row.get("notes", "")))
    if re.search(FP8, text, re.IGNORECASE):
        raise RowError("fp8 is not modelled")
    cluster, assumed = cluster_of(row), list[str]()
    size = positive(row, "params", THOUSANDS)
    shape = _fsdp_shape(row, size, assumed)
    last: tuple[Workload, list[str]] | None = None
    for micro in _micro_batches(row):
        for kind in _recomputations(row):
            last = _fsdp_workload(row, shape, micro, kind)
            if is_possible(last[0], cluster):
                break
        else:
            continue
        break
    assert last is not None
    work, notes = last
    return PublishedRun(
        form="fsdp",
        row=0,
        source=row.get("source", ""),
        workload=work,
        cluster=cluster,
        measured_time=_fsdp_time(row, work, cluster),
        measured_memory=memory_of(row),
        out_of_memory=ran_out(row),
        assumed=(*assumed, *notes),
    )


def _fsdp_shape(row: Row, size: float | None, assumed: list[str]) -> ModelShape:
    """The model by its name, by its columns, or by its parameters alone."""
    name = row["model"]
    named = known_model(name)
    if named is not None:
        if size is None and len(llama_named(name)) > 1:
            assumed.append("the oldest Llama of this size")
        return known_model(name, size) or named
    if whole(row, "hidden") is not None:
        return shape_of(row, assumed)
    shape = known_model(name, size)
    if shape is None:
        raise RowError(f"model {name!r} is not in {MODELS}: add columns hidden, layers and heads")
    assumed.append("the shape of a public model with as many parameters")
    return shape


def _fsdp_time(row: Row, work: Workload, cluster: Cluster) -> float | None:
    """Seconds a step: of tokens/s, or of MFU or HFU, a percentage or a share of the data sheet's peak."""
    rate = positive(row, "tok_s_gpu", THOUSANDS)
    if rate is not None:
        return work.tokens_per_step / work.gpus / rate
    conventions: tuple[tuple[str, Convention], ...] = (("mfu", "llm-foundry"), ("hfu", "llm-foundry-hfu"))
    peak = load_hardware(cluster.gpu.name).gpu.peak_flops / 1e12
    for name, convention in conventions:
        if (share := positive(row, name)) is not None:
            return seconds_from_tflops(work, share / (100 if share > 1 else 1) * peak, convention)
    return None


def _fsdp_split(row: Row) -> tuple[int, int, int, int]:
    """Tensor, pipeline, context and data ranks."""
    gpus = needed(row, "gpus")
    t, p, c = (_sized(row["parallel"], name) or 1 for name in ("TP", "PP", "CP"))
    if gpus % (t * p * c):
        raise RowError(f"gpus = {gpus} is no multiple of tensor x pipeline x context = {t} x {p} x {c}")
    return t, p, c, gpus // (t * p * c)


def _micro_batches(row: Row) -> list[int]:
    """The micro-batch of the row, else all that its batch allows, from the largest down. With a pipeline that
    it leaves idle, it is the batch of a data rank, of which one sequence goes at a time (torchtitan)."""
    given, batch = whole(row, "mbs"), whole(row, "gbs")
    _, p, _, data = _fsdp_split(row)
    if given is not None:
        rounds = batch // (given * data) if batch else whole(row, "gradaccum") or 1
        return [given] if p == 1 or rounds >= p else [1]
    share = batch // data if batch else LARGEST_MICRO
    return [micro for micro in range(min(share, LARGEST_MICRO), 1, -1) if share % micro == 0] + [1]


def _recomputations(row: Row) -> tuple[Recompute, ...]:
    """What the row recomputed, else the least first."""
    stated = recompute_of(row["act_ckpt"])
    return ("none", "selective", "full") if stated is None else (stated,)


def _fsdp_workload(row: Row, shape: ModelShape, micro: int, kind: Recompute) -> tuple[Workload, list[str]]:
    """The workload, and what of it the row does not say."""
    t, p, c, data = _fsdp_split(row)
    given = whole(row, "gbs") or (whole(row, "mbs") or micro) * data * (whole(row, "gradaccum") or 1)
    batch, note = fitted_batch(given, micro=micro, data=data)
    if whole(row, "mbs") != micro:
        note.append(f"micro-batch {micro}")
    if recompute_of(row["act_ckpt"]) is None:
        note.append(f"recompute {kind}")
    if re.search(r"HSDP|hybrid", row["parallel"], re.IGNORECASE):
        note.append("parameters sharded over all data ranks")
    is_foundry = "foundry" in row.get("source", "").lower()
    named = stage_of(row["parallel"])
    stage = 3 if named is None else named
    work = Workload(
        shape=shape,
        seq_len=needed(row, "seq"),
        micro_batch_size=micro,
        global_batch=batch,
        tensor=t,
        pipeline=p,
        context=c,
        data=data,
        zero_stage=1 if p > 1 and stage > 1 else stage,
        zero_engine="fsdp",
        recompute=kind,
        attention="flash-1" if is_foundry else "fused",
        sequence_parallel=t > 1,
        gradient_bytes=2 if is_foundry else 4,
        gradient_copy=False,
        chunked_head=False,
        fused_loss=is_foundry,
    )
    return work, note


def _sized(text: str, name: str) -> int | None:
    """The number that a dimension has in "FSDP8xTP8xPP4"."""
    found = re.search(rf"{name}\s*=?\s*(\d+)", text, re.IGNORECASE)
    return int(found[1]) if found else None
