"""TensorRT engines on a GPU: built for the one that is here, run, and compared with eager PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from intarsia.backends import agreement, tensorrt_build
from intarsia.backends.null import NullEngine
from intarsia.backends.tensorrt import TensorrtBackend
from intarsia.backends.tensorrt_plugin import plugin_of, register
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target, load_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYERS = """graph layers {
  size N in [2, 64]
  input %x: f16[N, 3, 64]
  param %w: f16[32, 64]
  %y: f16[N, 3, 32] = aten.linear(input=%x, weight=%w)
  %z: f16[N, 3, 32] = aten.gelu(self=%y)
  return %z
}
"""

NORM = """graph norm {
  input %x: f16[2, 77, 128]
  input %scale: f16[2, 1, 128]
  input %shift: f16[2, 1, 128]
  %y: f16[2, 77, 128] = intarsia.modulated_norm(input=%x, weight=None, bias=None, scale=%scale, shift=%shift, eps=1e-06)
  return %y
}
"""


@pytest.fixture
def here() -> Target:
    """The GPU of this machine, if the builder that is installed knows it."""
    major, minor = torch.cuda.get_device_capability()
    target = replace(load_target("h100"), name="here", architecture=f"sm_{major}{minor}")
    try:
        tensorrt_build.library()
    except ImportError as error:
        pytest.skip(str(error))
    if reason := TensorrtBackend().why_not_target(target):
        pytest.skip(reason)
    return target


def test_an_engine_answers_like_eager_for_every_size(here: Target, tmp_path: Path) -> None:
    graph = Graph.parse(LAYERS)
    program = Program(graph, {"w": torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).half()})
    backend = TensorrtBackend()
    engine = backend.load(tmp_path, backend.build(program, here, tmp_path).files)
    for extent in (2, 17, 64):
        inputs = example_inputs(graph, {"N": extent})
        assert agreement.error(engine(*inputs), NullEngine(program)(*inputs)) < agreement.TOLERANCES["f16"]
    with pytest.raises(UsageError, match="was not built for x of shape"):
        engine(torch.zeros(65, 3, 64, dtype=torch.float16))


def test_a_kernel_of_ours_runs_as_a_plugin() -> None:
    trt = pytest.importorskip("tensorrt")
    trtp = pytest.importorskip("tensorrt.plugin")
    graph = Graph.parse(NORM)
    major, minor = torch.cuda.get_device_capability()
    plugin = plugin_of(graph.nodes[0], graph, f"sm_{major}{minor}")
    register(trt, trtp, plugin)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS))
    given = [network.add_input(name, trt.DataType.HALF, type_.shape) for name, type_ in plugin.inputs.items()]
    layer = network.add_plugin(trtp.op.intarsia.modulated_norm(*given))
    network.mark_output(layer.get_output(0))
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(
        builder.build_serialized_network(network, builder.create_builder_config())
    )
    context = engine.create_execution_context()
    inputs = example_inputs(graph)
    tensors = [tensor.cuda() for tensor in inputs]
    output = torch.empty(2, 77, 128, dtype=torch.float16, device="cuda")
    for name, tensor in zip([*plugin.inputs, engine.get_tensor_name(3)], [*tensors, output], strict=True):
        context.set_tensor_address(name, tensor.data_ptr())
    assert context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    expected = NullEngine(Program(graph, {}))(*inputs)
    assert agreement.error((output.cpu(),), expected) < agreement.TOLERANCES["f16"]
