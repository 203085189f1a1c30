"""A machine that the tests of kernels share."""

from __future__ import annotations

import pytest

from intarsia.ir.target import Target


@pytest.fixture
def target() -> Target:
    return Target("null", "a machine for tests", "null", "none", {"f32": 1e9}, 1e9, 10**9, 0.0)
