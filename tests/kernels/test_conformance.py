"""Our operators keep their promises, and the check finds operators that do not."""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia import kernels
from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels.base import Work
from intarsia.kernels.conformance import Case, check_operator
from intarsia.kernels.linear_i4.reference import quantize_groups
from intarsia.kernels.linear_i8.reference import quantize_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 32), (3, 96), (17, 160), (40, 64))


def weights() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in SHAPES:
        for dtype in DTYPES:
            yield torch.randn(rows, columns, generator=generator).to(dtype)


def inputs(columns: int, dtype: torch.dtype) -> Iterator[Tensor]:
    for leading in ((1,), (5,), (2, 3), (2, 0)):
        yield torch.linspace(-1, 1, columns).to(dtype).expand(*leading, columns).contiguous()


def cases(op: str) -> list[Case]:
    match op:
        case "intarsia.quantize_rows":
            return [{"weight": weight} for weight in weights()]
        case "intarsia.quantize_groups":
            return [{"weight": w, "group": g} for w in weights() for g in (32, 64) if w.shape[1] % g == 0]
        case "intarsia.linear_i8":
            return list(_products("weight", quantize_rows, {}))
        case _:
            return list(_products("packed", lambda w: quantize_groups(w, 32), {"group": 32}))


def _products(key: str, quantize: Any, more: Mapping[str, Any]) -> Iterator[Case]:
    for weight in weights():
        stored, scale = quantize(weight)
        for x in inputs(weight.shape[1], weight.dtype):
            for bias in (None, torch.ones(weight.shape[0], dtype=weight.dtype)):
                yield {"input": x, key: stored, "scale": scale, "bias": bias, **more}


@pytest.mark.parametrize("op", kernels.OPERATORS)
def test_every_operator_keeps_its_promises(op: str, target: Target) -> None:
    check_operator(op, cases(op), target)


def test_registering_twice_is_registering_once() -> None:
    kernels.register()
    kernels.register()
    assert tuple(kernels.operators())[:4] == tuple(kernels.OPERATORS)


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


@pytest.fixture(scope="module")
def faulty() -> Iterator[None]:
    """Operators that break one promise each, as a third party's library might register them."""
    library = torch.library.Library("faulty", "DEF")
    bodies = {
        "changes": lambda x: x.add_(1).clone(),
        "aliases": lambda x: x.view(-1),
        "draws": torch.rand_like,
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
        ("mistypes", r"the fake kernel gives f16\[4\], a run gives f32\[4\]"),
        ("refuses", "why_not refuses what runs: no"),
    ],
)
def test_an_operator_that_breaks_a_promise_is_told_which(
    name: str, sentence: str, faulty: None, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def why_not(node: Node, graph: Graph, target: Target) -> str | None:
        return "no" if node.op == "faulty.refuses" else None

    contract = SimpleNamespace(OPS=(f"faulty.{name}",), why_not=why_not, work=lambda *_: Work(0.0, "f32", 32))
    monkeypatch.setattr(kernels, "operators", lambda: {f"faulty.{name}": contract})
    with pytest.raises(AssertionError, match=sentence):
        check_operator(f"faulty.{name}", [{"x": torch.ones(4)}], target)
