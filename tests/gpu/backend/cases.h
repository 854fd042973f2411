/* The table of op cases as the CUDA backend runs it: f32 rows in bf16, sizes rounded up to what its kernels
 * take. Test sources that are written for the whole table are compiled with these names in the place of the
 * table's. */
#ifndef EPD_TESTS_GPU_BACKEND_CASES_H
#define EPD_TESTS_GPU_BACKEND_CASES_H

#include "tests/reference/op_cases.h"

/* Once, before the table is used. */
void cuda_cases_make(void);

const struct op_case *cuda_cases(void);
const struct op_case *cuda_case_named(const char *name);

#endif
