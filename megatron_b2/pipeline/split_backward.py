"""Backward in two passes: first the gradient of a stage's input, later the gradients of its parameters.

The autograd graph is cut where parameters join the path from the input to the output. The first pass runs
that path only and keeps, at each joint (the product of a linear layer, the operation of a norm), the gradient
that arrives there; the second pass runs each joint again towards its parameters only. A linear layer
therefore does each of its two backward products exactly once, and collectives on the path run once, in the
first pass; those in hooks on parameters run in the second. The idea is that of torch.distributed.pipelining
and of Qi et al. 2024.

Gradients are the same bits as those of an ordinary backward, and go through AccumulateGrad: `.grad` is added
to and hooks on parameters fire once a micro-batch. Three limits: an operation that makes both gradients at
once (a custom Function such as RMSNorm) runs its backward twice; a hook on an intermediate tensor may see its
gradient twice; non-reentrant checkpoints recompute in every pass, so stages that recompute whole blocks
should not split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


@dataclass(frozen=True)
class _Part:
    """One run of the second pass."""

    edges: tuple[GradientEdge, ...]
    grads: tuple[Tensor | None, ...]
    parameters: tuple[Tensor, ...]


class SplitBackward:
    """The backward of one micro-batch through one stage.

    Args:
        root: edge of the stage's output.
        grad: gradient of the output; none for a scalar loss.
        x: the stage's input, a leaf that requires grad; none for the first stage, which does everything in
            the second pass because no rank waits for it.
    """

    def __init__(self, root: GradientEdge, grad: Tensor | None, x: Tensor | None) -> None:
        self._root, self._grad, self._x = root, grad, x
        self._parts: list[_Part] = []

    def input_gradient(self) -> Tensor | None:
        """First pass: the gradient of x, in its shape."""
        if self._x is None:
            return None
        joints = _find_joints(self._root.node, get_gradient_edge(self._x).node)
        leaves = [leaf for found in joints.values() for leaf in found]
        shared = len({id(leaf) for leaf in leaves}) < len(leaves)
        # A parameter at two joints would get, from one of them, what flows on to the other: take no shortcut.
        arrived = {} if shared else _capture(joints)
        (grad_x,) = torch.autograd.grad(self._root, self._x, self._grad, retain_graph=True)
        if shared:
            unique = tuple({id(leaf): leaf for leaf in leaves}.values())
            self._parts = [_Part((self._root,), (self._grad,), unique)]
        for node, capture in arrived.items():
            self._parts += capture.parts(node, joints[node])
        self._x = None
        grad_input: Tensor = grad_x
        return grad_input

    def accumulate_weights(self) -> None:
        """Second pass: add to `.grad` of the parameters; frees the graph."""
        if not self._parts:
            torch.autograd.backward(self._root, self._grad)
        for part in self._parts:
            torch.autograd.backward(part.edges, part.grads, inputs=part.parameters)
        self._parts = []


class _Capture:
    """Keeps the gradients that arrive at a node, and listens to it once."""

    def __init__(self, node: Node) -> None:
        self.grads: tuple[Tensor | None, ...] = ()
        self._handle = node.register_prehook(self._keep)

    def _keep(self, grads: Sequence[Tensor | None]) -> None:
        self.grads = tuple(grads)
        self._handle.remove()

    def parts(self, node: Node, parameters: Sequence[Tensor]) -> Iterator[_Part]:
        """The second pass over the node; nothing if no gradient came."""
        defined = [(i, grad) for i, grad in enumerate(self.grads) if grad is not None]
        if defined:
            edges = tuple(GradientEdge(node, i) for i, _ in defined)
            yield _Part(edges, tuple(grad for _, grad in defined), tuple(parameters))


def _capture(joints: dict[Node, list[Tensor]]) -> dict[Node, _Capture]:
    return {node: _Capture(node) for node in joints}


def _find_joints(root: Node, source: Node) -> dict[Node, list[Tensor]]:
    """Nodes on a path from root to source that also lead to leaves off every such path, with those leaves.

    In the order of backward: nearest to the root first.
    """
    order = _post_order(root)
    children = {node: _children(node) for node in order}
    on_path = {source}
    for node in order:
        if any(child in on_path for child in children[node]):
            on_path.add(node)
    if root not in on_path:
        raise RuntimeError("the output of a pipeline stage does not depend on its input")
    joints: dict[Node, list[Tensor]] = {}
    for node in reversed(order):
        off_path = [child for child in children[node] if child not in on_path]
        if node in on_path and off_path:
            leaves = [leaf for child in off_path for leaf in _leaves(child, children)]
            if leaves:
                joints[node] = list({id(leaf): leaf for leaf in leaves}.values())
    return joints


def _children(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


def _post_order(root: Node) -> list[Node]:
    """Every node below root, children before parents. The list keeps the Python objects of the nodes alive,
    without which they would have no identity."""
    order: list[Node] = []
    entered = {root}
    stack = [(root, iter(_children(root)))]
    while stack:
        node, remaining = stack[-1]
        child = next((c for c in remaining if c not in entered), None)
        if child is None:
            order.append(node)
            stack.pop()
        else:
            entered.add(child)
            stack.append((child, iter(_children(child))))
    return order


def _leaves(node: Node, children: dict[Node, list[Node]]) -> Iterator[Tensor]:
    """Leaf tensors below a node."""
    seen = {node}
    stack = [node]
    while stack:
        current: Any = stack.pop()
        if type(current).__name__ == "AccumulateGrad":
            yield current.variable
        fresh = [child for child in children[current] if child not in seen]
        seen.update(fresh)
        stack.extend(fresh)
