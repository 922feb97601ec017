"""The error bound of Xue et al. as a function of the nodes, its exact gradient, and its minimum.

A multistep solver in the data form adds `sigma_N sum_j w_{n,j} x0_{n-j}` to the result at step n, with
`w_{n,j} = int_{lam_n}^{lam_{n+1}} e^lam l_{n,j}(lam) dlam`, l_{n,j} the Lagrange polynomials of the last k_n nodes.
If the answer at node i is wrong by at most eta e_i, the result is wrong by at most a constant plus sigma_N eta J:

    J(lam_1 .. lam_{N-1}) = sum_i e_i | sum of the w_{n,j} that multiply answer i |,    e_i = s_i^p / a_i

in variance-preserving units, s = 1/sqrt(1 + e^{2 lam}), a = 1/sqrt(1 + e^{-2 lam}). Xue, Liu, Chen, Zhang, Hu, Xie, Li
2024, arXiv:2402.17376.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["ErrorBound", "Gaps", "minimise", "orders"]

Array = np.ndarray
SERIES = np.array([float(math.factorial(j)) for j in range(20)])


def orders(N: int, order: int, lower_order_final: bool = True) -> list[int]:
    """k_n of every step: `min(order, n + 1, N - n)`, without the last where the order does not fall at the end."""
    return [min(order, n + 1, N - n if lower_order_final else order) for n in range(N)]


class _Weights(NamedTuple):
    """Of the steps of one order k: node numbers (m, k) newest first, w (m, k), and dw / d(those nodes, lam_{n+1})."""

    nodes: Array
    ends: Array
    w: Array
    dw: Array


class ErrorBound:
    """J and its exact gradient, in closed form: polynomial moments of e^lam and d l_j / d lam_i = -l_j'(lam_i) l_i.

    As in the authors' code: steps of order 1 enter as absolute values of their own, outside the sums over a node, and
    so do steps of index below `trunc`, each as the root of the sum of squares of its weighted terms.

    Args:
        k: the order of every step (N,). p: 1 for pixels, 2 for latents. trunc: see above.
    """

    def __init__(self, k: Sequence[int], p: float = 1.0, trunc: int = 0) -> None:
        self.k, self.p, self.N = np.asarray(k), p, len(k)
        self.groups = [np.flatnonzero(self.k == order) for order in sorted(set(k))]
        self.trunc = trunc

    def weights(self, lam: Array) -> list[_Weights]:
        """Of all steps, one entry an order. lam: (N + 1,), increasing."""
        e, found = np.exp(lam), []
        for n in self.groups:
            k = int(self.k[n[0]])
            nodes = n[:, None] - np.arange(k)
            powers = np.arange(k)
            d, h = lam[nodes] - lam[n][:, None], lam[n + 1] - lam[n]
            V = d[:, :, None] ** powers
            C = np.linalg.inv(V)  # l_j(lam_n + x) = sum_m C[m, j] x^m
            w = e[n][:, None] * np.einsum("nm,nmj->nj", exponential_moments(h, k), C)
            slopes = np.zeros_like(V)
            slopes[:, :, 1:] = powers[1:] * V[:, :, :-1]
            dw = np.zeros((len(n), k, k + 1))
            dw[:, :, :k] = -np.einsum("nim,nmj->nji", slopes, C) * w[:, None, :]
            dw[:, 0, 0] -= e[n]
            dw[:, :, k] = e[n + 1][:, None] * np.einsum("nm,nmj->nj", h[:, None] ** powers, C)
            found.append(_Weights(nodes, n + 1, w, dw))
        return found

    def parts(self, lam: Array) -> _Parts:
        """J in its smooth part and the sums that an absolute value is taken of."""
        N, p = self.N, self.p
        s = 1 / np.sqrt(1 + np.exp(2 * lam[:N]))
        a = s * np.exp(lam[:N])
        e = s**p / a
        de = -e * (p * a * a + s * s)
        smooth, gradient = 0.0, np.zeros(N + 1)
        sums, dsums = np.zeros(N), np.zeros((N, N + 1))
        for nodes, ends, w, dw in self.weights(lam):
            columns = np.concatenate([nodes, ends[:, None]], 1)
            near = (nodes[:, 0] >= self.trunc) & (nodes.shape[1] > 1)
            if near.any():
                np.add.at(sums, nodes[near], w[near])
                np.add.at(dsums, (nodes[near][:, :, None], columns[near][:, None, :]), dw[near])
            if not near.all():
                own, E, W = ~near, e[nodes[~near]], w[~near]
                root = np.sqrt(np.square(E * W).sum(1))
                smooth += root.sum()
                share = E * W / root[:, None]
                np.add.at(gradient, nodes[own], share * W * de[nodes[own]])
                np.add.at(gradient, columns[own], np.einsum("nj,njc->nc", share * E, dw[own]))
        return _Parts(smooth, gradient, sums, dsums, e, de)

    def __call__(self, lam: Array) -> tuple[float, Array]:
        """J and dJ / dlam (N + 1,)."""
        smooth, gradient, sums, dsums, e, de = self.parts(lam)
        gradient = gradient + (e * np.sign(sums)) @ dsums
        gradient[: self.N] += de * np.abs(sums)
        return float(smooth + e @ np.abs(sums)), gradient


class _Parts(NamedTuple):
    smooth: float
    gradient: Array
    sums: Array
    dsums: Array
    e: Array
    de: Array


def exponential_moments(h: Array, k: int) -> Array:
    """`int_0^h e^x x^m dx`, m = 0 .. k - 1: by parts, and where that cancels the series. h (n,) -> (n, k)."""
    found = [np.expm1(h)]
    for m in range(1, k):
        found.append(h**m * np.exp(h) - m * found[-1])
    M = np.stack(found, 1)
    small = h < 1
    if small.any():
        j = np.arange(len(SERIES))
        for m in range(1, k):
            M[small, m] = (h[small][:, None] ** (m + 1 + j) / ((m + 1 + j) * SERIES)).sum(1)
    return M


@dataclass(frozen=True)
class Gaps:
    """Nodes from N - 1 numbers: the gaps are a softmax whose logits differ by d_n from one to the next, so that a bound
    on |d| bounds the ratio of neighbouring gaps."""

    first: float
    last: float

    def __call__(self, d: Array) -> tuple[Array, Array]:
        """lam (N + 1,) and dlam / dd (N + 1, N - 1)."""
        u = np.concatenate([[0.0], np.cumsum(d)])
        f = np.exp(u - u.max())
        f /= f.sum()
        c, width, N = np.cumsum(f), self.last - self.first, len(f)
        lam = np.concatenate([[self.first], self.first + width * c])
        lam[-1] = self.last
        by_logit = width * f * (np.tril(np.ones((N, N))) - c[:, None])
        by_d = np.cumsum(by_logit[:, ::-1], 1)[:, ::-1][:, 1:]
        return lam, np.concatenate([np.zeros((1, N - 1)), by_d])

    @staticmethod
    def numbers(lam: Array) -> Array:
        """The d that give these nodes."""
        return np.diff(np.log(np.diff(lam)))


def minimise(
    bound: ErrorBound, first: float, last: float, starts: Sequence[Array], growth: float
) -> tuple[float, Array]:
    """The least J found and its nodes (N + 1,), from `first` to `last`.

    Every start (N + 1,) is improved by L-BFGS, which the kinks of the absolute values stop early; the best three are
    then finished by sequential quadratic programming on the same problem without kinks: minimise `smooth + sum e_i b_i`
    under `-b_i <= sum_i <= b_i`. Neighbouring gaps differ by a factor of at most `growth`.
    """
    gaps, limit = Gaps(first, last), math.log(growth)
    if bound.N == 1:
        lam = np.array([first, last])
        return bound(lam)[0], lam
    found = []
    for start in starts:
        d = _descend(bound, gaps, np.clip(Gaps.numbers(start), -limit, limit), limit)
        found.append((bound(gaps(d)[0])[0], d))
    found.sort(key=lambda pair: pair[0])
    for _, d in found[:3]:
        d = _polish(bound, gaps, d, limit)
        found.append((bound(gaps(d)[0])[0], d))
    value, d = min(found, key=lambda pair: pair[0])
    return value, gaps(d)[0]


def _descend(bound: ErrorBound, gaps: Gaps, d: Array, limit: float) -> Array:
    from scipy.optimize import minimize

    def log_J(d: Array) -> tuple[float, Array]:
        lam, by_d = gaps(d)
        value, gradient = bound(lam)
        return math.log(value), gradient @ by_d / value

    box, options = [(-limit, limit)] * len(d), {"maxiter": 40, "maxcor": 15}
    return minimize(log_J, d, jac=True, method="L-BFGS-B", bounds=box, options=options).x


def _polish(bound: ErrorBound, gaps: Gaps, d: Array, limit: float) -> Array:
    from scipy.optimize import minimize

    n, N = len(d), bound.N
    begin = bound.parts(gaps(d)[0])
    scale = begin.smooth + begin.e @ np.abs(begin.sums)
    unit = np.maximum(np.abs(begin.sums), 1e-3 * np.abs(begin.sums).max() + 1e-300)  # of each b_i
    seen: dict[bytes, tuple[Array, _Parts]] = {}

    def at(z: Array) -> tuple[Array, _Parts]:
        key = z[:n].tobytes()
        if key not in seen:
            lam, by_d = gaps(z[:n])
            seen.clear()
            seen[key] = by_d, bound.parts(lam)
        return seen[key]

    def objective(z: Array) -> tuple[float, Array]:
        by_d, part = at(z)
        b = z[n:] * unit
        gradient = part.gradient.copy()
        gradient[:N] += part.de * b
        return float(part.smooth + part.e @ b) / scale, np.concatenate([gradient @ by_d, part.e * unit]) / scale

    def room(z: Array) -> Array:
        sums = at(z)[1].sums / unit
        return np.concatenate([z[n:] - sums, z[n:] + sums])

    def room_slope(z: Array) -> Array:
        by_d, part = at(z)
        D, one = (part.dsums @ by_d) / unit[:, None], np.eye(N)
        return np.block([[-D, one], [D, one]])

    constraint: dict[str, Any] = {"type": "ineq", "fun": room, "jac": room_slope}
    box: list[tuple[float, float | None]] = [(-limit, limit)] * n + [(0.0, None)] * N
    z = minimize(
        objective, np.concatenate([d, np.abs(begin.sums) / unit]), jac=True, method="SLSQP", bounds=box,
        constraints=constraint, options={"maxiter": 100, "ftol": 1e-13},
    ).x  # fmt: skip
    return np.clip(z[:n], -limit, limit)
