/* Put in front of a test source: its table of cases is the one of cases.h. */
#ifndef EPD_TESTS_GPU_BACKEND_CASES_REPLACE_H
#define EPD_TESTS_GPU_BACKEND_CASES_REPLACE_H

#include "tests/gpu/backend/cases.h"

#define op_cases      cuda_cases()
#define op_case_named cuda_case_named

#endif
