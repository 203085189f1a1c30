"""Our operators keep their promises, and the check finds operators that do not."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from intarsia import kernels
from intarsia.ir.graph import Graph, Node
from intarsia.ir.operators import resolve
from intarsia.ir.target import Target
from intarsia.kernels.base import Work
from intarsia.kernels.block_sparse_attention.tables import block_tables
from intarsia.kernels.conformance import Case, check_operator
from intarsia.kernels.linear_i4.reference import quantize_groups
from intarsia.kernels.linear_i8.reference import quantize_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 32), (3, 96), (17, 160), (40, 64))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(-128, 128, shape, generator=generator).to(dtype)


def dyadic(channels: int) -> dict[str, Tensor]:
    return {
        "multiplier": torch.arange(1, channels + 1, dtype=torch.int32) * 1000,
        "shift": torch.arange(channels, dtype=torch.int32) % 10 + 12,
    }


def two_dyadic() -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for prefix in ("", "other_") for key, value in dyadic(1).items()}


def weights() -> Iterator[Tensor]:
    for rows, columns in SHAPES:
        for dtype in DTYPES:
            yield random(rows, columns, dtype=dtype)


def products(key: str, quantize: Callable[[Tensor], tuple[Tensor, Tensor]], more: Mapping[str, Any]) -> Iterator[Case]:
    for weight in weights():
        stored, scale = quantize(weight)
        for leading in ((1,), (5,), (2, 3), (2, 0)):
            x = torch.linspace(-1, 1, weight.shape[1]).to(weight.dtype).expand(*leading, weight.shape[1]).contiguous()
            for bias in (None, torch.ones(weight.shape[0], dtype=weight.dtype)):
                yield {"input": x, key: stored, "scale": scale, "bias": bias, **more}


def integer_linears() -> Iterator[Case]:
    for rows, columns in SHAPES:
        weight = random(rows, columns, dtype=torch.int8)
        for leading in ((1,), (2, 3), (2, 0)):
            x = random(*leading, columns, dtype=torch.int8, seed=1)
            for bias in (None, random(rows, dtype=torch.int32)):
                yield {"input": x, "weight": weight, "bias": bias, **dyadic(rows)}
                yield {"input": x, "weight": weight, "bias": bias, **dyadic(rows), "low": -300, "high": 300}


def integer_convolutions() -> Iterator[Case]:
    for groups, stride, padding, dilation in ((1, 1, 0, 1), (2, 2, 1, 1), (4, 1, 2, 2)):
        weight = random(8, 4 // groups, 3, 3, dtype=torch.int8)
        window = {"stride": [stride] * 2, "padding": [padding] * 2, "dilation": [dilation] * 2, "groups": groups}
        for bias in (None, random(8, dtype=torch.int32)):
            x = random(2, 4, 9, 7, dtype=torch.int8, seed=1)
            yield {"input": x, "weight": weight, "bias": bias, **dyadic(8), **window}
            yield {"input": x, "weight": weight, "bias": bias, **dyadic(8), **window, "low": 0, "high": 200}


def average_pools() -> Iterator[Case]:
    for kernel, stride, padding in (((3, 2), (2, 1), (1, 0)), ((9, 7), (1, 1), (0, 0))):
        window = {"kernel_size": kernel, "stride": stride, "padding": padding}
        for dtype, channels, high in ((torch.int8, 1, 127), (torch.int16, 4, 2**15 - 1)):
            x = 100 * random(2, 4, 9, 7, dtype=dtype)
            yield {"input": x, **window, **dyadic(channels), "low": -high - 1, "high": high}


def tables() -> Iterator[Case]:
    for bits, dtype in ((8, torch.int8), (16, torch.int16)):
        table = torch.ops.intarsia.function_table("gelu", 0.05, 0.02, bits)
        for ends in ({}, {"low": 0, "high": 15}, {"low": -(2**15), "high": 2**15 - 1}):
            yield {"input": 100 * random(3, 4, 5, dtype=dtype), "table": table, **ends}


def softmaxes() -> Iterator[Case]:
    for bits, dtype in ((8, torch.int8), (16, torch.int16)):
        table = torch.ops.intarsia.exponentials(0.1, bits)
        for shape in ((7,), (3, 1), (2, 0, 5), (2, 3, 40)):
            given = {"input": random(*shape, dtype=dtype), "table": table, "multiplier": 2**30, "shift": 23}
            yield {**given, "low": 0, "high": 200}


def integer_norms() -> Iterator[Case]:
    for dtype, centered in ((torch.int8, True), (torch.int16, False)):
        for weight, shape in ((None, (2, 3, 40)), (random(40), (0, 40)), (random(1), (4, 1))):
            numbers = torch.ops.intarsia.norm_numbers(weight, weight, 0.02, shape[-1])
            given = dict(zip(("weight", "bias", "shift"), numbers, strict=True))
            yield {"input": random(*shape, dtype=dtype), **given, "epsilon": 7, "centered": centered}


def integer_matmuls() -> Iterator[Case]:
    for leading in ((), (3,), (2, 3)):
        input, other = (random(*leading, *shape, dtype=torch.int8, seed=sum(shape)) for shape in ((5, 9), (9, 4)))
        yield {"input": input, "other": other, "multiplier": 2**30 + 1, "shift": 38, "low": -300, "high": 300}


def attentions() -> Iterator[Case]:
    for dtype in DTYPES:
        query = random(2, 5, 3, 16, dtype=dtype).transpose(1, 2)
        for keys, lengths, scale in ((5, None, None), (7, torch.tensor([7, 2]), 0.5), (3, torch.tensor([0, 9]), None)):
            key, value = (random(2, 3, keys, 16, dtype=dtype, seed=seed) for seed in (1, 2))
            yield {"query": query, "key": key, "value": value, "lengths": lengths, "scale": scale}


def sparse_attentions() -> Iterator[Case]:
    for dtype in DTYPES:
        query = random(2, 5, 3, 16, dtype=dtype).transpose(1, 2)
        for keys, blocks, order, lengths in (
            (5, "2:2*0;1", None, None),
            (7, "3:0-1;-;0,2", None, torch.tensor([7, 2])),
            (5, "2:0-1;1;-", "0:3*2,1:2*2", torch.tensor([0, 4])),
        ):
            key, value = (random(2, 3, keys, 16, dtype=dtype, seed=seed) for seed in (1, 2))
            attention = {"query": query, "key": key, "value": value, "lengths": lengths, "scale": None}
            yield {**attention, "blocks": blocks, "order": order, "block_q": 2, "block_k": 3}
            yield {**attention, "blocks": blocks, "order": order, "block_q": 2, "block_k": 3, "mean": 0.25}


def tabled_attentions() -> Iterator[Case]:
    for case in sparse_attentions():
        if "mean" in case:  # what has arrays for tables has no mean
            continue
        rest = {key: value for key, value in case.items() if key not in ("blocks", "order")}
        tables = block_tables(case["blocks"], case["order"], case["key"].shape[2], case["block_k"])
        yield {**rest, **tables._asdict(), "tokens": tables.tokens if case["order"] else None}


def norms() -> Iterator[Case]:
    for dtype in DTYPES:
        affine = random(24, dtype=dtype, seed=1)
        for weight, rows in ((None, (2, 1)), (affine, (2, 5)), (affine, (1, 1))):
            scale, shift = (random(*rows, 24, dtype=dtype, seed=seed) for seed in (2, 3))
            x = random(2, 5, 24, dtype=dtype)
            yield {"input": x, "weight": weight, "bias": weight, "scale": scale, "shift": shift, "eps": 1e-6}


def residuals() -> Iterator[Case]:
    for dtype in DTYPES:
        for rows in ((2, 1), (2, 5), (1, 1)):
            residual, x = random(2, 5, 24, dtype=torch.float32), random(2, 5, 24, dtype=dtype, seed=1)
            yield {"residual": residual, "input": x, "gate": random(*rows, 24, dtype=dtype, seed=2)}


def ropes() -> Iterator[Case]:
    for dtype in DTYPES:
        for weight in (None, random(24, dtype=dtype, seed=1)):
            tables = {"cos": random(5, 4, seed=2), "sin": random(5, 4, seed=3)}
            yield {"input": random(2, 5, 24, dtype=dtype), "weight": weight, **tables, "heads": 3, "eps": 1e-6}


def roundings() -> Iterator[Case]:
    for dtype in DTYPES:
        yield {"input": random(3, 4, 5, dtype=dtype).transpose(0, 1), "scale": 0.02}


CASES: Mapping[str, Callable[[], Iterable[Case]]] = {
    "intarsia.quantize_rows": lambda: ({"weight": weight} for weight in weights()),
    "intarsia.linear_i8": lambda: products("weight", quantize_rows, {}),
    "intarsia.quantize_groups": lambda: (
        {"weight": w, "group": g} for w in weights() for g in (32, 64) if w.shape[1] % g == 0
    ),
    "intarsia.linear_i4": lambda: products("packed", lambda weight: quantize_groups(weight, 32), {"group": 32}),
    "intarsia.unpack_i4": lambda: ({"packed": quantize_groups(weight, 32)[0]} for weight in weights()),
    "intarsia.linear_i8i8": integer_linears,
    "intarsia.conv2d_i8i8": integer_convolutions,
    "intarsia.quantize_static": roundings,
    "intarsia.dequantize_static": lambda: (
        {"input": random(3, 4, dtype=torch.int8).t(), "scale": 0.02, "dtype": dtype} for dtype in DTYPES
    ),
    "intarsia.requantize": lambda: (
        {"input": 1000 * random(3, 4, 5, dtype=torch.int32), **dyadic(4 + axis), "axis": 1 + axis} for axis in (0, 1)
    ),
    "intarsia.add_requantized": lambda: (
        {"input": 9 * random(3, 4, dtype=a).t(), "other": random(4, 3, dtype=b, seed=1), **two_dyadic(), **ends}
        for a, b in ((torch.int8, torch.int16), (torch.int32, torch.int8))
        for ends in ({}, {"low": -(2**15), "high": 2**15 - 1}, {"low": 0, "high": 15})
    ),
    "intarsia.avg_pool2d_i8": average_pools,
    "intarsia.quantize_channels": lambda: (
        {"weight": w, "bits": bits, "grain": grain} for w in weights() for bits, grain in ((4, 0.0), (8, 0.01))
    ),
    "intarsia.dyadic": lambda: ({"scale": random(9, seed=seed).abs(), "factor": 0.1**seed} for seed in range(12)),
    "intarsia.exact_dyadic": lambda: (
        {**dyadic(9), "weight": weight, "bias": bias, "input_low": 0, "input_high": 15, "low": -128, "high": 127}
        for weight in (random(9, 4, dtype=torch.int8), random(9, 2, 3, 3, dtype=torch.int8))
        for bias in (None, random(9, dtype=torch.int32))
    ),
    "intarsia.quantize_bias": lambda: (
        {"bias": random(9, dtype=dtype), "scale": random(9, seed=1).abs() + 0.1, "input_scale": 0.02}
        for dtype in DTYPES
    ),
    "intarsia.function_table": lambda: (
        {"function": function, "input_scale": 0.1, "scale": 0.05, "bits": bits}
        for function in ("gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
        for bits in (8, 16)
    ),
    "intarsia.apply_table": tables,
    "intarsia.exponentials": lambda: ({"scale": 0.1, "bits": bits} for bits in (8, 16)),
    "intarsia.integer_softmax": softmaxes,
    "intarsia.norm_numbers": lambda: (
        {"weight": one, "bias": other, "scale": 0.1, "channels": 9}
        for one in (None, random(9))
        for other in (None, one)
    ),
    "intarsia.integer_norm": integer_norms,
    "intarsia.matmul_i8i8": integer_matmuls,
    "intarsia.calibrated": lambda: ({"input": weight, "low": -1.0, "high": 2.5} for weight in weights()),
    "intarsia.fake_quantize": lambda: ({**case, "low": 0, "high": 15} for case in roundings()),
    "intarsia.fake_quantize_channels": lambda: ({"weight": w, "bits": bits} for w in weights() for bits in (4, 8)),
    "intarsia.fake_quantize_bias": lambda: (
        {"bias": weight[:, 0].contiguous(), "weight": weight, "bits": 4, "input_scale": 0.02} for weight in weights()
    ),
    "intarsia.attention": attentions,
    "intarsia.block_sparse_attention": sparse_attentions,
    "intarsia.integers": lambda: ({"runs": runs} for runs in ("0:4*1", "3:2*4+3*1,0:1*1")),
    "intarsia.block_mask": lambda: (
        {"blocks": "3:0-1;-;0,2", "order": order, "tokens": 6, "block_q": 2, "block_k": 2}
        for order in (None, "0:3*2,1:3*2")
    ),
    "intarsia.block_tables": lambda: (
        {"blocks": "3:0-1;-;0,2", "order": order, "keys": 6, "block_k": 2} for order in (None, "0:3*2,1:3*2")
    ),
    "intarsia.block_sparse_attention_tables": tabled_attentions,
    "intarsia.norm_rope": ropes,
    "intarsia.modulated_norm": norms,
    "intarsia.gated_residual": residuals,
}


@pytest.mark.parametrize("op", kernels.OPERATORS)
def test_every_operator_keeps_its_promises(op: str, target: Target) -> None:
    check_operator(op, list(CASES[op]()), target)


def test_registering_twice_is_registering_once() -> None:
    kernels.register()
    kernels.register()
    assert tuple(kernels.operators())[: len(kernels.OPERATORS)] == tuple(kernels.OPERATORS)


class Call(torch.nn.Module):
    """A model that is one call of an operator of ours."""

    def __init__(self, op: str, others: Mapping[str, object]) -> None:
        super().__init__()
        self.op, self.others = resolve(op), others

    def forward(self, tensors: dict[str, Tensor]) -> Any:
        return self.op(**tensors, **self.others)


OF_TEXTS = ("intarsia.block_sparse_attention", "intarsia.integers", "intarsia.block_mask", "intarsia.block_tables")
"""Operators that make constants of texts, which ``run_decompositions`` cannot add; backends lower them themselves."""

OF_DATA = ("intarsia.exact_dyadic",)
"""Operators that search, so that what they do hangs on the numbers; no backend sees them, as parameters are known."""


@pytest.mark.parametrize("op", [op for op in kernels.OPERATORS if op not in OF_TEXTS + OF_DATA])
def test_every_operator_decomposes_to_pytorchs_own_with_sizes_left_open(op: str) -> None:
    case = next(iter(CASES[op]()))
    tensors = {key: value for key, value in case.items() if isinstance(value, Tensor)}
    module = Call(op, {key: value for key, value in case.items() if key not in tensors})
    activations = {"input", "query", "key", "value", "residual"} & tensors.keys()
    axes = {key: [Dim.AUTO if key in activations else None] * value.ndim for key, value in tensors.items()}
    exported = torch.export.export(module, (tensors,), dynamic_shapes=(axes,) if axes else None, strict=False)
    lowered = exported.run_decompositions(kernels.decompositions())
    assert "intarsia" in str(exported.graph)
    assert "intarsia" not in str(lowered.graph)
    torch.testing.assert_close(lowered.module()(tensors), module(tensors))


def test_other_operators_have_no_contract_of_ours(target: Target) -> None:
    graph = Graph.parse("graph g {\n  input %x: f32[4]\n  %y: f32[4] = aten.relu(self=%x)\n  return %y\n}\n")
    assert kernels.why_not(graph.nodes[0], graph, target) is None
    assert kernels.work(graph.nodes[0], graph, {}) is None


def test_an_operator_that_nobody_registered_is_named(target: Target) -> None:
    with pytest.raises(AssertionError, match=r"intarsia.nothing: no such operator; name it in OPERATORS"):
        check_operator("intarsia.nothing", [{}], target)


def test_an_operator_without_cases_is_named(target: Target) -> None:
    with pytest.raises(AssertionError, match=r"intarsia\.linear_i8: no cases to check"):
        check_operator("intarsia.linear_i8", [], target)


def test_a_module_that_lacks_a_part_of_the_contract_is_told_which(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "operators", lambda: {"faulty.part": SimpleNamespace(OPS=("faulty.part",))})
    with pytest.raises(AssertionError, match=r"its module has no REFERENCES, LAUNCHES, why_not, work; an operator's"):
        check_operator("faulty.part", [{"x": torch.ones(4)}], target)


@pytest.fixture(scope="module")
def faulty() -> Iterator[None]:
    """Operators that break one promise each, as a third party's library might register them."""
    library = torch.library.Library("faulty", "DEF")
    bodies = {
        "changes": lambda x: x.add_(1).clone(),
        "aliases": lambda x: x.view(-1),
        "draws": torch.rand_like,
        "differs": lambda x: x + 2,
        "lacks": lambda x: x + 1,
        "lies": lambda x: x.t().contiguous().t() + 1,
        "refuses": lambda x: x + 1,
        "mistypes": lambda x: x + 1,
    }
    for name, body in bodies.items():
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, body, "CPU")
        fake = torch.half if name == "mistypes" else None
        torch.library.register_fake(
            f"faulty::{name}", lambda x, dtype=fake: x.new_empty(x.shape, dtype=dtype), lib=library
        )
    yield
    library._destroy()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("changes", "changes its argument x"),
        ("aliases", "gives back memory of an argument"),
        ("draws", "two calls give different bits"),
        ("mistypes", r"the fake kernel gives f16\[4, 2\], a run gives f32\[4, 2\]"),
        ("differs", "the reference differs: "),
        ("lies", "in memory, what the fake kernel gives lies otherwise than what a run gives"),
        ("lacks", "REFERENCES of its module has no faulty.lacks"),
        ("refuses", "why_not refuses what runs: no"),
    ],
)
def test_an_operator_that_breaks_a_promise_is_told_which(
    name: str, sentence: str, faulty: None, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def why_not(node: Node, graph: Graph, target: Target) -> str | None:
        return "no" if node.op == "faulty.refuses" else None

    references = {} if name == "lacks" else {f"faulty.{name}": lambda x: x + 1}
    promises = {"why_not": why_not, "work": lambda *_: Work(0.0, "f32", 32), "REFERENCES": references, "LAUNCHES": {}}
    contract = SimpleNamespace(OPS=(f"faulty.{name}",), **promises)
    monkeypatch.setattr(kernels, "operators", lambda: {f"faulty.{name}": contract})
    with pytest.raises(AssertionError, match=sentence):
        check_operator(f"faulty.{name}", [{"x": torch.ones(4, 2)}], target)
