/* Numbers of the tests: typed memory to and from double, random inputs, poison, comparison with a tolerance.
 * Conversions are written from the definition of the formats (frexp, ldexp, rint) and share nothing with the
 * kernels. Memory comes zeroed from values_alloc and goes by free(); running out of it ends the test program.
 */
#ifndef EPD_TESTS_REFERENCE_VALUES_H
#define EPD_TESTS_REFERENCE_VALUES_H

#include <stddef.h>
#include <stdint.h>

#include "proto/words.h"
#include "tests/reference/tolerance.h"

/* n zeroed elements; never NULL, also for n = 0. */
void *values_alloc(size_t n, size_t element_bytes);
double *values_alloc_doubles(size_t n);

/* The value nearest to `value` that dtype can hold; ties to even. f16 overflows to infinity. */
double values_round(enum epd_dtype dtype, double value);
/* dst[i] = src[i] rounded to dtype. */
void values_encode(enum epd_dtype dtype, void *dst, const double *src, size_t n);
void values_decode(enum epd_dtype dtype, double *dst, const void *src, size_t n);
/* A fresh array of doubles. */
double *values_decoded(enum epd_dtype dtype, const void *src, size_t n);

/* Next 64 random bits of a seeded sequence (splitmix64), and a uniform number in [low, high). */
uint64_t values_random(uint64_t *seed);
double values_uniform(uint64_t *seed, double low, double high);
/* Typed uniform values in [low, high). */
void values_fill(enum epd_dtype dtype, void *dst, size_t n, double low, double high, uint64_t *seed);

/* Poison is bytes 0xff: a NaN in every float dtype, -1 in every integer. */
void values_poison(void *memory, size_t n_bytes);
/* 1 if every byte still is poison. */
int values_poisoned(const void *memory, size_t n_bytes);

#define VALUES_TEXT_BYTES 160

/* 1 if |got[i] - want[i]| <= atol + rtol |want[i]| for all i; else 0 and a text that names the first i that
 * is off. A NaN never matches. */
int values_match(enum epd_dtype dtype, const void *got, const double *want, size_t n,
                 struct tolerance tolerance, char text[VALUES_TEXT_BYTES]);

#endif
