"""The error bound of Xue et al. as a function of the nodes, its exact gradient, and its minimum.

A multistep solver in the data form adds `sigma_N sum_j w_{n,j} x0_{n-j}` to the result at step n, with
`w_{n,j} = int_{lam_n}^{lam_{n+1}} e^lam l_{n,j}(lam) dlam`, l_{n,j} the Lagrange polynomials of the last k_n nodes.
If the model output at node i has an error of at most eta e_i, the result has an error of at most a constant plus
sigma_N eta J:

    J(lam_1 .. lam_{N-1}) = sum_i e_i | sum of the w_{n,j} that multiply output i |,    e_i = s_i^p / a_i

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
    """The order k_n of every step: `min(order, n + 1, N - n)`, without N - n if not `lower_order_final`."""
    return [min(order, n + 1, N - n if lower_order_final else order) for n in range(N)]


class _Weights(NamedTuple):
    """Steps of one order k: node indices (m, k) newest first, w (m, k), and dw / d(those nodes, lam_{n+1})."""

    nodes: Array
    ends: Array
    w: Array
    dw: Array


class ErrorBound:
    """J and its exact gradient, in closed form: polynomial moments of e^lam and d l_j / d lam_i = -l_j'(lam_i) l_i.

    As in the authors' code, steps of order 1 enter as separate absolute values, outside the sums over a node, and so do
    steps of index below `trunc`, each as the root of the sum of squares of its weighted terms.

    Args:
        k: the order of every step (N,).
        p: 1 for pixels, 2 for latents.
        trunc: see above.
    """

    def __init__(self, k: Sequence[int], p: float = 1.0, trunc: int = 0) -> None:
        self.k, self.p, self.N = np.asarray(k), p, len(k)
        self.groups = [np.flatnonzero(self.k == order) for order in sorted(set(k))]
        self.trunc = trunc

    def weights(self, lam: Array) -> list[_Weights]:
        """The weights of all steps, one entry per order. lam: (N + 1,), increasing."""
        e, groups = np.exp(lam), []
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
            groups.append(_Weights(nodes, n + 1, w, dw))
        return groups

    def terms(self, lam: Array) -> _Terms:
        """The smooth terms of J and the sums inside the absolute values."""
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
                ratio = E * W / root[:, None]
                np.add.at(gradient, nodes[own], ratio * W * de[nodes[own]])
                np.add.at(gradient, columns[own], np.einsum("nj,njc->nc", ratio * E, dw[own]))
        return _Terms(smooth, gradient, sums, dsums, e, de)

    def __call__(self, lam: Array) -> tuple[float, Array]:
        """J and dJ / dlam (N + 1,)."""
        smooth, gradient, sums, dsums, e, de = self.terms(lam)
        gradient = gradient + (e * np.sign(sums)) @ dsums
        gradient[: self.N] += de * np.abs(sums)
        return float(smooth + e @ np.abs(sums)), gradient


class _Terms(NamedTuple):
    """J = smooth + e |sums|; `gradient` of smooth, `dsums` of sums and `de` of e, by lam."""

    smooth: float
    gradient: Array
    sums: Array
    dsums: Array
    e: Array
    de: Array


def exponential_moments(h: Array, k: int) -> Array:
    """`int_0^h e^x x^m dx`, m = 0 .. k - 1: by parts, or by the series where that cancels. h (n,) -> (n, k)."""
    columns = [np.expm1(h)]
    for m in range(1, k):
        columns.append(h**m * np.exp(h) - m * columns[-1])
    M = np.stack(columns, 1)
    small = h < 1
    if small.any():
        j = np.arange(len(SERIES))
        for m in range(1, k):
            M[small, m] = (h[small][:, None] ** (m + 1 + j) / ((m + 1 + j) * SERIES)).sum(1)
    return M


@dataclass(frozen=True)
class Gaps:
    """Nodes from N - 1 parameters d: the gaps are a softmax whose logits differ by d_n from one to the next.

    A bound on |d| bounds the ratio of neighbouring gaps.

    Args:
        first, last: the ends in lam.
    """

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
    def params(lam: Array) -> Array:
        """The d of these nodes."""
        return np.diff(np.log(np.diff(lam)))


def minimise(
    bound: ErrorBound, first: float, last: float, starts: Sequence[Array], growth: float
) -> tuple[float, Array]:
    """Minimise J over the nodes between `first` and `last`.

    Every start is improved by L-BFGS, which the kinks of the absolute values stop early; the best three are then
    polished by SLSQP with each absolute value b_i as a variable and constraints b_i >= |sum_i|.

    Args:
        bound: J.
        first, last: the ends in lam.
        starts: nodes (N + 1,) to start from.
        growth: the largest ratio of neighbouring gaps, > 1.

    Returns:
        The smallest J and its nodes (N + 1,).
    """
    gaps, limit = Gaps(first, last), math.log(growth)
    if bound.N == 1:
        lam = np.array([first, last])
        return bound(lam)[0], lam
    candidates = []
    for start in starts:
        d = _descend(bound, gaps, np.clip(Gaps.params(start), -limit, limit), limit)
        candidates.append((bound(gaps(d)[0])[0], d))
    candidates.sort(key=lambda pair: pair[0])
    for _, d in candidates[:3]:
        d = _polish(bound, gaps, d, limit)
        candidates.append((bound(gaps(d)[0])[0], d))
    value, d = min(candidates, key=lambda pair: pair[0])
    return value, gaps(d)[0]


def _descend(bound: ErrorBound, gaps: Gaps, d: Array, limit: float) -> Array:
    """L-BFGS on log J."""
    from scipy.optimize import minimize

    def log_J(d: Array) -> tuple[float, Array]:
        lam, by_d = gaps(d)
        value, gradient = bound(lam)
        return math.log(value), gradient @ by_d / value

    box, options = [(-limit, limit)] * len(d), {"maxiter": 40, "maxcor": 15}
    return minimize(log_J, d, jac=True, method="L-BFGS-B", bounds=box, options=options).x


def _polish(bound: ErrorBound, gaps: Gaps, d: Array, limit: float) -> Array:
    """SLSQP with the absolute values as variables."""
    from scipy.optimize import minimize

    n, N = len(d), bound.N
    start = bound.terms(gaps(d)[0])
    scale = start.smooth + start.e @ np.abs(start.sums)
    unit = np.maximum(np.abs(start.sums), 1e-3 * np.abs(start.sums).max() + 1e-300)  # of each b_i
    seen: dict[bytes, tuple[Array, _Terms]] = {}

    def at(z: Array) -> tuple[Array, _Terms]:
        key = z[:n].tobytes()
        if key not in seen:
            lam, by_d = gaps(z[:n])
            seen.clear()
            seen[key] = by_d, bound.terms(lam)
        return seen[key]

    def objective(z: Array) -> tuple[float, Array]:
        by_d, terms = at(z)
        b = z[n:] * unit
        gradient = terms.gradient.copy()
        gradient[:N] += terms.de * b
        return float(terms.smooth + terms.e @ b) / scale, np.concatenate([gradient @ by_d, terms.e * unit]) / scale

    def slack(z: Array) -> Array:
        sums = at(z)[1].sums / unit
        return np.concatenate([z[n:] - sums, z[n:] + sums])

    def slack_jacobian(z: Array) -> Array:
        by_d, terms = at(z)
        D, one = (terms.dsums @ by_d) / unit[:, None], np.eye(N)
        return np.block([[-D, one], [D, one]])

    constraint: dict[str, Any] = {"type": "ineq", "fun": slack, "jac": slack_jacobian}
    box: list[tuple[float, float | None]] = [(-limit, limit)] * n + [(0.0, None)] * N
    z = minimize(
        objective,
        np.concatenate([d, np.abs(start.sums) / unit]),
        jac=True,
        method="SLSQP",
        bounds=box,
        constraints=constraint,
        options={"maxiter": 100, "ftol": 1e-13},
    ).x
    return np.clip(z[:n], -limit, limit)
