"""Test data: rounded to the dtype under test, so that the reference sees the same numbers, and how near results must be."""

from __future__ import annotations

import epd
import numpy as np

POISON = float("nan")  # what outputs hold before a launch, where the dtype can

# Relative to the value, and to the root mean square of all values for a chain of rounded operations.
TOLERANCE = {"f32": (1.3e-6, 1e-5), "f16": (1e-3, 2**-7), "bf16": (1.6e-2, 2**-4)}


def store(array: np.ndarray, values: np.ndarray) -> None:
    """Writes values into an array of any dtype of epd."""
    array[...] = epd.to_bf16(values) if array.dtype == np.uint16 else values


def load(array: np.ndarray) -> np.ndarray:
    """The values of an array of any dtype of epd, as float64."""
    return (epd.from_bf16(array) if array.dtype == np.uint16 else array).astype(np.float64)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """The values as the dtype holds them, float64."""
    if dtype == "bf16":
        return epd.from_bf16(epd.to_bf16(values)).astype(np.float64)
    return values.astype({"f32": np.float32, "f16": np.float16}[dtype]).astype(np.float64)


def given(group: epd.Group, values: np.ndarray, dtype: str) -> np.ndarray:
    """An input: an array of the group with the values."""
    array = group.alloc(values.shape, dtype)
    store(array, values)
    return array


def poisoned(group: epd.Group, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An output: NaN everywhere, -7 for integers."""
    array = group.alloc(shape, dtype)
    if dtype in ("i32", "i64"):
        array[...] = -7
    else:
        store(array, np.full(shape, POISON, np.float32))
    return array


def assert_near(got: np.ndarray, want: np.ndarray, dtype: str, what: str = "") -> None:
    """got, as an array of epd, against want in float64."""
    relative, of_rms = TOLERANCE[dtype]
    rms = float(np.sqrt(np.mean(want**2))) if want.size else 0.0
    np.testing.assert_allclose(load(got), want, rtol=relative, atol=1e-5 + of_rms * rms, err_msg=what)


def routing(rng: np.random.Generator, n_tokens: int, n_experts: int, top_k: int, holes: float = 0.2) -> np.ndarray:
    """[T, K]: different experts in every token, some places not routed."""
    idx = np.stack([rng.permutation(n_experts)[:top_k] for _ in range(n_tokens)]) if n_tokens else np.zeros((0, top_k), int)
    return np.where(rng.random(idx.shape) < holes, -1, idx)
