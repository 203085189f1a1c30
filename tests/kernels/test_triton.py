"""Our Triton kernels against their references, without a GPU: in Triton's interpreter, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from intarsia import kernels
from intarsia.ir.errors import MissingEnvironment
from intarsia.kernels.launch import imported

TOLERANCE = {"torch.float32": 2e-6, "torch.float16": 2e-3, "torch.int8": 0.0}
"""Relative to the largest output: f32 sums in another order; i8 in f16 skips the reference's rounding of the weight."""


def test_every_shape_agrees_with_the_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "interpret.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 123
    assert {case: error for case, error in errors.items() if error > TOLERANCE[case.split()[1]]} == {}


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    kernels.register()
    paths = [path for contract in kernels.operators().values() for path in contract.LAUNCHES.values()]
    assert len(set(paths)) == 10
    for path in paths:
        monkeypatch.delitem(sys.modules, path.split(":")[0], raising=False)
        with pytest.raises(MissingEnvironment, match=r"needs Triton, which is missing; pip install"):
            imported(path)


def test_a_launcher_of_a_module_that_is_not_there_is_our_mistake() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"intarsia\.kernels\.nothing"):
        imported("intarsia.kernels.nothing:launch")
