/* The part of a MoE layer that one rank computes: GEMM1, activation, GEMM2, and their backward, with separate and with
 * fused activations in turns. Standard cases of four ranks, rows of random routing (sqrt of the mean as deviation).
 * One JSON line per case and pipeline: median microseconds of the whole and of each launch, and TFLOP/s of the whole.
 * Usage: expert_bench [part of a case's name [repeats [pause in ms]]] */
#include <algorithm>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <vector>

extern "C" {
#include "kernels/cuda/cuda.h"
#include "kernels/gemm/engine.h"
}
#include "tests/gpu/gemm/check.cuh"
#include "tests/gpu/gemm/reference.cuh"

struct bench_case {
    const char *name;
    uint32_t groups, rows, hidden, ffn;
};

static const struct bench_case cases[] = {
    {"dsv3", 64, 512, 7168, 2048},     {"qwen235b", 32, 1024, 4096, 1536}, {"qwen30b", 32, 2048, 2048, 768},
    {"mixtral", 2, 4096, 4096, 14336}, {"decode128", 64, 16, 7168, 2048},
};

struct layer {
    struct bench_case sizes;
    int64_t rows;
    void *x, *preact, *saved_preact, *act, *y, *dout, *d_act, *weighted, *dx, *w1, *w2, *dw1, *dw2;
    float *row_weights, *d_row_weights;
    int64_t *splits;
};

static void *device(size_t bytes)
{
    void *memory = NULL;
    CHECK(cudaMalloc(&memory, bytes));
    return memory;
}

static void *random_bf16(size_t n, uint32_t seed, float scale)
{
    void *memory = device(n * 2);
    fill_random<<<1024, 256>>>(memory, EPD_BF16, n, seed, scale);
    return memory;
}

static std::vector<int64_t> random_splits(const struct bench_case *sizes)
{
    std::vector<int64_t> out;
    uint32_t state = 12345;
    int64_t left = (int64_t)sizes->groups * sizes->rows;
    for (uint32_t i = 0; i < sizes->groups; i++) {
        double normal = -6.0;
        for (int j = 0; j < 12; j++) {
            state = state * 1664525u + 1013904223u;
            normal += (state >> 8) / 16777216.0;
        }
        int64_t rows = llround(sizes->rows + normal * sqrt((double)sizes->rows));
        rows = i + 1 == sizes->groups || rows > left ? left : rows < 0 ? 0 : rows;
        left -= rows;
        out.push_back(rows);
    }
    return out;
}

static struct layer make_layer(const struct bench_case *sizes)
{
    struct layer l = {};
    l.sizes = *sizes;
    l.rows = (int64_t)sizes->groups * sizes->rows;
    size_t m = l.rows, h = sizes->hidden, f = sizes->ffn, e = sizes->groups;
    l.x = random_bf16(m * h, 1, 1.0f);
    l.dout = random_bf16(m * h, 2, 1.0f);
    l.w1 = random_bf16(e * 2 * f * h, 3, 0.02f);
    l.w2 = random_bf16(e * f * h, 4, 0.02f);
    l.preact = device(m * f * 4);
    l.saved_preact = device(m * f * 4);
    l.act = device(m * f * 2);
    l.weighted = device(m * f * 2);
    l.y = device(m * h * 2);
    l.dx = device(m * h * 2);
    l.dw1 = device(e * 2 * f * h * 2);
    l.dw2 = device(e * f * h * 2);
    l.row_weights = (float *)device(m * 4);
    l.d_row_weights = (float *)device(m * 4);
    l.splits = (int64_t *)device(e * 8);
    fill_random<<<64, 256>>>(l.row_weights, EPD_F32, m, 5, 1.0f);
    std::vector<int64_t> splits = random_splits(sizes);
    CHECK(cudaMemcpy(l.splits, splits.data(), e * 8, cudaMemcpyHostToDevice));
    CHECK(cudaDeviceSynchronize());
    return l;
}

static void free_layer(struct layer *l)
{
    void *all[] = {l->saved_preact, l->x,  l->preact, l->act, l->y,   l->dout,        l->weighted,
                   l->dx,           l->w1, l->w2,     l->dw1, l->dw2, l->row_weights, l->d_row_weights,
                   l->splits};
    for (void *memory : all)
        CHECK(cudaFree(memory));
}

static struct row_groups groups_of(const struct layer *l)
{
    struct row_groups groups = {};
    groups.n_groups = l->sizes.groups;
    groups.m_splits = l->splits;
    groups.max_rows = l->rows;
    return groups;
}

/* One launch of a pipeline: a GEMM of the engine, or an activation. */
struct step {
    const char *name;
    struct gemm_engine_plan *plan;
    struct gemm_launch launch;
    struct activation_args forward;
    struct activation_bwd_args backward;
    double flops;
};

struct pipeline {
    const char *name;
    std::vector<struct step> steps;
    std::vector<std::vector<float>> times; /* of each step, then of all */
};

static struct step gemm_step(const struct layer *l, const char *name, struct gemm_problem problem,
                             struct gemm_launch launch)
{
    struct step s = {};
    struct epd_error error = {};
    s.name = name;
    problem.shape.dtype = problem.shape.dtype_c = EPD_BF16;
    problem.n_groups = l->sizes.groups;
    problem.max_rows = l->rows;
    if (gemm_engines[0]->create(&problem, 0, &s.plan, &error) != EPD_OK) {
        printf("%s\n", error.text);
        exit(2);
    }
    launch.args.shape = problem.shape;
    launch.args.groups = groups_of(l);
    s.launch = launch;
    s.flops = 2.0 * l->rows * problem.shape.n * problem.shape.k;
    return s;
}

static struct step plain_step(const struct layer *l, const char *name, enum epd_gemm_layout layout,
                              uint32_t n, uint32_t k, const void *a, const void *b, void *c)
{
    struct gemm_problem problem = {};
    struct gemm_launch launch = {};
    problem.shape.layout = layout;
    problem.shape.n = n;
    problem.shape.k = k;
    launch.args.a = a;
    launch.args.b = b;
    launch.args.c = c;
    return gemm_step(l, name, problem, launch);
}

static struct step fused_step(const struct layer *l, int keep)
{
    struct gemm_problem problem = {};
    struct gemm_launch launch = {};
    problem.shape.layout = EPD_GEMM_TN;
    problem.shape.n = 2 * l->sizes.ffn;
    problem.shape.k = l->sizes.hidden;
    problem.activation = EPD_SWIGLU;
    problem.keep_preact = keep;
    launch.args.a = l->x;
    launch.args.b = l->w1;
    launch.args.c = l->preact;
    launch.act = l->act;
    return gemm_step(l, "fc1", problem, launch);
}

/* d_act and the activation's backward in one. */
static struct step backward_step(const struct layer *l)
{
    struct gemm_problem problem = {};
    struct gemm_launch launch = {};
    problem.shape.layout = EPD_GEMM_NN;
    problem.shape.n = l->sizes.hidden;
    problem.shape.k = l->sizes.ffn;
    problem.activation = EPD_SWIGLU;
    problem.row_weights = problem.d_row_weights = 1;
    launch.args.a = l->dout;
    launch.args.b = l->w2;
    launch.args.c = l->preact;
    launch.preact = l->preact;
    launch.act = l->weighted;
    launch.row_weights = l->row_weights;
    launch.d_row_weights = l->d_row_weights;
    return gemm_step(l, "d_act", problem, launch);
}

static struct step activation_step(const struct layer *l)
{
    struct step s = {};
    s.name = "act";
    s.forward.groups = groups_of(l);
    s.forward.kind = EPD_SWIGLU;
    s.forward.dtype = EPD_BF16;
    s.forward.ffn = l->sizes.ffn;
    s.forward.preact = l->preact;
    s.forward.act = l->act;
    return s;
}

static struct step activation_bwd_step(const struct layer *l)
{
    struct step s = {};
    s.name = "act_bwd";
    s.backward.groups = groups_of(l);
    s.backward.kind = EPD_SWIGLU;
    s.backward.dtype = EPD_BF16;
    s.backward.ffn = l->sizes.ffn;
    s.backward.preact = s.backward.d_preact = l->preact;
    s.backward.d_act = s.backward.weighted_act = l->weighted;
    s.backward.row_weights = l->row_weights;
    s.backward.d_row_weights = l->d_row_weights;
    return s;
}

static std::vector<struct pipeline> make_pipelines(const struct layer *l)
{
    uint32_t h = l->sizes.hidden, f = l->sizes.ffn;
    struct step fc2 = plain_step(l, "fc2", EPD_GEMM_TN, h, f, l->act, l->w2, l->y);
    std::vector<struct pipeline> all;
    all.push_back(
        {"forward_separate",
         {plain_step(l, "fc1", EPD_GEMM_TN, 2 * f, h, l->x, l->w1, l->preact), activation_step(l), fc2}});
    all.push_back({"forward_fused_kept", {fused_step(l, 1), fc2}});
    all.push_back({"forward_fused", {fused_step(l, 0), fc2}});
    struct step dx = plain_step(l, "dx", EPD_GEMM_NN, 2 * f, h, l->preact, l->w1, l->dx);
    struct step dw2 = plain_step(l, "dw2", EPD_GEMM_NT, h, f, l->dout, l->weighted, l->dw2);
    struct step dw1 = plain_step(l, "dw1", EPD_GEMM_NT, 2 * f, h, l->preact, l->x, l->dw1);
    all.push_back({"backward_separate",
                   {plain_step(l, "d_act", EPD_GEMM_NN, h, f, l->dout, l->w2, l->weighted),
                    activation_bwd_step(l), dx, dw2, dw1}});
    all.push_back({"backward_fused", {backward_step(l), dx, dw2, dw1}});
    return all;
}

static void launch_step(const struct step *s)
{
    struct epd_error error = {};
    enum epd_status status = s->plan             ? gemm_engines[0]->launch(s->plan, &s->launch, 0, &error)
                             : s->forward.preact ? cuda_activation_launch(&s->forward, 0, &error)
                                                 : cuda_activation_bwd_launch(&s->backward, 0, &error);
    if (status != EPD_OK) {
        printf("%s: %s\n", s->name, error.text);
        exit(2);
    }
}

static size_t preact_bytes(const struct layer *l)
{
    return (size_t)l->rows * l->sizes.ffn * 4;
}

/* The backward passes put the gradient in the pre-activation's place: each pipeline gets it back first, untimed. */
static void time_pipeline(const struct layer *l, struct pipeline *p, void *flush, size_t flush_bytes,
                          int keep)
{
    std::vector<cudaEvent_t> events(p->steps.size() + 1);
    for (cudaEvent_t &event : events)
        CHECK(cudaEventCreate(&event));
    CHECK(cudaMemcpyAsync(l->preact, l->saved_preact, preact_bytes(l), cudaMemcpyDeviceToDevice, 0));
    CHECK(cudaMemsetAsync(flush, 0, flush_bytes, 0));
    CHECK(cudaEventRecord(events[0], 0));
    for (size_t i = 0; i < p->steps.size(); i++) {
        launch_step(&p->steps[i]);
        CHECK(cudaEventRecord(events[i + 1], 0));
    }
    CHECK(cudaDeviceSynchronize());
    p->times.resize(p->steps.size() + 1);
    for (size_t i = 0; i <= p->steps.size() && keep; i++) {
        float ms;
        CHECK(cudaEventElapsedTime(&ms, events[i < p->steps.size() ? i : 0],
                                   events[i < p->steps.size() ? i + 1 : i]));
        p->times[i].push_back(ms);
    }
    for (cudaEvent_t event : events)
        CHECK(cudaEventDestroy(event));
}

static float median(std::vector<float> times)
{
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

static void print_pipeline(const struct bench_case *sizes, const struct pipeline *p)
{
    double flops = 0.0;
    float ms = median(p->times.back());
    for (const struct step &s : p->steps)
        flops += s.flops;
    printf("{\"case\": \"%s\", \"pipeline\": \"%s\", \"us\": %.1f, \"tflops\": %.0f", sizes->name, p->name,
           ms * 1e3, flops / ms / 1e9);
    for (size_t i = 0; i < p->steps.size(); i++)
        printf(", \"%s\": %.1f", p->steps[i].name, median(p->times[i]) * 1e3);
    puts("}");
    fflush(stdout);
}

int main(int argc, char **argv)
{
    const char *only = argc > 1 ? argv[1] : "";
    int repeats = argc > 2 ? atoi(argv[2]) : 15, pause_ms = argc > 3 ? atoi(argv[3]) : 0;
    if (repeats < 1) {
        fprintf(stderr, "expert_bench: repeats must be at least 1\n");
        return 2;
    }
    size_t flush_bytes = 128u << 20;
    void *flush = device(flush_bytes);
    for (const struct bench_case &sizes : cases) {
        if (!strstr(sizes.name, only) && strcmp(only, "all") != 0)
            continue;
        struct layer l = make_layer(&sizes);
        std::vector<struct pipeline> all = make_pipelines(&l);
        launch_step(&all[0].steps[0]); /* fc1 of forward_separate leaves the pre-activation */
        CHECK(cudaMemcpy(l.saved_preact, l.preact, preact_bytes(&l), cudaMemcpyDeviceToDevice));
        for (int i = -2; i < repeats; i++)
            for (struct pipeline &p : all) {
                usleep(pause_ms * 1000);
                time_pipeline(&l, &p, flush, flush_bytes, i >= 0);
            }
        for (const struct pipeline &p : all)
            print_pipeline(&sizes, &p);
        free_layer(&l);
    }
    return 0;
}
