#include "client/bench/solo.h"

#include <cblas.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/bench/clock.h"
#include "client/bench/fill.h"
#include "client/bench/sample.h"

/* All ranks' tokens and all experts. */
struct solo {
    const struct job *job;
    const volatile sig_atomic_t *interrupted; /* borrowed */
    uint32_t n_threads;
    size_t n_tokens, n_pairs; /* of all ranks */
    float *x, *weights, *w1, *w2, *out;
    int32_t *experts;                   /* [n_tokens, top_k] */
    size_t *row;                        /* [n_pairs] of a (token, k) in the expert-major rows */
    size_t *pair;                       /* [n_pairs] the other way round */
    size_t *first;                      /* [n_experts + 1] first row of an expert */
    float *gathered, *preact, *act, *y; /* [n_pairs, ...] */
    pthread_barrier_t barrier;
    pthread_mutex_t gate; /* held until all threads are there, or one could not be */
    int called_off;       /* guarded by gate */
    int ended;            /* thread 0 writes it between two barriers, the others read it behind the next */
    double *samples;      /* [n_iterations] */
};

struct solo_thread {
    struct solo *solo;
    uint32_t thread_idx;
    pthread_t thread;
};

static void solo_free(struct solo *solo)
{
    float *arrays[] = {solo->x,        solo->weights, solo->w1,  solo->w2, solo->out,
                       solo->gathered, solo->preact,  solo->act, solo->y};
    for (size_t i = 0; i < sizeof(arrays) / sizeof(arrays[0]); i++)
        free(arrays[i]);
    free(solo->experts);
    free(solo->row);
    free(solo->pair);
    free(solo->first);
    free(solo->samples);
}

static int take(float **array, size_t n)
{
    *array = malloc(n * sizeof(float));
    return *array != NULL;
}

static enum epd_status solo_allocate(struct solo *solo)
{
    const struct job *job = solo->job;
    const size_t hidden = job->hidden, ffn = job->ffn, n_experts = job->n_experts;
    solo->experts = malloc(solo->n_pairs * sizeof(*solo->experts));
    solo->row = malloc(solo->n_pairs * sizeof(*solo->row));
    solo->pair = malloc(solo->n_pairs * sizeof(*solo->pair));
    solo->first = malloc((n_experts + 1) * sizeof(*solo->first));
    solo->samples = malloc(job->n_iterations * sizeof(*solo->samples));
    const int complete =
        solo->experts && solo->row && solo->pair && solo->first && solo->samples &&
        take(&solo->x, solo->n_tokens * hidden) && take(&solo->weights, solo->n_pairs) &&
        take(&solo->w1, n_experts * 2 * ffn * hidden) && take(&solo->w2, n_experts * hidden * ffn) &&
        take(&solo->out, solo->n_tokens * hidden) && take(&solo->gathered, solo->n_pairs * hidden) &&
        take(&solo->preact, solo->n_pairs * 2 * ffn) && take(&solo->act, solo->n_pairs * ffn) &&
        take(&solo->y, solo->n_pairs * hidden);
    return complete ? EPD_OK : EPD_NO_MEMORY;
}

static enum epd_status solo_fill(struct solo *solo)
{
    const struct job *job = solo->job;
    const size_t n_weights = (size_t)job->n_experts * job->hidden * job->ffn;
    fill_values(solo->x, solo->n_tokens * job->hidden, EPD_F32, 1.0f, 1);
    fill_values(solo->w1, 2 * n_weights, EPD_F32, 1.0f / 64, 2);
    fill_values(solo->w2, n_weights, EPD_F32, 1.0f / 64, 3);
    enum epd_status status = EPD_OK;
    for (uint32_t rank = 0; status == EPD_OK && rank < job->n_ranks; rank++)
        status = fill_routing(job, rank, solo->experts + (size_t)rank * job->n_tokens * job->top_k,
                              solo->weights + (size_t)rank * job->n_tokens * job->top_k);
    return status;
}

/* Counts and places of all rows: a counting sort by expert. */
static void solo_layout(struct solo *solo)
{
    const size_t n_experts = solo->job->n_experts;
    memset(solo->first, 0, (n_experts + 1) * sizeof(*solo->first));
    for (size_t pair = 0; pair < solo->n_pairs; pair++)
        solo->first[solo->experts[pair] + 1]++;
    for (size_t e = 0; e < n_experts; e++)
        solo->first[e + 1] += solo->first[e];
    for (size_t pair = 0; pair < solo->n_pairs; pair++) {
        const size_t row = solo->first[solo->experts[pair]]++;
        solo->row[pair] = row;
        solo->pair[row] = pair;
    }
    for (size_t e = n_experts; e > 0; e--)
        solo->first[e] = solo->first[e - 1];
    solo->first[0] = 0;
}

static void solo_expert(struct solo *solo, size_t expert)
{
    const struct job *job = solo->job;
    const size_t hidden = job->hidden, ffn = job->ffn, first = solo->first[expert];
    const int n_rows = (int)(solo->first[expert + 1] - first);
    if (n_rows == 0)
        return;
    float *x = solo->gathered + first * hidden, *preact = solo->preact + first * 2 * ffn,
          *act = solo->act + first * ffn;
    for (size_t i = 0; i < (size_t)n_rows; i++)
        memcpy(x + i * hidden, solo->x + solo->pair[first + i] / job->top_k * hidden, hidden * sizeof(float));
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n_rows, (int)(2 * ffn), (int)hidden, 1, x,
                (int)hidden, solo->w1 + expert * 2 * ffn * hidden, (int)hidden, 0, preact, (int)(2 * ffn));
    for (size_t i = 0; i < (size_t)n_rows; i++)
        for (size_t f = 0; f < ffn; f++) {
            const float gate = preact[i * 2 * ffn + f];
            act[i * ffn + f] = gate / (1 + expf(-gate)) * preact[i * 2 * ffn + ffn + f];
        }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n_rows, (int)hidden, (int)ffn, 1, act, (int)ffn,
                solo->w2 + expert * hidden * ffn, (int)ffn, 0, solo->y + first * hidden, (int)hidden);
}

static void solo_combine(struct solo *solo, size_t token)
{
    const size_t hidden = solo->job->hidden, top_k = solo->job->top_k;
    float *out = solo->out + token * hidden;
    memset(out, 0, hidden * sizeof(float));
    for (size_t k = 0; k < top_k; k++) {
        const float weight = solo->weights[token * top_k + k];
        const float *y = solo->y + solo->row[token * top_k + k] * hidden;
        for (size_t h = 0; h < hidden; h++)
            out[h] += weight * y[h];
    }
}

/* Rank r belongs to thread r modulo n_threads, as it belongs to that lane in the daemon. */
static void solo_step(struct solo *solo, uint32_t thread_idx)
{
    const struct job *job = solo->job;
    const size_t n_local = job->n_experts / job->n_ranks;
    if (thread_idx == 0)
        solo_layout(solo);
    pthread_barrier_wait(&solo->barrier);
    if (thread_idx == 0)
        solo->ended = *solo->interrupted != 0;
    for (size_t rank = thread_idx; rank < job->n_ranks; rank += solo->n_threads)
        for (size_t l = 0; l < n_local; l++)
            solo_expert(solo, rank * n_local + l);
    pthread_barrier_wait(&solo->barrier);
    for (size_t rank = thread_idx; rank < job->n_ranks; rank += solo->n_threads)
        for (size_t t = 0; t < job->n_tokens; t++)
            solo_combine(solo, rank * job->n_tokens + t);
    pthread_barrier_wait(&solo->barrier);
}

static void *solo_main(void *arg)
{
    struct solo_thread *self = arg;
    const struct job *job = self->solo->job;
    for (uint32_t i = 0; !self->solo->ended && i < job->n_warmup + job->n_iterations; i++) {
        const double start_ns = clock_ns();
        solo_step(self->solo, self->thread_idx);
        if (self->thread_idx == 0 && i >= job->n_warmup)
            self->solo->samples[i - job->n_warmup] = clock_ns() - start_ns;
    }
    return NULL;
}

static void *solo_thread(void *arg)
{
    struct solo *solo = ((struct solo_thread *)arg)->solo;
    pthread_mutex_lock(&solo->gate);
    const int called_off = solo->called_off;
    pthread_mutex_unlock(&solo->gate);
    return called_off ? NULL : solo_main(arg);
}

static enum epd_status solo_measure(struct solo *solo)
{
    struct solo_thread threads[JOB_MAX_RANKS];
    uint32_t n = 0;
    pthread_mutex_lock(&solo->gate);
    for (; n < solo->n_threads; n++) {
        threads[n] = (struct solo_thread){.solo = solo, .thread_idx = n};
        if (n > 0 && pthread_create(&threads[n].thread, NULL, solo_thread, &threads[n]) != 0)
            break;
    }
    solo->called_off = n < solo->n_threads;
    pthread_mutex_unlock(&solo->gate);
    if (!solo->called_off)
        solo_main(&threads[0]);
    for (uint32_t i = 1; i < n; i++)
        pthread_join(threads[i].thread, NULL);
    return solo->called_off ? EPD_SYSTEM : solo->ended ? EPD_EVICTED : EPD_OK;
}

enum epd_status solo_run(const struct job *job, uint32_t n_threads, const volatile sig_atomic_t *interrupted,
                         struct result *result)
{
    struct solo solo = {.job = job,
                        .interrupted = interrupted,
                        .n_threads = n_threads < job->n_ranks ? n_threads : job->n_ranks};
    solo.n_tokens = (size_t)job->n_ranks * job->n_tokens;
    solo.n_pairs = solo.n_tokens * job->top_k;
    enum epd_status status = solo_allocate(&solo);
    if (status == EPD_OK)
        status = solo_fill(&solo);
    if (status != EPD_OK) {
        solo_free(&solo);
        return status;
    }
    openblas_set_num_threads(1); /* parallel over ranks, as the daemon's lanes are */
    pthread_barrier_init(&solo.barrier, NULL, solo.n_threads);
    pthread_mutex_init(&solo.gate, NULL);
    status = solo_measure(&solo);
    pthread_mutex_destroy(&solo.gate);
    pthread_barrier_destroy(&solo.barrier);
    if (status != EPD_OK) {
        solo_free(&solo);
        return status;
    }
    sample_sort(solo.samples, job->n_iterations);
    *result = (struct result){.min_ns = solo.samples[0],
                              .median_ns = sample_quantile(solo.samples, job->n_iterations, 0.5),
                              .p99_ns = sample_quantile(solo.samples, job->n_iterations, 0.99),
                              .counted = COUNTED_NONE};
    solo_free(&solo);
    return EPD_OK;
}
