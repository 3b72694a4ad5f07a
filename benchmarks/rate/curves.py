"""Curves of bits over error: what one needs at the other's error, and on average."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator


class Point(NamedTuple):
    """Of a curve; the lower the better, both."""

    error: float
    """RMSE."""
    bits: float


class Ratio(NamedTuple):
    """Bits over those of a curve at the same error."""

    value: float
    is_extrapolated: bool
    """The error lies beyond the curve's ends: its last slope goes on."""


def front(points: Sequence[Point]) -> list[Point]:
    """Those points that no other one beats in both, from low errors to high ones."""
    kept: list[Point] = []
    for point in sorted(points):
        if not kept or point.bits < kept[-1].bits:
            kept.append(point)
    return kept


def ratio_at_equal_error(point: Point, reference: Sequence[Point]) -> Ratio | None:
    """Bits of a point over those of the front of `reference` at its error.

    Straight lines in log bits over log RMSE; None where the reference has no point, or one alone
    at another error, which has no slope.
    """
    curve = front(reference)
    if len(curve) < 2:
        is_equal = [own.error for own in curve] == [point.error]
        return Ratio(point.bits / curve[0].bits, False) if is_equal else None
    is_outside = not curve[0].error <= point.error <= curve[-1].error
    pairs = [*itertools.pairwise(curve)]
    low, high = next((pair for pair in pairs if point.error <= pair[1].error), pairs[-1])
    slope = math.log(high.bits / low.bits) / math.log(high.error / low.error)
    bits = low.bits * (point.error / low.error) ** slope
    return Ratio(point.bits / bits, is_outside)


def bd_rate(points: Sequence[Point], reference: Sequence[Point]) -> float | None:
    """Mean change of the bits at equal PSNR, a share: -0.1 is 10 % fewer (Bjøntegaard, VCEG-M33).

    Of both fronts, log bits are interpolated over PSNR by piecewise cubic Hermite polynomials
    (PCHIP), which do not overshoot, and the difference is averaged over the PSNRs that both have.
    None where these are no interval.
    """
    curves = [front(points), front(reference)]
    if min(map(len, curves)) < 2:
        return None
    levels = [np.array([-20 * math.log10(own.error) for own in curve])[::-1] for curve in curves]
    low, high = max(own[0] for own in levels), min(own[-1] for own in levels)
    if low >= high:
        return None
    integrals = []
    for psnr, curve in zip(levels, curves, strict=True):
        log_bits = np.log([own.bits for own in reversed(curve)])
        integrals.append(float(PchipInterpolator(psnr, log_bits).integrate(low, high)))
    return math.expm1((integrals[0] - integrals[1]) / (high - low))
