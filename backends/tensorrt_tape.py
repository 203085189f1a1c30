"""Nodes of a graph in place of one."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.graph import Arg, Node, Ref, Value
from intarsia.ir.types import TensorType
from intarsia.kernels.block_sparse_attention.order import TokenOrder


class Tape:
    """The nodes in order; the last gives what the replaced one gave."""

    def __init__(self, node: Node) -> None:
        self.replaced = node
        self._nodes: list[Node] = []

    def call(self, op: str, part: str, type_: TensorType, /, **args: Arg) -> Ref:
        """The result of one more call, named after the replaced one and ``part``."""
        value = Value(f"{self.replaced.name}.{part}", type_)
        self._nodes.append(Node(op, args, (value,), self.replaced.source))
        return Ref(value.name)

    def integers(self, numbers: NDArray[np.int64]) -> Ref:
        """The numbers, flat, under a name that equal ones share."""
        text = str(TokenOrder.of(numbers.reshape(-1).tolist()))
        name = f"integers.{numbers.size}.{sha256(text.encode()).hexdigest()[:16]}"
        self._nodes.append(
            Node("intarsia.integers", {"runs": text}, (Value(name, TensorType("i64", (numbers.size,))),))
        )
        return Ref(name)

    def nodes(self) -> list[Node]:
        """All of them."""
        return [*self._nodes[:-1], replace(self._nodes[-1], outputs=self.replaced.outputs)]
