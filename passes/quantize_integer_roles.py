"""What the operators of a network are to integers: products, clamps, windows, sums, and those that keep a grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from intarsia.ir.graph import Arg, Graph, Node, Ref

LAYERS = ("aten.conv2d", "aten.linear")
"""Products of an activation and a weight."""

KEEPING = frozenset(
    {
        "aten.alias", "aten.clone", "aten.contiguous", "aten.detach", "aten.dropout", "aten.expand",
        "aten.flatten.using_ints", "aten.max_pool2d", "aten.permute", "aten.relu", "aten.reshape", "aten.select.int",
        "aten.slice.Tensor", "aten.squeeze", "aten.squeeze.dim", "aten.squeeze.dims", "aten.transpose.int",
        "aten.unflatten.int", "aten.unsqueeze", "aten._unsafe_view", "aten.view",
    }
)  # fmt: skip
"""Operators whose result is made of their input's numbers and zeros: on the same grid, and alike on codes."""

_AVERAGES = frozenset({"aten.avg_pool2d", "aten.adaptive_avg_pool2d", "aten.mean.dim"})


@dataclass(frozen=True)
class Bounds:
    """What an operator clips to; None where it does not."""

    low: float | None
    high: float | None

    def inside(self, outer: Bounds) -> Bounds:
        """What clipping to these and then to ``outer`` clips to."""
        return Bounds(_clipped(self.low, outer, outer.low), _clipped(self.high, outer, outer.high))

    def of(self, number: float) -> float:
        """The number, clipped."""
        raised = number if self.low is None else max(number, self.low)
        return raised if self.high is None else min(raised, self.high)


@dataclass(frozen=True)
class Window:
    """An average over windows of (height, width), each sum divided by ``divisor``.

    Attributes:
        squeezed: Whether the two spatial axes, by then of extent 1, are dropped.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    divisor: int
    squeezed: bool = False


def source(node: Node) -> str | None:
    """The value that an operator of one operand works on; None if it is none."""
    found = node.args.get("self", node.args.get("input"))
    return found.name if isinstance(found, Ref) else None


def keeps_grid(node: Node) -> bool:
    """Whether the result lies on the grid of the operand, its codes being the same operator's result on codes."""
    if len(node.outputs) != 1:
        return False
    if node.op in ("aten.constant_pad_nd", "aten.pad"):
        return node.args.get("mode", "constant") == "constant" and node.args.get("value") in (0, None)
    if node.op == "aten.dropout":
        return node.args.get("train") is False
    return node.op in KEEPING


def bounds(node: Node) -> Bounds | None:
    """What the node clips to; None if it does more or less than that."""
    match node.op:
        case "aten.relu":
            return Bounds(0.0, None)
        case "aten.relu6":
            return Bounds(0.0, 6.0)
        case "aten.hardtanh":
            return _numbers(node.args.get("min_val", -1.0), node.args.get("max_val", 1.0))
        case "aten.clamp":
            return _numbers(node.args.get("min"), node.args.get("max"))
        case "aten.clamp_min":
            return _numbers(node.args.get("min"), None)
    return None


def addends(node: Node, graph: Graph) -> tuple[str, str] | None:
    """The two tensors of equal extents that the node adds; None if it does something else."""
    if node.op != "aten.add.Tensor" or node.args.get("alpha", 1) != 1:
        return None
    one, other = node.args["self"], node.args["other"]
    if not (isinstance(one, Ref) and isinstance(other, Ref)):
        return None
    same = graph.values[one.name].type == graph.values[other.name].type == node.type
    return (one.name, other.name) if same else None


def joined(node: Node) -> tuple[str, ...] | None:
    """The tensors that the node concatenates; None if it does something else."""
    tensors = node.args.get("tensors")
    if node.op != "aten.cat" or not isinstance(tensors, tuple):
        return None
    return tuple(tensor.name for tensor in tensors if isinstance(tensor, Ref))


def window(node: Node, graph: Graph) -> Window | str | None:
    """The average that the node takes, or why it has no integer form; None if it takes none."""
    if node.op not in _AVERAGES:
        return None
    given = graph.type(node.ref("self")).shape
    height, width = given[-2:] if len(given) == 4 else ("?", "?")
    if not (isinstance(height, int) and isinstance(width, int)):
        return f"an average over {list(given)} has no integer form; four axes, the last two of fixed extents, have one"
    readers: Mapping[str, Callable[[Node, int, int], Window | str]] = {
        "aten.avg_pool2d": _pooled,
        "aten.adaptive_avg_pool2d": _divided,
        "aten.mean.dim": _whole,
    }
    return readers[node.op](node, height, width)


def pair(arg: Arg, default: tuple[int, int]) -> tuple[int, int]:
    """One or two numbers for height and width, as PyTorch takes them; ``default`` where none is given."""
    if not isinstance(arg, tuple):
        return (arg, arg) if isinstance(arg, int) else default
    numbers = [item for item in arg if isinstance(item, int)]
    return (numbers[0], numbers[-1]) if numbers else default


def _pooled(node: Node, height: int, width: int) -> Window | str:
    kernel = pair(node.args["kernel_size"], (1, 1))
    padding = pair(node.args.get("padding"), (0, 0))
    if node.args.get("ceil_mode"):
        return "an average pool with ceil_mode has no integer form: its windows are cut at the border"
    if any(padding) and node.args.get("count_include_pad", True) is False:
        return "an average pool that leaves padding out has no integer form: its windows differ in size"
    divisor = node.args.get("divisor_override")
    elements = kernel[0] * kernel[1]
    stride = pair(node.args.get("stride"), kernel)
    return Window(kernel, stride, padding, divisor if isinstance(divisor, int) else elements)


def _divided(node: Node, height: int, width: int) -> Window | str:
    rows, columns = pair(node.args["output_size"], (1, 1))
    if height % rows or width % columns:
        return f"an average of {height}x{width} to {rows}x{columns} has no integer form: its windows differ in size"
    kernel = (height // rows, width // columns)
    return Window(kernel, kernel, (0, 0), kernel[0] * kernel[1])


def _whole(node: Node, height: int, width: int) -> Window | str:
    axes = node.args.get("dim")
    numbers = [axis for axis in axes if isinstance(axis, int)] if isinstance(axes, tuple) else []
    if {axis % 4 for axis in numbers} != {2, 3}:
        return f"a mean over the axes {numbers} has no integer form; one over height and width has"
    return Window((height, width), (1, 1), (0, 0), height * width, squeezed=node.args.get("keepdim") is not True)


def _numbers(low: Arg, high: Arg) -> Bounds | None:
    if isinstance(low, Ref) or isinstance(high, Ref):
        return None
    return Bounds(
        float(low) if isinstance(low, int | float) else None, float(high) if isinstance(high, int | float) else None
    )


def _clipped(own: float | None, outer: Bounds, fallback: float | None) -> float | None:
    return fallback if own is None else outer.of(own)
