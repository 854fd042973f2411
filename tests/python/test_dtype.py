"""bf16 conversions and the dtypes that are taken."""

from __future__ import annotations

import epd
import numpy as np
import pytest
from epd.dtype import dtype_of
from ranks import in_group


def test_bf16_rounds_to_nearest_even_and_keeps_nan_and_infinity():
    step = np.float32(2**-7)  # of bf16 between 1 and 2
    values = np.array([1, 1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -1 - step / 2, 0.0, -0.0], np.float32)
    want = np.array([1, 1, 1 + 2 * step, 1 + step, -1, 0.0, -0.0], np.float32)
    got = epd.from_bf16(epd.to_bf16(values))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))
    special = epd.from_bf16(epd.to_bf16([np.nan, -np.nan, np.inf, -np.inf, 3.4e38]))
    assert np.isnan(special[:2]).all() and special[2] == np.inf and special[3] == -np.inf and special[4] == np.inf
    odd_nan = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(epd.from_bf16(epd.to_bf16(odd_nan))).all()


def test_bf16_of_every_bit_pattern_is_itself():
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    values = epd.from_bf16(bits)
    same = epd.to_bf16(values)
    assert (same[~np.isnan(values)] == bits[~np.isnan(values)]).all()


def test_shapes_are_kept():
    assert epd.to_bf16(np.zeros((2, 3))).shape == (2, 3)
    assert epd.from_bf16(np.zeros((0, 3), np.uint16)).shape == (0, 3)
    assert epd.to_bf16(1.5).shape == ()


@pytest.mark.parametrize(
    ("given", "want"),
    [("bf16", 2), (np.uint16, 2), (np.float32, 1), ("float16", 3), (np.dtype("int64"), 5), (epd.DType.I32, 4)],
)
def test_dtype_is_taken_as_word_member_or_numpy_dtype(given, want):
    assert dtype_of(given, "x") == want


@pytest.mark.parametrize("given", [np.float64, "complex64", ">f4", "bogus", np.uint8])
def test_other_dtypes_are_refused_with_what_is_allowed(given):
    with pytest.raises(epd.InvalidDtype, match="alloc: dtype .* want"):
        dtype_of(given, "alloc")


def test_arrays_of_ml_dtypes_are_bf16(socket):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.array([1.5, -2.25, 3.1415926], np.float32)
    assert dtype_of(ml_dtypes.bfloat16, "x") is epd.DType.BF16
    assert (epd.to_bf16(values) == values.astype(ml_dtypes.bfloat16).view(np.uint16)).all()
    assert (epd.from_bf16(values.astype(ml_dtypes.bfloat16)) == values.astype(ml_dtypes.bfloat16).astype(np.float32)).all()

    def body(group):
        a, b, c = (group.alloc(shape, ml_dtypes.bfloat16).view(ml_dtypes.bfloat16) for shape in ((2, 4), (1, 3, 4), (2, 3)))
        a[...], b[...] = 1.5, 2
        m_splits = group.alloc(1, "i64")
        m_splits[...] = 2
        group.grouped_gemm("TN", a=a, b=b, c=c, m_splits=m_splits)()
        assert (c == 12).all()

    in_group(socket, 1, body)
