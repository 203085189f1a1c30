"""ResNet, CogVideoX, HunyuanVideo and LTX: published sizes by their parameters, small ones by what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from intarsia.backends import agreement
from intarsia.backends.onnx import OnnxBackend
from intarsia.ir.execute import check_types
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import load_target
from intarsia.ir.verify import verify
from intarsia.models.base import Model, find, load, meta
from intarsia.subject import dynamic_axes, resolve

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

SMALL = ("cogvideox-mini", "hunyuanvideo-mini", "ltx-mini", "resnet18")


@dataclass(frozen=True)
class Traced:
    model: Model
    module: nn.Module
    inputs: dict[str, Tensor]
    program: Program


@pytest.fixture(scope="module", params=SMALL)
def traced(request: pytest.FixtureRequest) -> Traced:
    model = find(request.param)
    return Traced(model, load(model), model.inputs(), resolve(request.param).program)


def outputs(traced: Traced) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(traced.module(**traced.inputs, **traced.model.static))


def attention(width: int, inner: int | None = None) -> int:
    """Weights and biases of query, key, value and output."""
    return 4 * linear(width, inner or width)


def linear(columns: int, rows: int) -> int:
    return columns * rows + rows


def cogvideox(*, width: int, head: int, layers: int, patch: int = 2 * 2) -> int:
    """Counted by hand: adaLN of both streams comes from one linear layer, attention and feed-forward are shared."""
    norms = 2 * (linear(512, 6 * width) + 2 * width)
    block = norms + attention(width) + 2 * 2 * head + linear(width, 4 * width) + linear(4 * width, width)
    patches = linear(16 * patch, width) + linear(4096, width)
    time = linear(width, 512) + linear(512, 512)
    out = 2 * width + linear(512, 2 * width) + 2 * width + linear(width, 16 * patch)
    return layers * block + patches + time + out


def ltx(*, width: int, layers: int) -> int:
    """Counted by hand: self-attention, cross-attention, feed-forward, one table of six rows a layer."""
    block = 2 * (attention(width) + 2 * width) + linear(width, 4 * width) + linear(4 * width, width) + 6 * width
    time = linear(256, width) + linear(width, width) + linear(width, 6 * width)
    text = linear(4096, width) + linear(width, width)
    return layers * block + time + text + linear(128, width) + linear(width, 128) + 2 * width


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("cogvideox-5b", 5_570_283_072),
        ("cogvideox1.5-5b", 5_570_676_352),
        ("hunyuanvideo", 12_821_012_544),
        ("ltx-2b", 1_923_385_472),
    ],
)
def test_published_sizes_have_the_published_parameters(name: str, published: int) -> None:
    module = meta(find(name))
    assert sum(parameter.numel() for parameter in module.parameters()) == published
    assert all(parameter.is_meta for parameter in module.parameters())


def test_published_parameters_are_those_counted_by_hand() -> None:
    assert cogvideox(width=3072, head=64, layers=42) == 5_570_283_072
    assert cogvideox(width=3072, head=64, layers=42, patch=2 * 2 * 2) == 5_570_676_352
    assert ltx(width=2048, layers=28) == 1_923_385_472


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cogvideox-5b", (1, 13, 16, 60, 90)),
        ("cogvideox1.5-5b", (1, 22, 16, 96, 170)),
        ("ltx-2b", (1, 5280, 128)),
        ("resnet50", (1, 1000)),
    ],
)
def test_published_models_map_their_example_inputs(name: str, shape: tuple[int, ...]) -> None:
    model = find(name)
    with torch.device("meta"):
        inputs = model.inputs()
    assert meta(model)(**inputs, **model.static)[0].shape == shape


def test_the_graph_gives_the_same_bits_as_the_module(traced: Traced) -> None:
    graph = traced.program.graph
    verify(graph)
    check_types(graph)
    answers = traced.program.module()(*(traced.inputs[value.name] for value in graph.inputs))
    assert all(torch.equal(found, expected) for found, expected in zip(answers, outputs(traced), strict=True))


def test_nothing_that_only_traces_need_is_left(traced: Traced) -> None:
    unwanted = ("aten.dropout", "aten.alias", "aten.detach", "aten.type_as", "aten.empty_like", "aten.sym_size.int")
    assert not list(traced.program.graph.find(*unwanted))


def test_attention_stays_whole(traced: Traced) -> None:
    counts = {"cogvideox-mini": 2, "hunyuanvideo-mini": 4, "ltx-mini": 4, "resnet18": 0}
    found = traced.program.graph.find("aten.scaled_dot_product_attention")
    assert len(list(found)) == counts[traced.model.name]


def test_every_weight_matters_so_that_a_wrong_engine_is_noticed(traced: Traced) -> None:
    """Its rows in reverse order change the output a hundred times as much as an engine is allowed to be off."""
    program, expected = traced.program, outputs(traced)
    inputs = [traced.inputs[value.name] for value in program.graph.inputs]
    assert 0.1 < float(expected[0].std()) < 100
    for name, weight in [(name, weight) for name, weight in program.weights.items() if weight.ndim > 1][::3]:
        changed = Program(program.graph, {**program.weights, name: weight.flip(0)})
        with torch.no_grad():
            assert agreement.error(changed.module()(*inputs), expected) > 1e-2, name


def test_the_onnx_engine_answers_like_the_graph(traced: Traced, tmp_path: Path) -> None:
    """On the example and on other inputs, whose masks have holes; batch norms are folded into convolutions."""
    program, backend, target = materialize(traced.program), OnnxBackend(), load_target("cpu-avx2")
    built = backend.build(program, target, tmp_path)
    engine = backend.load(tmp_path, built.files)
    for inputs in (
        [traced.inputs[value.name] for value in program.graph.inputs],
        example_inputs(program.graph, seed=1),
    ):
        with torch.no_grad():
            assert agreement.error(engine(*inputs), tuple(program.module()(*inputs))) < 1e-5
    operators = built.info["operators"]
    assert isinstance(operators, list)
    assert "BatchNormalization" not in operators
    assert ("Attention" in operators) is (traced.model.name != "resnet18")
    assert "Softmax" not in operators


def test_padding_of_the_text_is_not_attended_to() -> None:
    for name in ("hunyuanvideo-mini", "ltx-mini"):
        model = find(name)
        module, inputs = load(model), model.inputs()
        padding = inputs["encoder_attention_mask"] == 0
        assert padding.any()
        other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].masked_fill(padding[..., None], 3)}
        with torch.no_grad():
            first, second = (module(**given, **model.static)[0] for given in (inputs, other))
        assert agreement.error((first,), (second,)) < 1e-3, name


def test_the_batch_of_pictures_may_vary() -> None:
    program = resolve("resnet18", dynamic=dynamic_axes("resnet18", ["batch"])).program
    model = find("resnet18")
    pictures = torch.cat([model.inputs()["pixel_values"] * scale for scale in (1, 0.5, 2)])
    with torch.no_grad():
        expected = load(model)(pictures, **model.static)
    assert agreement.error(program.module()(pictures), expected) < 1e-6
