"""The door to PyTorch: what comes in is what was there, what goes out is what came in, and what cannot pass is told."""

from __future__ import annotations

from collections.abc import Callable
from inspect import getsourcelines

import pytest
import torch
from torch import Tensor, nn

from intarsia.ir.errors import Unsupported, UsageError
from intarsia.ir.execute import check_types
from intarsia.ir.exported import export_program, trace
from intarsia.ir.graph import Graph
from intarsia.ir.program import example_inputs, materialize
from intarsia.ir.sizes import Size
from intarsia.ir.types import TensorType
from intarsia.ir.verify import verify


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(16, 16)
        self.to_kv = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = self.to_q(x)
        k, v = self.to_kv(x).chunk(2, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.norm = nn.LayerNorm(16)
        self.register_buffer("table", torch.arange(16.0), persistent=False)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        h = x + self.attn(self.norm(x)) * scale
        rotated = torch.empty_like(h)
        rotated[..., 0::2] = -h[..., 1::2]
        rotated[..., 1::2] = h[..., 0::2]
        return rotated * self.table, x.mean(1)


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def test_names_are_module_paths_and_whole_operators_stay_whole(
    block: Block, golden: Callable[[str, str], None]
) -> None:
    program = trace(
        block, {"x": torch.randn(2, 6, 16)}, static={"scale": 0.5}, dynamic={"x": {0: "batch", 1: "2*tokens"}}
    )
    verify(program.graph)
    check_types(program.graph)
    golden("block.traced.graph", _without_lines(program.graph))


def _without_lines(graph: Graph) -> str:
    return "".join(line.split("  # ")[0] + "\n" for line in str(graph).splitlines())


def test_a_node_remembers_the_line_of_the_model_that_asked_for_it(block: Block) -> None:
    program = trace(block, {"x": torch.randn(2, 6, 16)})
    lines, first = getsourcelines(Attention.forward)
    line = first + len(lines) - 1
    assert program.graph.producers["attn.scaled_dot_product_attention"].source == f"test_exported.py:{line}"


def test_a_traced_graph_computes_the_same_bits_as_its_module(block: Block) -> None:
    x = torch.randn(2, 6, 16)
    program = trace(block, {"x": x}, dynamic={"x": {0: "batch", 1: "tokens"}})
    for example in (x, torch.randn(5, 3, 16)):
        for ours, theirs in zip(program.module()(example), block(example), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dynamic", [None, {"x": {0: "batch", 1: "2*tokens"}}], ids=["static", "dynamic"])
def test_going_out_and_coming_in_again_changes_no_bit(block: Block, dynamic: dict[str, dict[int, str]] | None) -> None:
    program = trace(block, {"x": torch.randn(2, 6, 16)}, dynamic=dynamic)
    exported = export_program(program)
    for seed, sizes in ((1, {}), (2, {"batch": 5, "tokens": 4})):
        inputs = example_inputs(program.graph, sizes if dynamic else None, seed=seed)
        for ours, theirs in zip(exported.module()(*inputs), program.module()(*inputs), strict=True):
            assert torch.equal(ours, theirs)


def test_dynamic_sizes_keep_their_names_and_ranges_on_the_way_out(block: Block) -> None:
    program = trace(block, {"x": torch.randn(2, 6, 16)}, dynamic={"x": {0: "batch", 1: "2*tokens"}})
    assert [size.name for size in program.graph.sizes] == ["batch", "tokens"]
    assert program.graph.type("x") == TensorType("f32", ("batch", "2*tokens", 16))
    (placeholder,) = (n for n in export_program(program).graph.nodes if n.op == "placeholder" and n.name == "x")
    shape = placeholder.meta["val"].shape
    assert not isinstance(shape[0], int)
    assert not isinstance(shape[1], int)
    assert shape[2] == 16


def test_an_operator_of_another_library_survives_untouched_and_runs() -> None:
    with theirs() as double:
        module = Calls(double).eval()
        program = trace(module, {"x": torch.randn(3, 4)})
        assert [node.op for node in program.graph.nodes] == ["their_library.double_and_sum", "aten.add.Tensor"]
        assert Graph.parse(str(program.graph)) == program.graph
        check_types(program.graph)
        x = torch.randn(3, 4)
        assert torch.equal(program.module()(x)[0], module(x))
        assert torch.equal(export_program(program).module()(x)[0], module(x))


class Calls(nn.Module):
    def __init__(self, operator: Callable[[Tensor, float], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        doubled, total = self.operator(x, 2.0)
        return doubled + total


class theirs:  # noqa: N801
    """An operator that another library registers, for as long as the block lasts."""

    def __enter__(self) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
        self.library = torch.library.Library("their_library", "DEF")
        self.library.define("double_and_sum(Tensor x, float factor) -> (Tensor, Tensor)")
        self.library.impl("double_and_sum", lambda x, factor: (x * factor, x.sum()), "CPU")
        torch.library.register_fake(
            "their_library::double_and_sum", lambda x, factor: (torch.empty_like(x), x.new_empty(())), lib=self.library
        )
        return torch.ops.their_library.double_and_sum  # type: ignore[no-any-return]

    def __exit__(self, *_: object) -> None:
        self.library._destroy()


def test_tied_weights_and_state_that_is_no_parameter_come_along() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight
            self.constant = torch.ones(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) + self.constant + torch.tensor([1.0, 2.0, 3.0, 4.0])

    module = Tied().eval()
    x = torch.randn(2, 4)
    program = trace(module, {"x": x})
    assert torch.equal(program.module()(x)[0], module(x))
    assert torch.equal(materialize(program).module()(x)[0], module(x))


def test_a_model_on_the_meta_device_is_traced_without_its_weights() -> None:
    with torch.device("meta"):
        module, x = nn.Linear(1 << 20, 1 << 20), torch.empty(1, 1 << 20)
    program = trace(module.eval(), {"input": x})
    assert program.is_meta
    assert program.graph.type("weight").bytes() == 4 << 40


def test_dynamic_axes_that_do_not_exist_are_told() -> None:
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    with pytest.raises(UsageError, match="dynamic: 'y' is no input; inputs are input"):
        trace(linear, {"input": x}, dynamic={"y": {0: "N"}})
    with pytest.raises(UsageError, match="dynamic: input has axes 0 to 1, not 2"):
        trace(linear, {"input": x}, dynamic={"input": {2: "N"}})


class Nonzero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.nonzero().sum() + x.sum()


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


class Cond(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))  # type: ignore[no-any-return]


class Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nonzero = Nonzero()
        self.inner = nn.ModuleList([Branch(), Cond()])

    def forward(self, x: Tensor) -> Tensor:
        return self.nonzero(x) + self.inner[0](x) + self.inner[1](x)  # type: ignore[no-any-return]


def test_all_that_cannot_be_represented_is_told_at_once_with_module_and_line() -> None:
    with pytest.raises(Unsupported) as caught:
        trace(Refused(), {"x": torch.randn(4, 4)})
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith("Refused cannot be traced:\n  ")
    reasons = {reason.split(": ")[0]: reason for reason in caught.value.reasons}
    assert reasons.keys() == {"nonzero", "inner.0", "inner.1"}
    for scope, module, part in (
        ("nonzero", Nonzero, "aten.nonzero gives a shape that depends on data"),
        ("inner.0", Branch, "turns data into a Python value"),
        ("inner.1", Cond, "cond is control flow"),
    ):
        first_line = getsourcelines(module.forward)[1]
        assert part in reasons[scope]
        assert f"(test_exported.py:{first_line + 1})" in reasons[scope]


def test_hidden_state_is_refused_with_what_to_do() -> None:
    class Counts(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x + self.calls

    with pytest.raises(Unsupported, match="calls: is changed in place by forward; make it an input and an output"):
        trace(Counts(), {"x": torch.randn(4, 3)})


def test_an_input_that_is_changed_is_refused_with_what_to_do() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x[:, 0] = 1.0
            return x * 2

    with pytest.raises(Unsupported, match="x: is changed in place by forward; make it an input and an output"):
        trace(Overwrites(), {"x": torch.randn(4, 3)})


def test_a_forward_that_fails_is_told_in_one_line() -> None:
    with pytest.raises(Unsupported) as caught:
        trace(nn.Linear(4, 4), {"input": torch.randn(2, 5)}, name="mistaken")
    assert len(caught.value.reasons) == 1
    assert str(caught.value).startswith("mistaken cannot be traced:\n  ")


def test_a_refusal_prints_nothing_of_pytorchs_own(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Unsupported):
        trace(Branch(), {"x": torch.randn(4)})
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def wan() -> tuple[nn.Module, dict[str, Tensor]]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    module = diffusers.WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        text_dim=16,
        freq_dim=64,
        ffn_dim=128,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 3, 4, 16, 16),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 3, 16),
    }
    return module, inputs


def test_a_wan_transformer_keeps_its_sizes_by_name_and_its_bits(wan: tuple[nn.Module, dict[str, Tensor]]) -> None:
    module, inputs = wan
    program = trace(
        module,
        inputs,
        static={"return_dict": False},
        dynamic={
            "hidden_states": {0: "batch", 2: "frames", 3: "4*height", 4: "4*width"},
            "timestep": {0: "batch"},
            "encoder_hidden_states": {0: "batch", 1: "text"},
        },
    )
    verify(program.graph)
    check_types(program.graph)
    assert Graph.parse(str(program.graph)) == program.graph
    assert [size.name for size in program.graph.sizes] == ["batch", "frames", "height", "text", "width"]
    assert Size("frames", 1, 64) in program.graph.sizes
    assert program.graph.type("hidden_states").shape == ("batch", 3, "frames", "4*height", "4*width")
    assert program.graph.type("blocks.1.attn1.to_q.linear").shape == ("batch", "frames*height*width", 64)
    sites = list(program.graph.find("aten.scaled_dot_product_attention"))
    assert [node.name.rsplit(".", 1)[0] for node in sites] == [f"blocks.{b}.attn{a}" for b in (0, 1) for a in (1, 2)]
    exported = export_program(program)
    sizes = {"batch": 3, "frames": 5, "height": 3, "width": 6, "text": 7}
    for example in (tuple(inputs.values()), example_inputs(program.graph, sizes, seed=1)):
        with torch.no_grad():
            expected = module(*example, return_dict=False)[0]
            assert torch.equal(program.module()(*example)[0], expected)
            assert torch.equal(exported.module()(*example)[0], expected)


def test_fixed_arguments_may_be_nested() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, *, scales: tuple[float, dict[str, float]]) -> Tensor:
            return x * scales[0] * scales[1]["inner"]

    program = trace(Scaled(), {"x": torch.ones(2)}, static={"scales": (2.0, {"inner": 3.0})})
    assert program.module()(torch.ones(2))[0].tolist() == [6.0, 6.0]
