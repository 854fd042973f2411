/* How far a result may be from the float64 reference: the one place of tolerances. A result passes if
 * |got - want| <= atol + rtol |want|. */
#ifndef EPD_TESTS_REFERENCE_TOLERANCE_H
#define EPD_TESTS_REFERENCE_TOLERANCE_H

#include <stddef.h>

#include "proto/words.h"

struct tolerance {
    double rtol, atol;
};

/* One rounding to dtype after a few fp32 operations: bf16 1.6e-2 / 1e-5, f16 1e-3 / 1e-5, f32 1.3e-6 / 1e-5.
 */
struct tolerance tolerance_of(enum epd_dtype dtype);

/* The result is an fp32 sum of n_terms terms of typical size `magnitude` (root mean square), rounded to
 * dtype. After i terms of random sign the partial sum is about magnitude sqrt(i), and every addition loses up
 * to half a unit (2^-24) of it at random: sqrt(sum i) = n / sqrt(2), so the error is about 0.7 n 2^-24
 * magnitude (one deviation), while the result itself may cancel to nothing and rtol gives no room. atol grows
 * by n 2^-22 magnitude: six deviations for a sum in a row, far more for blocked sums. (The bound that never
 * fails, n^2 2^-24 magnitude, would hide real errors.) */
struct tolerance tolerance_sum(enum epd_dtype dtype, size_t n_terms, double magnitude);

/* The end of a chain that stores intermediates in dtype (a whole layer, forward or backward): every stored
 * intermediate adds a relative error of up to 2^-p (p = 8 bits of significand for bf16, 11 for f16), and sums
 * over it keep that ratio to the size of the result as a whole, not of one element. So atol is a fraction of
 * the root mean square of the n wanted values. Gated activations are products and have long tails: over the
 * table the largest deviation is 0.060 (bf16), 0.0067 (f16) and 5e-6 (f32) of the root mean square; allowed
 * are 16 * 2^-p and, for f32 whose error comes from the order of the sums, 1e-5. Compare tensors of one
 * scale: one expert's gradient at a time. */
struct tolerance tolerance_chain(enum epd_dtype dtype, const double *want, size_t n);

#endif
