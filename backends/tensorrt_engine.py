"""A TensorRT engine on a GPU: tensors by address, on PyTorch's current stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.backends.base import Carried, Engine, Stateful
from intarsia.backends.tensorrt_build import package
from intarsia.ir.errors import MissingEnvironment, UsageError


class TensorrtEngine(Engine):
    """A deserialized plan with an execution context of its own."""

    def __init__(self, trt: Any, path: Path) -> None:
        """Read the plan at ``path``.

        Raises:
            MissingEnvironment: There is no GPU, or the plan is for another one or another version of TensorRT.
        """
        if not torch.cuda.is_available():
            raise MissingEnvironment(
                f"{path.name} runs on an NVIDIA GPU, and PyTorch sees none here; run it where there is one, "
                "or check it with --reference"
            )
        self._trt = trt
        self._log = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise MissingEnvironment(
                f"{path.name} was built for another GPU or another version than {package(trt)} {trt.__version__} on "
                f"{torch.cuda.get_device_name()}; build it here: python {path.with_name('build.py')}"
            )
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in self._inputs]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the engine answers, on the CPU; UsageError for inputs of another number, type or shape."""
        return tuple(output.cpu() for output in self.enqueue([tensor.cuda() for tensor in inputs]))

    def stateful(self, values: Sequence[Tensor], *, inputs: Sequence[int], outputs: Sequence[int]) -> Stateful:
        """The engine with these inputs kept on the GPU, where outputs are written into memory of their own."""

        def run(*given: Tensor) -> tuple[Tensor, ...]:
            return self.enqueue([tensor.cuda() for tensor in given])

        kept = [value.cuda() for value in values]
        return Carried(run, kept, inputs=inputs, outputs=outputs, device=self.device)

    def enqueue(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Start the engine on tensors on the GPU, on the current stream; gives tensors on the GPU."""
        if len(inputs) != len(self._inputs):
            raise UsageError(f"the engine takes {', '.join(self._inputs)}; {len(inputs)} tensors are given")
        held = []
        for name, tensor in zip(self._inputs, inputs, strict=True):
            expected = _torch_dtype(self._trt, self._engine.get_tensor_dtype(name))
            if tensor.dtype != expected:
                raise UsageError(f"the engine takes {name} as {expected}, not {tensor.dtype}")
            held.append(tensor.contiguous())
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise UsageError(f"the engine was not built for {name} of shape {tuple(tensor.shape)}")
            self._context.set_tensor_address(name, held[-1].data_ptr())
        outputs = []
        for name in self._outputs:
            dtype = _torch_dtype(self._trt, self._engine.get_tensor_dtype(name))
            outputs.append(torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device="cuda"))
            self._context.set_tensor_address(name, outputs[-1].data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise MissingEnvironment("TensorRT could not start the engine on this GPU; its log above says why")
        return tuple(outputs)

    @property
    def device(self) -> str:
        """GPU and builder."""
        return f"{torch.cuda.get_device_name()}, {package(self._trt)} {self._trt.__version__}"


def _torch_dtype(trt: Any, dtype: Any) -> torch.dtype:
    named = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT64: torch.int64,
        trt.DataType.INT32: torch.int32,
        trt.DataType.INT8: torch.int8,
        trt.DataType.UINT8: torch.uint8,
        trt.DataType.BOOL: torch.bool,
    }
    return named[dtype]
