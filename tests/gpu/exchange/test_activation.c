/* activation and activation_bwd against float64, with slabs that have padding, empty groups, in-place outputs
 * and splits that do not fit. */
#include <math.h>
#include <string.h>

#include "tests/gpu/exchange/reference.h"
#include "tests/gpu/exchange/test.h"

enum { GROUPS = 5, ROWS = 160, HIDDEN = 136 };
static const int64_t splits[GROUPS] = {31, 0, 33, 1, 40}, offsets[GROUPS + 1] = {0, 32, 32, 80, 96, 144};

static double sigmoid_of(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

static double gate_of(enum epd_activation kind, double g, double *slope)
{
    double s;
    switch (kind) {
    case EPD_RELU2:
        *slope = g > 0 ? 2 * g : 0;
        return g > 0 ? g * g : 0;
    case EPD_GEGLU:
        s = sigmoid_of(2 * sqrt(2 / M_PI) * (g + 0.044715 * g * g * g));
        *slope = s + g * s * (1 - s) * 2 * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * g * g);
        return g * s;
    default:
        s = sigmoid_of(g);
        *slope = s + g * s * (1 - s);
        return g * s;
    }
}

struct buffers {
    void *preact, *act, *d_act, *dy, *bias; /* host */
    void *d_preact_gpu, *act_gpu, *d_act_gpu, *dy_gpu, *bias_gpu;
    float weights[ROWS], *weights_gpu, *dots_gpu;
    int64_t *splits_gpu, *offsets_gpu;
    struct kernel_error *error_gpu;
};

static void *random_buffer(size_t n, enum epd_dtype dtype, void **gpu)
{
    char *host = malloc(n * dtype_bytes(dtype));
    for (size_t i = 0; i < n; i++)
        element_set(host, i, dtype, (float)rand() / (float)RAND_MAX * 6.0f - 3.0f);
    MUST(cudaMalloc(gpu, n * dtype_bytes(dtype)));
    upload(*gpu, host, n * dtype_bytes(dtype));
    return host;
}

static void buffers_open(struct buffers *b, uint32_t ffn, enum epd_dtype dtype)
{
    b->preact = random_buffer((size_t)ROWS * 2 * ffn, dtype, &b->d_preact_gpu);
    b->d_act = random_buffer((size_t)ROWS * ffn, dtype, &b->d_act_gpu);
    b->dy = random_buffer((size_t)ROWS * HIDDEN, dtype, &b->dy_gpu);
    b->bias = random_buffer((size_t)GROUPS * HIDDEN, dtype, &b->bias_gpu);
    b->act = malloc((size_t)ROWS * 2 * ffn * 4);
    MUST(cudaMalloc(&b->act_gpu, (size_t)ROWS * ffn * 4));
    MUST(cudaMemset(b->act_gpu, 0xff, (size_t)ROWS * ffn * 4));
    for (int i = 0; i < ROWS; i++)
        b->weights[i] = (float)rand() / (float)RAND_MAX;
    MUST(cudaMalloc((void **)&b->weights_gpu, sizeof(b->weights)));
    MUST(cudaMalloc((void **)&b->dots_gpu, ROWS * 4));
    MUST(cudaMalloc((void **)&b->splits_gpu, sizeof(splits)));
    MUST(cudaMalloc((void **)&b->offsets_gpu, sizeof(offsets)));
    MUST(cudaMalloc((void **)&b->error_gpu, sizeof(*b->error_gpu)));
    MUST(cudaMemset(b->error_gpu, 0, sizeof(*b->error_gpu)));
    upload(b->weights_gpu, b->weights, sizeof(b->weights));
    upload(b->splits_gpu, splits, sizeof(splits));
    upload(b->offsets_gpu, offsets, sizeof(offsets));
}

static void buffers_close(struct buffers *b)
{
    void *gpu[] = {b->d_preact_gpu, b->act_gpu,  b->d_act_gpu,  b->dy_gpu,      b->bias_gpu,
                   b->weights_gpu,  b->dots_gpu, b->splits_gpu, b->offsets_gpu, b->error_gpu};
    void *host[] = {b->preact, b->act, b->d_act, b->dy, b->bias};
    for (size_t i = 0; i < sizeof(gpu) / sizeof(gpu[0]); i++)
        MUST(cudaFree(gpu[i]));
    for (size_t i = 0; i < sizeof(host) / sizeof(host[0]); i++)
        free(host[i]);
}

static int group_of(int64_t row)
{
    for (int l = 0; l < GROUPS; l++)
        if (row >= offsets[l] && row < offsets[l] + splits[l])
            return l;
    return -1;
}

static int close_to(float got, double want, enum epd_dtype dtype)
{
    double relative = dtype == EPD_F32 ? 1e-5 : dtype == EPD_F16 ? 2e-3 : 1.6e-2;
    return fabs(got - want) <= relative * fabs(want) + 1e-4;
}

static int is_poison(const void *data, size_t i, enum epd_dtype dtype)
{
    float value = element_get(data, i, dtype);
    return value != value;
}

static int check_forward(struct buffers *b, enum epd_activation kind, uint32_t ffn, enum epd_dtype dtype)
{
    int failed = 0;
    download(b->act, b->act_gpu, (size_t)ROWS * ffn * dtype_bytes(dtype));
    for (int64_t row = 0; row < ROWS; row++) {
        for (uint32_t f = 0; f < ffn && !failed; f++) {
            size_t i = (size_t)row * ffn + f;
            double slope, g = element_get(b->preact, (size_t)row * 2 * ffn + f, dtype),
                          u = element_get(b->preact, (size_t)row * 2 * ffn + ffn + f, dtype);
            failed = group_of(row) < 0 ? !is_poison(b->act, i, dtype)
                                       : !close_to(element_get(b->act, i, dtype),
                                                   gate_of(kind, g, &slope) * u * b->weights[row], dtype);
            if (failed)
                printf("  FAIL act row %ld column %u: %g\n", (long)row, f, element_get(b->act, i, dtype));
        }
    }
    return failed;
}

/* In place: d_preact over preact, weighted_act over d_act. */
static int check_backward(struct buffers *b, enum epd_activation kind, uint32_t ffn, enum epd_dtype dtype)
{
    size_t element = dtype_bytes(dtype);
    void *d_preact = malloc((size_t)ROWS * 2 * ffn * element),
         *weighted = malloc((size_t)ROWS * ffn * element);
    float dots[ROWS];
    int failed = 0;
    download(d_preact, b->d_preact_gpu, (size_t)ROWS * 2 * ffn * element);
    download(weighted, b->d_act_gpu, (size_t)ROWS * ffn * element);
    download(dots, b->dots_gpu, sizeof(dots));
    for (int64_t row = 0; row < ROWS && !failed; row++) {
        double dot = 0.0, size = 1e-3;
        int group = group_of(row);
        for (uint32_t f = 0; f < ffn && !failed; f++) {
            size_t i = (size_t)row * ffn + f, at_gate = (size_t)row * 2 * ffn + f, at_up = at_gate + ffn;
            double slope, g = element_get(b->preact, at_gate, dtype),
                          u = element_get(b->preact, at_up, dtype);
            double d = element_get(b->d_act, i, dtype), w = b->weights[row], value = gate_of(kind, g, &slope);
            dot += d * value * u;
            size += fabs(d * value * u);
            double want_gate = group < 0 ? g : w * d * u * slope, want_up = group < 0 ? u : w * d * value;
            failed = !close_to(element_get(d_preact, at_gate, dtype), want_gate, dtype) ||
                     !close_to(element_get(d_preact, at_up, dtype), want_up, dtype) ||
                     !close_to(element_get(weighted, i, dtype), group < 0 ? d : w * value * u, dtype);
        }
        for (int h = 0; group >= 0 && h < HIDDEN; h++) {
            double term = (double)element_get(b->dy, (size_t)row * HIDDEN + h, dtype) *
                          element_get(b->bias, (size_t)group * HIDDEN + h, dtype);
            dot += term;
            size += fabs(term);
        }
        failed |= group >= 0 && !(fabs(dots[row] - dot) <= 1e-4 * size);
        if (failed)
            printf("  FAIL backward row %ld, dot %g\n", (long)row, dots[row]);
    }
    free(d_preact);
    free(weighted);
    return failed;
}

static int run_one(enum epd_activation kind, enum epd_dtype dtype, uint32_t ffn)
{
    struct buffers b;
    struct epd_error error;
    buffers_open(&b, ffn, dtype);
    struct row_groups groups = {GROUPS, b.splits_gpu, b.offsets_gpu, ROWS};
    struct activation_args forward = {.groups = groups,
                                      .kind = kind,
                                      .dtype = dtype,
                                      .ffn = ffn,
                                      .preact = b.d_preact_gpu,
                                      .act = b.act_gpu,
                                      .row_weights = b.weights_gpu,
                                      .error = b.error_gpu};
    struct activation_bwd_args backward = {.groups = groups,
                                           .kind = kind,
                                           .dtype = dtype,
                                           .ffn = ffn,
                                           .preact = b.d_preact_gpu,
                                           .d_act = b.d_act_gpu,
                                           .row_weights = b.weights_gpu,
                                           .d_preact = b.d_preact_gpu,
                                           .weighted_act = b.d_act_gpu,
                                           .d_row_weights = b.dots_gpu,
                                           .dy = b.dy_gpu,
                                           .bias2 = b.bias_gpu,
                                           .hidden = HIDDEN,
                                           .error = b.error_gpu};
    int failed = cuda_activation_launch(&forward, 0, &error) != EPD_OK;
    MUST(cudaDeviceSynchronize());
    failed = failed || check_forward(&b, kind, ffn, dtype);
    failed = failed || cuda_activation_bwd_launch(&backward, 0, &error) != EPD_OK;
    MUST(cudaDeviceSynchronize());
    failed = failed || check_backward(&b, kind, ffn, dtype);
    buffers_close(&b);
    if (failed)
        printf("FAIL activation %s %s ffn %u\n", activation_name(kind), dtype_name(dtype), ffn);
    return failed;
}

/* A split past the buffer is clamped and recorded; packed groups. */
static int run_bad_splits(void)
{
    const int64_t bad[GROUPS] = {31, -4, 33, 100, 7};
    struct buffers b;
    struct epd_error error;
    struct kernel_error seen;
    buffers_open(&b, 64, EPD_BF16);
    upload(b.splits_gpu, bad, sizeof(bad));
    struct activation_args args = {.groups = {GROUPS, b.splits_gpu, NULL, ROWS},
                                   .kind = EPD_SWIGLU,
                                   .dtype = EPD_BF16,
                                   .ffn = 64,
                                   .preact = b.d_preact_gpu,
                                   .act = b.act_gpu,
                                   .error = b.error_gpu};
    int failed = cuda_activation_launch(&args, 0, &error) != EPD_OK;
    MUST(cudaDeviceSynchronize());
    download(&seen, b.error_gpu, sizeof(seen));
    failed |= seen.status != EPD_BAD_SPLITS || seen.expert != 1 || seen.got != -4 || seen.allowed != ROWS;
    buffers_close(&b);
    printf("%s activation clamps and records bad splits\n", failed ? "FAIL" : "ok  ");
    return failed;
}

int test_activation(void)
{
    static const enum epd_activation kinds[] = {EPD_SWIGLU, EPD_GEGLU, EPD_RELU2};
    static const enum epd_dtype dtypes[] = {EPD_BF16, EPD_F16, EPD_F32};
    static const uint32_t ffns[] = {8, 136, 768, 2880};
    int failed = 0, n = 0;
    MUST(cudaSetDevice(0));
    for (int k = 0; k < 3; k++)
        for (int d = 0; d < 3; d++)
            for (int f = 0; f < 4; f++, n++)
                failed += run_one(kinds[k], dtypes[d], ffns[f]);
    printf("activation: %d cases, %d failures\n", n, failed);
    return failed + run_bad_splits();
}
