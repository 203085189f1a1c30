"""A network on grids of integers, computed in float, through which gradients reach the program's own parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from intarsia.ir.execute import call
from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.program import Program
from intarsia.kernels.fake_quantize.reference import codes
from intarsia.passes.fold_batch_norm import NORMS

ROUNDING = "intarsia.fake_quantize"


class Network:
    """The graph of a program, its parameters as leaves that a training moves.

    Calls on parameters alone, such as those of a folded batch norm, run every time, so that gradients flow through
    them to what was there before the passes.

    Attributes:
        graph: The graph.
        leaves: Parameters that are trained, by name: those in floating point that are not ``frozen``.
    """

    def __init__(self, program: Program, *, frozen: frozenset[str] = frozenset(), device: str = "cpu") -> None:
        self.graph = program.graph
        self.leaves: dict[str, Tensor] = {}
        self._frozen: dict[str, Tensor] = {}
        for param in program.graph.params:
            tensor = program.weights[param.name].detach().to(device, copy=True)
            if tensor.is_floating_point() and param.name not in frozen:
                self.leaves[param.name] = tensor.requires_grad_()
            else:
                self._frozen[param.name] = tensor
        self._device = device
        self._last = _last_uses(program.graph)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """The graph's first output for the inputs of one call, in the graph's order, on the network's device."""
        table: dict[str, Any] = {**self._frozen, **self.leaves}
        for value, tensor in zip(self.graph.inputs, inputs, strict=True):
            table[value.name] = _laid_out(tensor.to(self._device))
        for node in self.graph.nodes:
            table.update(zip((value.name for value in node.outputs), _called(node, table), strict=True))
            for name in self._last.get(node.name, ()):
                del table[name]
        output = table[self.graph.outputs[0]]
        assert isinstance(output, Tensor)
        return output


def statistics(graph: Graph) -> frozenset[str]:
    """Running means and variances of the graph's batch norms: they were measured, and are not trained."""
    args = [node.args.get(key) for node in graph.find(*NORMS) for key in ("running_mean", "running_var")]
    return frozenset(arg.name for arg in args if isinstance(arg, Ref))


class _Rounded(torch.autograd.Function):
    """What ``intarsia.fake_quantize`` gives of f32, the same numbers, layout kept; its gradient in one pass.

    The gradient passes where the code lies on the grid. On a CPU this takes a tenth of the time of
    ``torch.fake_quantize_per_tensor_affine`` (measured by hand).
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, scale: float, low: int, high: int) -> Tensor:
        ctx.save_for_backward(input)
        ctx.ends = (low - 0.5) * scale, (high + 0.5) * scale
        return codes(input, scale).clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (input,) = ctx.saved_tensors
        passed = torch.ops.aten.hardtanh_backward(gradients[0], input, *ctx.ends)
        return cast("Tensor", passed), None, None, None


def _called(node: Node, table: Mapping[str, Any]) -> tuple[Any, ...]:
    if node.op == ROUNDING and table[node.ref("input")].dtype == torch.float32:
        args = node.args
        made = _Rounded.apply(table[node.ref("input")], args["scale"], args["low"], args["high"])  # type: ignore[no-untyped-call]
        return (made,)
    return call(node, table)


def _laid_out(tensor: Tensor) -> Tensor:
    """Pictures with channels last, which convolutions want."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _last_uses(graph: Graph) -> dict[str, list[str]]:
    """By node, the values that nothing behind it reads."""
    last = {name: node.name for node in graph.nodes for name in node.inputs}
    found: dict[str, list[str]] = {}
    for name, node in last.items():
        if name not in graph.outputs:
            found.setdefault(node, []).append(name)
    return found
