/* The engines behind plain C functions that a script can call: tests/gpu/gemm/bench_peers.py times them beside other
 * libraries in one process. Handles are plans; texts of errors stay in static memory. */
#include <stdlib.h>
#include <string.h>

#include "kernels/gemm/engine.h"

#define EXPORT __attribute__((visibility("default")))

struct bench_plan {
    const struct gemm_engine *engine;
    struct gemm_engine_plan *plan;
    struct gemm_problem problem;
};

EXPORT const char *gemm_bench_error(void);
EXPORT struct bench_plan *gemm_bench_create(const char *engine, int layout, int dtype_c, int accumulate,
                                            uint32_t groups, int64_t rows, uint32_t n, uint32_t k,
                                            int activation, int keep);
EXPORT int gemm_bench_launch(struct bench_plan *bench, const int64_t *m_splits, const void *a, const void *b,
                             void *c, void *act, void *stream);
EXPORT void gemm_bench_destroy(struct bench_plan *bench);

static struct epd_error last_error;

const char *gemm_bench_error(void)
{
    return last_error.text;
}

struct bench_plan *gemm_bench_create(const char *engine, int layout, int dtype_c, int accumulate,
                                     uint32_t groups, int64_t rows, uint32_t n, uint32_t k, int activation,
                                     int keep)
{
    struct bench_plan *bench = calloc(1, sizeof(*bench));
    if (!bench)
        return NULL;
    bench->problem = (struct gemm_problem){
        .shape = {.layout = (enum epd_gemm_layout)layout,
                  .dtype = EPD_BF16,
                  .dtype_c = (enum epd_dtype)dtype_c,
                  .n = n,
                  .k = k,
                  .accumulate = accumulate},
        .n_groups = groups,
        .max_rows = rows,
        .activation = (enum epd_activation)activation,
        .keep_preact = keep,
    };
    for (int i = 0; gemm_engines[i] && !bench->engine; i++)
        if (strcmp(gemm_engines[i]->name, engine) == 0)
            bench->engine = gemm_engines[i];
    if (!bench->engine || bench->engine->create(&bench->problem, 0, &bench->plan, &last_error) != EPD_OK) {
        free(bench);
        return NULL;
    }
    return bench;
}

int gemm_bench_launch(struct bench_plan *bench, const int64_t *m_splits, const void *a, const void *b,
                      void *c, void *act, void *stream)
{
    struct gemm_launch launch = {
        .args = {.shape = bench->problem.shape,
                 .groups = {.n_groups = bench->problem.n_groups,
                            .m_splits = m_splits,
                            .max_rows = bench->problem.max_rows},
                 .a = a,
                 .b = b,
                 .c = c},
        .act = act,
    };
    return bench->engine->launch(bench->plan, &launch, stream, &last_error);
}

void gemm_bench_destroy(struct bench_plan *bench)
{
    bench->engine->destroy(bench->plan);
    free(bench);
}
