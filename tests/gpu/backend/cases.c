#include "tests/gpu/backend/cases.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define MAX_CASES 128

static struct op_case cases[MAX_CASES];

static uint32_t rounded_up(uint32_t n)
{
    return (n + 7) / 8 * 8;
}

void cuda_cases_make(void)
{
    assert(n_op_cases <= MAX_CASES);
    for (size_t i = 0; i < n_op_cases; i++) {
        cases[i] = op_cases[i];
        if (cases[i].dtype == EPD_F32)
            cases[i].dtype = EPD_BF16;
        cases[i].hidden = rounded_up(cases[i].hidden);
        cases[i].ffn = rounded_up(cases[i].ffn);
    }
}

const struct op_case *cuda_cases(void)
{
    return cases;
}

const struct op_case *cuda_case_named(const char *name)
{
    return &cases[op_case_named(name) - op_cases];
}
