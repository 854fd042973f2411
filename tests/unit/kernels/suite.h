/* Runs the tests of one executable: one suite, one case, the CBLAS library single-threaded as in the daemon.
 */
#ifndef EPD_TESTS_UNIT_KERNELS_SUITE_H
#define EPD_TESTS_UNIT_KERNELS_SUITE_H

#include <check.h>
#include <stddef.h>

/* Repeats of a kernel whose bits must stay the same. */
#define SUITE_REPEATS 5

/* The exit status of main. */
int suite_run(const char *name, const TTest *const *tests, size_t n_tests);

#endif
