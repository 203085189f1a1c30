"""Functions of one f32 as polynomials, which run in vectors; LLVM's own are a call for each lane."""

from __future__ import annotations

import math
from typing import Any


def exponential(x: Any) -> Any:
    """e**x for f32, relative error below 3e-7: the power of two by its exponent bits, the rest by a polynomial.

    Coefficients: Cephes, expf.c (S. Moshier). LLVM's own exponential is a call for each lane.
    """
    from tvm import tirx

    def f(value: float) -> Any:
        return tirx.const(value, "float32")

    x = tirx.max(tirx.min(x, f(88.0)), f(-87.0))
    n = tirx.floor(x * f(math.log2(math.e)) + f(0.5))
    r = x - n * f(0.693359375) - n * f(-2.12194440e-4)
    p = f(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + f(coefficient)
    p = p * r * r + r + f(1.0)
    return p * tirx.reinterpret("float32", (n.astype("int32") + 127) << 23)


def sigmoid(x: Any) -> Any:
    """1 / (1 + e**-x)."""
    return 1.0 / (1.0 + exponential(-x))


def tanh(x: Any) -> Any:
    """Hyperbolic tangent, by the sigmoid of twice the argument."""
    return 2.0 * sigmoid(2.0 * x) - 1.0


def erf(x: Any) -> Any:
    """Error function, absolute error below 2e-7 (Abramowitz and Stegun, 7.1.26)."""
    from tvm import tirx

    size = tirx.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    value = 1.0 - p * exponential(-size * size)
    return tirx.Select(x < 0.0, -value, value)


def silu(x: Any) -> Any:
    """x times its sigmoid."""
    return x * sigmoid(x)


def gelu_tanh(x: Any) -> Any:
    """GELU by the hyperbolic tangent, written as a sigmoid: one exponential."""
    return x * sigmoid(x * (1.5957691216 + 0.0713548162726 * x * x))


def gelu(x: Any) -> Any:
    """GELU by the error function."""
    return 0.5 * x * (1.0 + erf(x * (2.0**-0.5)))
