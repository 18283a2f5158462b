"""Attention over context-parallel ranks against one process, and its messages against the timetable."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_b2.errors import ConfigError
from megatron_b2.ops import attention
from megatron_b2.ops.alibi import alibi_slopes
from megatron_b2.ops.attention import Documents, Pattern, Tile, causal_attention
from megatron_b2.ops.context_attention import context_attention
from megatron_b2.parallel.context_parallel import ContextParallel, Ring, resolve_method
from megatron_b2.testing.fork import run_ranks
from tests.ops.test_head_loss import LargestTensor
from tests.ops.test_ops import naive
from tests.parallel.trail import Trail

Method = Literal["ulysses", "ring"]
LENGTH, WIDTH = 48, 8
# Row 0 has documents across every border of 2 and 4 shards and inside shards; row 1 other ones.
STARTS = ((0, 5, 17, 30, 41), (0, 20, 22, 47))


def packing(starts: tuple[tuple[int, ...], ...] = STARTS, length: int = LENGTH) -> Tensor:
    """Segment ids int32 [len(starts), length] of documents that begin at `starts`."""
    segments = torch.zeros(len(starts), length, dtype=torch.int32)
    for row, first in zip(segments, starts, strict=True):
        row[list(first)[1:]] = 1
    return segments.cumsum(1).int()


def inputs(heads: int, *, batch: int = 2, length: int = LENGTH, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fused q, k, v [B, S, 3, H, D], as the model has them."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, length, 3, heads, WIDTH, generator=generator).to(dtype)


def probe(heads: int, *, batch: int = 2, length: int = LENGTH) -> Tensor:
    """Weights of the loss sum(out * probe), [B, S, H, D]."""
    return torch.randn(batch, length, heads, WIDTH, generator=torch.Generator().manual_seed(8))


def this_rank(method: Method) -> ContextParallel:
    return ContextParallel(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, method)


def whole(qkv: Tensor, slopes: Tensor | None, documents: Documents | None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, loss and gradient of qkv in one process."""
    qkv = qkv.clone().requires_grad_()
    out = causal_attention(*qkv.unbind(2), alibi_slopes=slopes, documents=documents)
    loss = (out.float() * probe(qkv.shape[3], batch=len(qkv), length=qkv.shape[1])).sum()
    loss.backward()
    return out.detach(), loss.detach(), qkv.grad


def part(
    qkv: Tensor, slopes: Tensor | None, documents: Documents | None, context: ContextParallel
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the shard of this rank."""
    weight = context.shard(probe(qkv.shape[3], batch=len(qkv), length=qkv.shape[1]))
    qkv = context.shard(qkv).clone().requires_grad_()
    q, k, v = qkv.unbind(2)
    out = context_attention(q, k, v, context=context, alibi_slopes=slopes, documents=documents)
    loss = (out.float() * weight).sum()
    loss.backward()
    return out.detach(), loss.detach(), qkv.grad


def on_ranks(size: int, method: Method, *args: Tensor | Documents | None) -> tuple[Tensor, Tensor, Tensor]:
    """`part` of all ranks put together."""
    results = run_ranks(size, lambda: part(*args, this_rank(method)))
    outs, losses, grads = zip(*results, strict=True)
    return torch.cat(outs, dim=1), torch.stack(losses).sum(), torch.cat(grads, dim=1)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize(
    ("size", "method", "heads", "block"),
    [(2, "ulysses", 6, 16), (4, "ulysses", 8, 16), (2, "ring", 5, 128), (2, "ring", 3, 7), (4, "ring", 5, 5)],
)
def test_equals_one_process(
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    method: Method,
    heads: int,
    block: int,
    alibi: bool,
    packed: bool,
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    slopes = alibi_slopes(heads) if alibi else None
    documents = Documents.of(packing()) if packed else None
    qkv = inputs(heads)
    expected = whole(qkv, slopes, documents)
    actual = on_ranks(size, method, qkv, slopes, documents)
    for mine, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "method"), [(2, "ulysses"), (4, "ring")])
def test_a_tensor_parallel_share_of_40_heads(size: int, method: Method) -> None:
    """Heads 20..29 of 40: their slopes come from the global list (two of the slopes would differ otherwise)."""
    assert resolve_method("auto", heads_local=10, context=size) == method
    slopes = alibi_slopes(40)
    documents = Documents.of(packing())
    qkv = inputs(40)
    expected = whole(qkv, slopes, documents)
    share = slice(20, 30)
    out, _, grad = on_ranks(size, method, qkv[:, :, :, share], slopes[share], documents)
    # The probe of 10 heads is another one than that of 40: compare with the share alone, too.
    torch.testing.assert_close(out, expected[0][:, :, share], atol=1e-5, rtol=1e-5)
    alone = whole(qkv[:, :, :, share], slopes[share], documents)
    torch.testing.assert_close(grad, alone[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_bf16_is_as_close_as_torch(method: Method) -> None:
    heads = 4
    qkv = inputs(heads, batch=1, length=200, dtype=torch.bfloat16)
    slopes = alibi_slopes(heads)
    weight = probe(heads, batch=1, length=200)

    def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = qkv.to(dtype, copy=True).requires_grad_()
        out = naive(*leaf.unbind(2), slopes, None)
        (out.to(torch.promote_types(dtype, torch.float32)) * weight).sum().backward()
        return out.detach().double(), leaf.grad.double()

    out, _, grad = on_ranks(2, method, qkv, slopes, None)
    assert out.dtype == grad.dtype == torch.bfloat16
    for mine, torchs, exact in zip(
        (out, grad), reference(torch.bfloat16), reference(torch.float64), strict=True
    ):
        assert (mine.double() - exact).abs().max() <= 2 * (torchs - exact).abs().max()


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_recomputed_in_the_backward_pass(method: Method) -> None:
    def recomputed() -> Tensor:
        context = this_rank(method)
        leaf = context.shard(qkv).clone().requires_grad_()

        def core(qkv: Tensor) -> Tensor:
            q, k, v = qkv.unbind(2)
            return context_attention(q, k, v, context=context, alibi_slopes=slopes, documents=documents)

        out = checkpoint(core, leaf, use_reentrant=False)
        (out * context.shard(probe(4))).sum().backward()
        return leaf.grad

    qkv, slopes, documents = inputs(4), alibi_slopes(4), Documents.of(packing())
    grad = torch.cat(run_ranks(2, recomputed), dim=1)
    torch.testing.assert_close(grad, whole(qkv, slopes, documents)[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_groups_that_are_not_the_world(method: Method) -> None:
    """Two groups of two, as with tensor parallelism 2: ranks 0 and 2, ranks 1 and 3, each with other heads."""

    def mine() -> tuple[Tensor, Tensor, Tensor]:
        rank = dist.get_rank()
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        context = ContextParallel(2, rank // 2, groups[rank % 2], method)
        heads = slice(4, 8) if rank % 2 else slice(0, 4)
        return part(qkv[:, :, :, heads], slopes[heads], documents, context)

    qkv, slopes, documents = inputs(8), alibi_slopes(8), Documents.of(packing())
    results = run_ranks(4, mine)
    for tp, heads in enumerate((slice(0, 4), slice(4, 8))):
        out, _, grad = whole(qkv[:, :, :, heads], slopes[heads], documents)
        for index, expected in ((0, out), (2, grad)):
            actual = torch.cat([results[tp][index], results[tp + 2][index]], dim=1)
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_the_ring_gives_the_same_bits_whoever_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Pattern.scores

    def slowed(slow_rank: int) -> Callable[..., Tensor]:
        def scores(self: Pattern, *args: object) -> Tensor:
            if dist.is_initialized() and dist.get_rank() == slow_rank:
                time.sleep(0.02)
            return real(self, *args)

        return scores

    results = []
    for slow_rank in (0, 2):
        monkeypatch.setattr(Pattern, "scores", slowed(slow_rank))
        results.append(on_ranks(3, "ring", inputs(3), alibi_slopes(3), Documents.of(packing())))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_scores_never_exist_whole(method: Method) -> None:
    heads, length, size = 4, 1024, 2

    def largest() -> int:
        with LargestTensor() as seen:
            part(inputs(heads, batch=1, length=length), alibi_slopes(heads), None, this_rank(method))
        return seen.elements

    whole_sequence = heads * attention.BLOCK * length
    bound = whole_sequence // size
    assert bound < heads * length * length // 8
    assert max(run_ranks(size, largest)) <= bound


class Spy:
    """Records in order what this rank sends, receives and computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        batch, all_to_all, scores = dist.batch_isend_irecv, dist.all_to_all_single, Pattern.scores

        def spy_batch(operations: list[dist.P2POp]) -> list[dist.Work]:
            for operation in operations:
                kind = "send" if operation.op is dist.isend else "receive"
                self.events.append((kind, operation.tensor.numel() * operation.tensor.element_size()))
            return batch(operations)

        def spy_all_to_all(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
            self.events.append(("all_to_all", x.numel()))
            all_to_all(out, x, group=group)

        def spy_scores(pattern: Pattern, *args: object) -> Tensor:
            self.events.append(("compute", 0))
            return scores(pattern, *args)

        monkeypatch.setattr(dist, "batch_isend_irecv", spy_batch)
        monkeypatch.setattr(dist, "all_to_all_single", spy_all_to_all)
        monkeypatch.setattr(Pattern, "scores", spy_scores)


def events(
    size: int, method: Method, heads: int, documents: Documents | None, *, batch: int = 2
) -> list[tuple[list[tuple[str, int]], list[tuple[str, int]]]]:
    """Of each rank, those of the forward and those of the backward pass."""

    def recorded() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        context = this_rank(method)
        with pytest.MonkeyPatch.context() as monkeypatch:
            spy = Spy(monkeypatch)
            q, k, v = context.shard(inputs(heads, batch=batch)).clone().requires_grad_().unbind(2)
            out = context_attention(
                q, k, v, context=context, alibi_slopes=alibi_slopes(heads), documents=documents
            )
            num_forward = len(spy.events)
            out.sum().backward()
            return spy.events[:num_forward], spy.events[num_forward:]

    return run_ranks(size, recorded)


def test_ulysses_does_two_all_to_all_each_way() -> None:
    elements = 2 * LENGTH // 2 * 6 * WIDTH
    for forward, backward in events(2, "ulysses", 6, None):
        assert [e for e in forward if e[0] != "compute"] == [
            ("all_to_all", 3 * elements),
            ("all_to_all", elements),
        ]
        assert [e for e in backward if e[0] != "compute"] == [
            ("all_to_all", elements),
            ("all_to_all", 3 * elements),
        ]


def test_the_ring_posts_messages_before_its_work_and_no_collective() -> None:
    kv = 2 * 2 * LENGTH // 3 * 5 * WIDTH * 4  # fp32 keys and values of batch 2; their gradients are as large
    (f0, b0), (f1, b1), (f2, b2) = events(3, "ring", 5, None)
    send, receive, compute = ("send", kv), ("receive", kv), ("compute", 0)
    assert f0 == [send, compute]
    assert f1 == [send, receive, compute, send, compute]
    assert f2 == [receive, compute, receive, compute, compute]
    # Step 1 also passes on the gradient of step 0; the last step of rank 0 receives its own from rank 2.
    assert b0 == [send, compute, send, receive]
    assert b1 == [send, receive, compute, send, send, receive, compute, send, receive]
    assert b2 == [receive, compute, receive, receive, compute, send, receive, compute, send]


def test_documents_that_end_at_shard_borders_send_nothing() -> None:
    starts = ((0, 8, 12, 24, 36), (0, 12, 24, 30, 36))
    for forward, backward in events(4, "ring", 3, Documents.of(packing(starts))):
        assert forward == backward == [("compute", 0)]


def test_a_document_over_two_shards_goes_no_further() -> None:
    kinds = [
        ([kind for kind, _ in forward], [kind for kind, _ in backward])
        for forward, backward in events(4, "ring", 3, Documents.of(packing(((0, 24, 36),))), batch=1)
    ]
    assert kinds[0] == (["send", "compute"], ["send", "compute", "send", "receive"])
    assert kinds[1] == (
        ["receive", "compute", "compute"],
        ["receive", "compute", "receive", "compute", "send"],
    )
    assert kinds[2] == kinds[3] == (["compute"], ["compute"])


@settings(max_examples=200)
@given(starts=st.lists(st.integers(0, 15), min_size=1, max_size=16))
def test_every_message_has_both_sides_in_one_step(starts: list[int]) -> None:
    """For any documents: messages match, shards reach exactly who sees them, gradients of all come home."""
    first: list[int] = []
    for rank, start in enumerate(starts):
        first.append(max(min(start, rank), first[-1] if first else 0))
    ring = Ring(tuple(first))
    ranks = range(len(first))
    keys = {rank: rank for rank in ranks}
    gradients: dict[int, list[int]] = {}
    home = {rank: [rank] for rank in ranks if ring.last(rank) == rank}
    for step in range(max(ring.num_backward_steps(rank) for rank in ranks)):
        sent = {(r, ring.keys_to(r, step)) for r in ranks} - {(r, None) for r in ranks}
        assert sent == {(ring.keys_from(r, step), r) for r in ranks} - {(None, r) for r in ranks}
        arriving = {to: keys[source] for source, to in sent}
        passed = {(r, ring.gradient_to(r, step)) for r in ranks} - {(r, None) for r in ranks}
        up = {(ring.gradient_from(r, step), r) for r in ranks} - {(None, r) for r in ranks}
        down = {(ring.home_from(r, step), r) for r in ranks} - {(None, r) for r in ranks}
        assert passed == up | down
        for source, to in down:
            assert gradients[source][0] == to
            home[to] = gradients[source]
        earlier = {to: gradients[source] for source, to in up}
        gradients = {}
        for r in ranks:
            if ring.sees(r, r - step):
                assert keys[r] == r - step
                assert step < ring.num_steps(r)
                gradients[r] = [*earlier.get(r, []), r]
        keys = arriving
        for r in ranks:
            is_over = step >= ring.num_backward_steps(r)
            assert not (is_over and any(r in pair for pair in sent | passed))
    for shard in ranks:
        assert home[shard] == [r for r in ranks if ring.sees(r, shard)]


@settings(max_examples=60)
@given(
    starts=st.lists(st.sets(st.integers(1, 23)), min_size=1, max_size=2),
    size=st.sampled_from([1, 2, 4]),
    block=st.integers(1, 24),
)
def test_tiles_hold_every_visible_key_and_no_idle_border(
    starts: list[set[int]], size: int, block: int
) -> None:
    segments = packing(tuple((0, *sorted(row)) for row in starts), length=24)
    positions = torch.arange(24)
    visible = (segments.unsqueeze(2) == segments.unsqueeze(1)) & (positions.unsqueeze(1) >= positions)
    visible = visible.any(dim=0)
    pattern, length = Pattern(None, Documents.of(segments)), 24 // size
    covered = torch.zeros_like(visible)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(attention, "BLOCK", block)
        for query_start in range(0, 24, length):
            for key_start in range(0, 24, length):
                for tile in pattern.tiles(length, length, query_start=query_start, key_start=key_start):
                    rows = slice(tile.first_row, tile.first_row + tile.rows.stop - tile.rows.start)
                    keys = slice(tile.first_key, tile.first_key + tile.keys.stop - tile.keys.start)
                    assert (tile.first_row, tile.first_key) == (
                        query_start + tile.rows.start,
                        key_start + tile.keys.start,
                    )
                    inside = visible[rows, keys].any(dim=0)
                    assert inside[0]
                    assert inside[-1]
                    covered[rows, keys] = True
    assert bool((covered | ~visible).all())


def test_the_bias_of_far_keys_is_exact_in_bf16() -> None:
    zeros = torch.zeros(1, 3, 4, WIDTH, dtype=torch.bfloat16)
    slopes = alibi_slopes(3)
    tile = Tile(slice(1, 4), slice(0, 2), first_row=100_001, first_key=2)
    distance = torch.tensor([[-99_999, -99_998], [-100_000, -99_999], [-100_001, -100_000]])
    scores = Pattern(slopes, None).scores(zeros, zeros, tile)
    assert torch.equal(scores[0], slopes.view(3, 1, 1) * distance)


def test_method() -> None:
    assert resolve_method("auto", heads_local=40, context=4) == "ulysses"
    assert resolve_method("auto", heads_local=5, context=2) == "ring"
    assert resolve_method("ring", heads_local=40, context=4) == "ring"
    assert resolve_method("ulysses", heads_local=6, context=3) == "ulysses"
    with pytest.raises(ConfigError, match=r"10 heads do not divide by 4: .* \"ring\", or .* of 1, 2, 5, 10$"):
        resolve_method("ulysses", heads_local=10, context=4)


def test_one_rank_attends_alone() -> None:
    q, k, v = inputs(3).unbind(2)
    alone = context_attention(q, k, v, context=ContextParallel(), alibi_slopes=None, documents=None)
    assert torch.equal(alone, causal_attention(q, k, v))
    assert replace(ContextParallel(), size=4, rank=2).shard(torch.arange(8)[None]).tolist() == [[4, 5]]


def test_breadcrumbs_name_whom_the_ring_waits_for() -> None:
    """In the second of two rings, so that context ranks 0 and 1 are global ranks 1 and 3."""

    def run() -> list[tuple[str, int | None, tuple[int, ...]]]:
        groups = [dist.new_group([first, first + 2]) for first in (0, 1)]
        rank, trail = dist.get_rank(), Trail()
        part(inputs(2), None, None, ContextParallel(2, rank // 2, groups[rank % 2], "ring", trail))
        assert trail.current.peers == ()
        return trail.seen

    _, first, _, second = run_ranks(4, run)
    forward, backward = "attention ring, forward", "attention ring, backward"
    assert first == [
        (f"{forward}: send", None, (3,)),
        (f"{backward}: send", None, (3,)),  # keys and values
        (f"{backward}: send", None, (3,)),  # their gradient
        (f"{backward}: receive", None, (3,)),  # the whole of it
    ]
    assert second == [
        (f"{forward}: receive", None, (1,)),
        (f"{backward}: receive", None, (1,)),
        (f"{backward}: receive", None, (1,)),
        (f"{backward}: send", None, (1,)),
    ]
