"""The layer in float64, written from its definition and without looking at epd: the oracle of these tests."""

from __future__ import annotations

import dataclasses

import numpy as np


def gate(kind: str, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f(g) and f'(g)."""
    if kind == "swiglu":
        s = 1 / (1 + np.exp(-g))
        return g * s, s + g * s * (1 - s)
    if kind == "relu2":
        return np.maximum(g, 0) ** 2, 2 * np.maximum(g, 0)
    c = np.sqrt(2 / np.pi)
    t = np.tanh(c * (g + 0.044715 * g**3))
    return 0.5 * g * (1 + t), 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * c * (1 + 3 * 0.044715 * g * g)


@dataclasses.dataclass
class Slots:
    """What one rank receives of a dispatch."""

    m_splits: np.ndarray
    offsets: np.ndarray
    source: list  # per row (rank, token, k), None for padding


def slots_of(topk_idx: list[np.ndarray], rank: int, n_local: int, alignment: int) -> Slots:
    """Rows by expert, then source rank, then token; every expert's first row a multiple of alignment."""
    splits, offsets, source = [], [0], []
    for expert in range(rank * n_local, (rank + 1) * n_local):
        rows = [(r, int(t), int(k)) for r, idx in enumerate(topk_idx) for t, k in np.argwhere(idx == expert)]
        splits.append(len(rows))
        padding = -len(rows) % alignment
        source += rows + [None] * padding
        offsets.append(offsets[-1] + len(rows) + padding)
    return Slots(np.array(splits), np.array(offsets), source)


@dataclasses.dataclass
class Layer:
    """Weights of all experts, [E, ...]; biases may be None."""

    kind: str
    w1: np.ndarray
    b1: np.ndarray | None
    w2: np.ndarray
    b2: np.ndarray | None

    def expert(self, e: int, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """y, act, f(gate), f'(gate), up of the rows x."""
        preact = x @ self.w1[e].T + (0 if self.b1 is None else self.b1[e])
        g, up = np.split(preact, 2, axis=1)
        f, slope = gate(self.kind, g)
        act = f * up
        return act @ self.w2[e].T + (0 if self.b2 is None else self.b2[e]), act, f, slope, up

    def forward(self, x: np.ndarray, idx: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """out [T, H] of one rank's tokens."""
        out = np.zeros_like(x)
        for e in range(len(self.w1)):
            t, k = np.nonzero(idx == e)
            np.add.at(out, t, weights[t, k, None] * self.expert(e, x[t])[0])
        return out

    def backward(self, x: np.ndarray, idx: np.ndarray, weights: np.ndarray, dout: np.ndarray) -> dict[str, np.ndarray]:
        """dx, d_weights and this rank's part of the weights' gradients, [E, ...]."""
        grads = {"dx": np.zeros_like(x), "d_weights": np.zeros_like(weights)}
        grads |= {"dw1": np.zeros_like(self.w1), "db1": np.zeros(self.w1.shape[:2])}
        grads |= {"dw2": np.zeros_like(self.w2), "db2": np.zeros(self.w2.shape[:2])}
        for e in range(len(self.w1)):
            t, k = np.nonzero(idx == e)
            y, act, f, slope, up = self.expert(e, x[t])
            grads["d_weights"][t, k] = (dout[t] * y).sum(axis=1)
            dy = weights[t, k, None] * dout[t]
            d_act = dy @ self.w2[e]
            d_preact = np.concatenate([d_act * up * slope, d_act * f], axis=1)
            grads["dw2"][e], grads["db2"][e] = dy.T @ act, dy.sum(axis=0)
            grads["dw1"][e], grads["db1"][e] = d_preact.T @ x[t], d_preact.sum(axis=0)
            np.add.at(grads["dx"], t, d_preact @ self.w1[e])
        return grads
