"""What TVM's importer asks of us, node by node: products, convolutions, attention, norms, functions and integers.

Convolutions run with channels last and attention with heads beside channels; transpositions between them are never
computed, because a value that has such a form is remembered in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from intarsia.backends import (
    tvm_attention,
    tvm_functions,
    tvm_integers,
    tvm_islands,
    tvm_norms,
    tvm_operators,
    tvm_sparse,
)
from intarsia.backends import tvm_nodes as nodes


class Converters:
    """Converters for one exported program, and the other forms of values that they have met."""

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        signature = exported.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        stored |= signature.inputs_to_lifted_tensor_constants
        tensors = {**exported.state_dict, **exported.constants}
        self.constants: dict[str, Tensor] = {name: tensors[path].detach() for name, path in stored.items()}
        self.channels_last: dict[torch.fx.Node, Any] = {}
        self.heads_beside: dict[torch.fx.Node, Any] = {}
        self.places: dict[tuple[torch.fx.Node, int], Any] = {}

    def by_operator(self) -> dict[str, Callable[..., Any]]:
        """What the importer calls for a node, by the operator's name."""
        return {name: partial(getattr(self, method), **given) for name, (method, given) in OWN.items()}

    def elementwise(self, node: torch.fx.Node, importer: Any, *, of: Callable[[Any], Any]) -> Any:
        """A function of each element, by a polynomial that runs in vectors."""
        if nodes.dtype(node) != torch.float32:
            return importer.create_convert_map()[nodes.name(node)](node)

        def emit(_: torch.fx.Node) -> Any:
            value = importer.env[node.all_input_nodes[0]]
            name = nodes.name(node).partition(".")[0]
            return _emit(importer, partial(tvm_operators.elementwise, of=of, name=name), value)

        return self._either_form(node, importer, emit)

    def gelu(self, node: torch.fx.Node, importer: Any) -> Any:
        """GELU in either of its spellings."""
        tanh = nodes.arguments(node).get("approximate") == "tanh"
        return self.elementwise(node, importer, of=tvm_functions.gelu_tanh if tanh else tvm_functions.gelu)

    def along(self, node: torch.fx.Node, importer: Any) -> Any:
        """What TVM's importer makes of it, with channels last where its inputs have them so."""
        return self._either_form(node, importer, importer.create_convert_map()[nodes.name(node)])

    def _either_form(self, node: torch.fx.Node, importer: Any, convert: Callable[[torch.fx.Node], Any]) -> Any:
        inputs = node.all_input_nodes
        alike = len({len(nodes.shape(one)) for one in inputs}) == 1
        if not alike or any(one not in self.channels_last for one in inputs):
            return convert(node)
        before = {one: importer.env[one] for one in inputs}
        importer.env.update({one: self.channels_last[one] for one in inputs})
        made = convert(node)
        importer.env.update(before)
        return self._with_channels_last(node, importer, made)

    def _with_channels_last(self, node: torch.fx.Node, importer: Any, value: Any) -> Any:
        """Remember ``value`` as the node's result with channels last; give the result as PyTorch has it."""
        from tvm import relax

        self.channels_last[node] = value
        rank = len(nodes.shape(node))
        return importer.block_builder.emit(relax.op.permute_dims(value, [0, rank - 1, *range(1, rank - 1)]))

    def _last(self, node: torch.fx.Node, importer: Any) -> Any:
        """The node's result with channels last."""
        from tvm import relax

        if node not in self.channels_last:
            rank = len(nodes.shape(node))
            axes = [0, *range(2, rank), 1]
            self.channels_last[node] = importer.block_builder.emit(relax.op.permute_dims(importer.env[node], axes))
        return self.channels_last[node]

    def linear(self, node: torch.fx.Node, importer: Any) -> Any:
        """A product with a constant weight (R, C), packed once; any other is a plain product."""
        given = nodes.arguments(node)
        input, weight, bias = given["input"], given["weight"], given["bias"]
        constant = self.constants.get(weight.name)
        if constant is None or len(nodes.shape(input)) < 2 or nodes.dtype(node) != torch.float32:
            return importer.create_convert_map()[nodes.name(node)](node)
        made = self._packed_linear(importer, importer.env[input], constant)
        return made if bias is None else _add(importer, made, importer.env[bias])

    def matmul(self, node: torch.fx.Node, importer: Any) -> Any:
        """A product of two matrices or stacks of them."""
        first, second, *_ = node.args
        assert isinstance(first, torch.fx.Node)
        assert isinstance(second, torch.fx.Node)
        if nodes.dtype(node) != torch.float32 or min(len(nodes.shape(first)), len(nodes.shape(second))) < 2:
            return importer.create_convert_map()[nodes.name(node)](node)
        constant = self.constants.get(second.name)
        if constant is not None and constant.ndim == 2:
            return self._packed_linear(importer, importer.env[first], constant.T)
        return _emit(importer, tvm_operators.matmul, importer.env[first], importer.env[second])

    def addmm(self, node: torch.fx.Node, importer: Any) -> Any:
        """A product plus a bias; a scaled one is left to TVM's importer."""
        given = nodes.arguments(node)
        constant = self.constants.get(given["mat2"].name)
        if constant is None or given["alpha"] != 1 or given["beta"] != 1 or nodes.dtype(node) != torch.float32:
            return importer.create_convert_map()[nodes.name(node)](node)
        made = self._packed_linear(importer, importer.env[given["mat1"]], constant.T)
        return _add(importer, made, importer.env[given["self"]])

    def _packed_linear(self, importer: Any, input: Any, weight: Tensor) -> Any:
        packed = _constant(tvm_operators.pack_rows(weight))
        return _emit(importer, partial(tvm_operators.linear, rows=weight.shape[0]), input, packed)

    def convolution(self, node: torch.fx.Node, importer: Any) -> Any:
        """A convolution with a constant weight and one group, channels last; others are left to TVM's importer."""
        given = nodes.arguments(node)
        weight = self.constants.get(given["weight"].name)
        plain = not given.get("transposed", False) and not isinstance(given["padding"], str)
        batched = weight is not None and len(nodes.shape(given["input"])) == weight.ndim
        if not batched or given["groups"] != 1 or not plain or nodes.dtype(node) != torch.float32:
            return importer.create_convert_map()[nodes.name(node)](node)
        assert weight is not None
        rank = weight.ndim - 2
        sides = {key: nodes.repeated(given[key], rank) for key in ("stride", "padding", "dilation")}
        input = self._last(given["input"], importer)
        packed = _constant(tvm_operators.pack_rows(weight.movedim(1, -1)))
        function = partial(tvm_operators.convolution, channels=weight.shape[0], **sides)
        made = _emit(importer, function, input, packed)
        if given["bias"] is not None:
            made = _add(importer, made, importer.env[given["bias"]])
        return self._with_channels_last(node, importer, made)

    def batch_norm(self, node: torch.fx.Node, importer: Any) -> Any:
        """Normalization by stored statistics: a product and a sum for each channel."""
        from tvm import relax

        given = nodes.arguments(node)
        keys = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, variance = (self._constant_of(given[key]) for key in keys)
        assert mean is not None
        assert variance is not None
        scale = (variance.double() + given["eps"]).rsqrt() * (1.0 if weight is None else weight.double())
        shift = (0.0 if bias is None else bias.double()) - mean.double() * scale
        input = given["input"]
        rank = len(nodes.shape(input))
        last = input in self.channels_last
        shape = (-1,) if last or rank == 2 else (-1, *[1] * (rank - 2))
        value = self.channels_last[input] if last else importer.env[input]
        builder = importer.block_builder
        made = builder.emit(relax.op.multiply(value, _constant(scale.to(mean.dtype).reshape(shape))))
        made = _add(importer, made, _constant(shift.to(mean.dtype).reshape(shape)))
        several = nodes.name(node).startswith("_native")
        result = next((user for user in node.users if user.args[1] == 0), node) if several else node
        answer = self._with_channels_last(result, importer, made) if last else made
        return (answer,) if several else answer

    def _constant_of(self, node: torch.fx.Node | None) -> Tensor | None:
        return None if node is None else self.constants[node.name]

    def max_pool2d(self, node: torch.fx.Node, importer: Any) -> Any:
        """Largest of a window, channels last."""
        from tvm import relax

        given = nodes.arguments(node)
        if given["self"] not in self.channels_last:
            return importer.create_convert_map()[nodes.name(node)](node)
        window = nodes.repeated(given["kernel_size"], 2)
        stride = nodes.repeated(given["stride"] or window, 2)
        padding, dilation = (nodes.repeated(given[key], 2) for key in ("padding", "dilation"))
        made = importer.block_builder.emit(
            relax.op.nn.max_pool2d(
                self.channels_last[given["self"]], window, stride, padding, dilation, given["ceil_mode"], layout="NHWC"
            )
        )
        return self._with_channels_last(node, importer, made)

    def pooled_mean(self, node: torch.fx.Node, importer: Any) -> Any:
        """The mean over all places of a picture, from where the channels are neighbours."""
        from tvm import relax

        given = nodes.arguments(node)
        input = given.get("input", given.get("self"))
        rank = len(nodes.shape(input))
        if "output_size" in given:
            whole, keep = tuple(given["output_size"]) == (1,) * (rank - 2), True
        else:
            axes = sorted(axis % rank for axis in given["dim"] or ())
            whole, keep = axes == list(range(2, rank)) and rank > 2, bool(given["keepdim"])
        if not whole or input not in self.channels_last:
            return importer.create_convert_map()[nodes.name(node)](node)
        value = relax.op.mean(self.channels_last[input], list(range(1, rank - 1)), keep)
        made = importer.block_builder.emit(value)
        return self._with_channels_last(node, importer, made) if keep else made

    def layer_norm(self, node: torch.fx.Node, importer: Any) -> Any:
        """Layer normalization over the last axis."""
        given = nodes.arguments(node)
        if len(given["normalized_shape"]) != 1 or nodes.dtype(node) != torch.float32:
            return importer.create_convert_map()[nodes.name(node)](node)
        affine = [importer.env[given[key]] for key in ("weight", "bias") if given[key] is not None]
        function = partial(tvm_norms.layer_norm, eps=given["eps"], biased=given["bias"] is not None)
        return _emit(importer, function, importer.env[given["input"]], *affine)

    def rms_norm(self, node: torch.fx.Node, importer: Any) -> Any:
        """RMS normalization over the last axis."""
        given = nodes.arguments(node)
        eps = torch.finfo(torch.float32).eps if given["eps"] is None else given["eps"]
        weight = [] if given["weight"] is None else [importer.env[given["weight"]]]
        return _emit(importer, partial(tvm_norms.rms_norm, eps=eps), importer.env[given["input"]], *weight)

    def softmax(self, node: torch.fx.Node, importer: Any) -> Any:
        """Softmax over the last axis; over another it is left to TVM's importer."""
        given = nodes.arguments(node)
        input = given.get("self", given.get("input"))
        if given["dim"] % len(nodes.shape(input)) != len(nodes.shape(input)) - 1 or nodes.dtype(input) != torch.float32:
            return importer.create_convert_map()[nodes.name(node)](node)
        return _emit(importer, tvm_norms.softmax, importer.env[input])

    def attention(self, node: torch.fx.Node, importer: Any) -> Any:
        """Softmax attention; transpositions of heads around it are part of how it reads and writes."""
        given = nodes.arguments(node)
        lengths = given.get("lengths")
        masked = given.get("attn_mask") is not None or given.get("is_causal", False) or given.get("dropout_p", 0.0) != 0
        if masked or len(nodes.shape(given["query"])) != 4 or nodes.dtype(node) != torch.float32:
            return importer.create_convert_map()[nodes.name(node)](node)
        tensors, swapped = zip(*self._operands(node, importer), strict=True)
        beside = bool(node.users) and all(nodes.swaps_heads(user) for user in node.users)
        scale = nodes.shape(given["query"])[-1] ** -0.5 if given["scale"] is None else given["scale"]
        function = partial(tvm_attention.attention, scale=scale, swapped=(*swapped, beside))
        made = _emit(importer, function, *tensors, *([] if lengths is None else [importer.env[lengths]]))
        return self._with_heads_beside(node, importer, made) if beside else made

    def sparse_attention(self, node: torch.fx.Node, importer: Any) -> Any:
        """Softmax attention to the blocks of a table, in any order of tokens."""
        given = nodes.arguments(node)
        lengths = None if given["lengths"] is None else importer.env[given["lengths"]]
        operands = self._operands(node, importer)
        made = tvm_sparse.attention(importer.block_builder, given, operands=operands, lengths=lengths)
        return self._with_heads_beside(node, importer, made)

    def _operands(self, node: torch.fx.Node, importer: Any) -> list[tuple[Any, bool]]:
        """Query, key and value of an attention, and whether heads are beside the channels of each."""
        given = nodes.arguments(node)
        read = [given[key] for key in ("query", "key", "value")]
        return [
            (importer.env[one.args[0]], True) if nodes.swaps_heads(one) else (importer.env[one], False) for one in read
        ]

    def _with_heads_beside(self, node: torch.fx.Node, importer: Any, value: Any) -> Any:
        """Remember ``value`` as the node's result with heads beside channels; give the result as PyTorch has it."""
        from tvm import relax

        self.heads_beside[node] = value
        return importer.block_builder.emit(relax.op.permute_dims(value, list(nodes.HEADS)))

    def transposed(self, node: torch.fx.Node, importer: Any) -> Any:
        """A transposition, unless the value is there in the form that it gives."""
        input = node.args[0]
        assert isinstance(input, torch.fx.Node)
        if input in self.heads_beside and nodes.swaps_heads(node):
            return self.heads_beside[input]
        return importer.create_convert_map()[nodes.name(node)](node)

    def modulated_norm(self, node: torch.fx.Node, importer: Any) -> Any:
        """Layer normalization, scaled and shifted by what depends on the step."""
        given = nodes.arguments(node)
        affine = [importer.env[given[key]] for key in ("weight", "bias") if given[key] is not None]
        function = partial(tvm_norms.modulated_norm, eps=given["eps"], weighted=given["weight"] is not None)
        tensors = [importer.env[given[key]] for key in ("input", "scale", "shift")]
        return _emit(importer, function, *tensors, *affine)

    def gated_residual(self, node: torch.fx.Node, importer: Any) -> Any:
        """Residual plus gated input, which TVM fuses with what gives the input."""
        from tvm import relax

        given = nodes.arguments(node)
        residual, input, gate = (importer.env[given[key]] for key in ("residual", "input", "gate"))
        return _add(importer, residual, importer.block_builder.emit(relax.op.multiply(input, gate)))

    def norm_rope(self, node: torch.fx.Node, importer: Any) -> Any:
        """RMS normalization, then neighbouring pairs of channels turned."""
        given = nodes.arguments(node)
        weight = [] if given["weight"] is None else [importer.env[given["weight"]]]
        function = partial(tvm_norms.norm_rope, heads=given["heads"], eps=given["eps"])
        tensors = [importer.env[given[key]] for key in ("input", "cos", "sin")]
        return _emit(importer, function, *tensors, *weight)

    def concatenated(self, node: torch.fx.Node, importer: Any) -> Any:
        """Tensors behind each other, with channels last where all of them have them so."""
        from tvm import relax

        given = nodes.arguments(node)
        if any(one not in self.channels_last for one in given["tensors"]):
            return importer.create_convert_map()[nodes.name(node)](node)
        axis = _axis_with_channels_last(given["dim"], len(nodes.shape(node)))
        parts = [self.channels_last[one] for one in given["tensors"]]
        made = importer.block_builder.emit(relax.op.concat(parts, axis))
        return self._with_channels_last(node, importer, made)

    def integer(self, node: torch.fx.Node, importer: Any, *, of: Callable[..., Any]) -> Any:
        """An integer operator: ``of`` gives the function and its tensors from what the call is given."""
        return self._integer(nodes.arguments(node), importer, of)

    def integer_along(self, node: torch.fx.Node, importer: Any, *, of: Callable[..., Any]) -> Any:
        """An integer operator on each element or on windows, channels last where one of its inputs has them so."""
        given = dict(nodes.arguments(node))
        inputs = {key: given[key] for key in ("input", "other") if key in given}
        if not any(one in self.channels_last for one in inputs.values()):
            return self._integer(given, importer, of)
        given |= {key: self._last(one, importer) for key, one in inputs.items()}
        if "axis" in given:
            given["axis"] = _axis_with_channels_last(given["axis"], len(nodes.shape(node)))
        if "kernel_size" in given:
            given["axes"] = (1, 2)
        return self._with_channels_last(node, importer, self._integer(given, importer, of))

    def _integer(self, given: Mapping[str, Any], importer: Any, of: Callable[..., Any]) -> Any:
        values = {key: importer.env[arg] if isinstance(arg, torch.fx.Node) else arg for key, arg in given.items()}
        known = {key: self.constants.get(arg.name) for key, arg in given.items() if isinstance(arg, torch.fx.Node)}
        function, tensors = of(values, known)
        return _emit(importer, function, *(_constant(one) if isinstance(one, Tensor) else one for one in tensors))

    def integer_convolution(self, node: torch.fx.Node, importer: Any, *, of: Callable[..., Any]) -> Any:
        """An integer convolution, channels last."""
        given = nodes.arguments(node)
        made = self._integer({**given, "input": self._last(given["input"], importer)}, importer, of)
        return self._with_channels_last(node, importer, made)

    def weight_only(self, node: torch.fx.Node, importer: Any, *, of: Callable[..., Any]) -> Any:
        """A linear layer whose weight is stored in few bits."""
        bias = nodes.arguments(node)["bias"]
        made = self.integer(node, importer, of=of)
        return made if bias is None else _add(importer, made, importer.env[bias])

    def index_copy(self, node: torch.fx.Node, importer: Any) -> Any:
        """Rows written at places of an axis, which are looked up once for all that are written at the same ones."""
        given = nodes.arguments(node)
        shape = nodes.shape(node)
        axis = given["dim"] % len(shape)
        key = (given["index"], shape[axis])
        if key not in self.places:
            found = partial(tvm_operators.places, count=shape[axis])
            self.places[key] = _emit(importer, found, importer.env[given["index"]])
        values = (importer.env[given[name]] for name in ("self", "source"))
        return _emit(importer, partial(tvm_operators.index_copy, axis=axis), *values, self.places[key])


def _emit(importer: Any, function: Callable[..., Any], *args: Any) -> Any:
    whole = getattr(function, "func", function)
    return importer.block_builder.emit_te(function, *args, primfunc_name_hint=whole.__name__)


def _axis_with_channels_last(axis: int, rank: int) -> int:
    """Where the axis of (N, C, ...) is in (N, ..., C)."""
    order: tuple[int, ...] = (0, rank - 1, *range(1, rank - 1))
    return order[axis % rank]


def _add(importer: Any, left: Any, right: Any) -> Any:
    from tvm import relax

    return importer.block_builder.emit(relax.op.add(left, right))


def _constant(tensor: Tensor) -> Any:
    from tvm import relax

    array = tensor.contiguous().numpy()
    return relax.const(array, str(array.dtype))


_ALONG = (
    "relu.default",
    "relu_.default",
    "add.Tensor",
    "add_.Tensor",
    "mul.Tensor",
    "sub.Tensor",
    "hardtanh.default",
    "clamp.default",
)

OWN: Mapping[str, tuple[str, dict[str, Any]]] = {
    **{name: ("along", {}) for name in _ALONG},
    **{
        name: ("elementwise", {"of": of})
        for name, of in {
            "exp.default": tvm_functions.exponential,
            "sigmoid.default": tvm_functions.sigmoid,
            "silu.default": tvm_functions.silu,
            "silu_.default": tvm_functions.silu,
            "tanh.default": tvm_functions.tanh,
            "erf.default": tvm_functions.erf,
        }.items()
    },
    "gelu.default": ("gelu", {}),
    "linear.default": ("linear", {}),
    **{name: ("matmul", {}) for name in ("matmul.default", "mm.default", "bmm.default")},
    "addmm.default": ("addmm", {}),
    **{
        name: ("convolution", {})
        for name in ("conv1d.default", "conv2d.default", "conv3d.default", "convolution.default")
    },
    **{name: ("batch_norm", {}) for name in ("batch_norm.default", "_native_batch_norm_legit_no_training.default")},
    "max_pool2d.default": ("max_pool2d", {}),
    **{name: ("pooled_mean", {}) for name in ("adaptive_avg_pool2d.default", "mean.dim")},
    "layer_norm.default": ("layer_norm", {}),
    "rms_norm.default": ("rms_norm", {}),
    **{name: ("softmax", {}) for name in ("softmax.int", "_softmax.default")},
    **{name: ("transposed", {}) for name in ("permute.default", "transpose.int")},
    "scaled_dot_product_attention.default": ("attention", {}),
    "attention.default": ("attention", {}),
    "block_sparse_attention.default": ("sparse_attention", {}),
    "modulated_norm.default": ("modulated_norm", {}),
    "gated_residual.default": ("gated_residual", {}),
    "norm_rope.default": ("norm_rope", {}),
    **{f"{name}.default": ("integer", {"of": of}) for name, of in tvm_integers.OPERATORS.items()},
    **{
        f"{name}.default": ("integer_along", {"of": tvm_integers.OPERATORS[name]})
        for name in ("quantize_static", "dequantize_static", "requantize", "add_requantized", "avg_pool2d_i8")
    },
    **{f"{name}.default": ("integer", {"of": of}) for name, of in tvm_islands.OPERATORS.items()},
    "cat.default": ("concatenated", {}),
    "index_copy.default": ("index_copy", {}),
    "conv2d_i8i8.default": ("integer_convolution", {"of": tvm_integers.OPERATORS["conv2d_i8i8"]}),
    "linear_i8.default": ("weight_only", {"of": tvm_integers.OPERATORS["linear_i8"]}),
    "linear_i4.default": ("weight_only", {"of": tvm_integers.OPERATORS["linear_i4"]}),
}
"""What is lowered here, by the operator's name: which method, and what it is given beside the node."""
