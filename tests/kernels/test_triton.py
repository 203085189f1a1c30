"""Our Triton kernels against their references, without a GPU: in Triton's interpreter, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from intarsia.ir.errors import MissingEnvironment
from intarsia.kernels.base import launcher

TOLERANCE = {"torch.float32": 1e-6, "torch.float16": 2e-3}
"""Relative to the largest output: f32 sums in another order; i8 in f16 skips the reference's rounding of the weight."""


def test_every_shape_agrees_with_the_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "interpret.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 60
    assert {case: error for case, error in errors.items() if error > TOLERANCE[case.split()[1]]} == {}


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for module in ("linear_i8", "linear_i4"):
        path = f"intarsia.kernels.{module}.triton"
        monkeypatch.delitem(sys.modules, path, raising=False)
        with pytest.raises(MissingEnvironment, match=r"needs Triton, which is missing; pip install"):
            launcher(path, module)


def test_a_launcher_of_a_module_that_is_not_there_is_our_mistake() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"intarsia\.kernels\.nothing"):
        launcher("intarsia.kernels.nothing", "linear")
