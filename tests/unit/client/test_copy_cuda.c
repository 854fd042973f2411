/* Which copies go together in one kernel, and what the kernel is given, against a driver that the test plays: it copies in
 * host memory. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "client/copy_cuda.h"
#include "client/driver_cuda.h"

#define KERNEL ((CUfunction)(uintptr_t)0x1230)
#define STREAM ((CUstream)(uintptr_t)0x4560)

static struct driver played;
static uint32_t n_alone, n_kernels, n_parts;
static CUresult answer;

const struct driver *driver(void)
{
    return &played;
}

enum epd_status driver_result(CUresult result, const char *what, struct epd_error *error)
{
    return result == CUDA_SUCCESS ? EPD_OK : error_set(error, EPD_CUDA, "%s: %d", what, (int)result);
}

static CUresult play_copy(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    ck_assert_ptr_eq(stream, STREAM);
    memcpy((void *)(uintptr_t)to, (const void *)(uintptr_t)from, bytes);
    n_alone++;
    return answer;
}

/* As the kernel does: row y of the grid has to, from and bytes at 24 y. */
static CUresult play_launch(CUfunction kernel, unsigned x, unsigned y, unsigned z, unsigned threads,
                            unsigned threads_y, unsigned threads_z, unsigned shared, CUstream stream,
                            void **arguments, void **extra)
{
    uint64_t words[3 * COPY_TOGETHER_PARTS];
    ck_assert_ptr_eq(kernel, KERNEL);
    ck_assert_ptr_eq(stream, STREAM);
    ck_assert(x > 0 && x <= 66 && z == 1 && threads == 512 && threads_y == 1 && threads_z == 1);
    ck_assert(shared == 0 && !extra && y >= 2 && y <= COPY_TOGETHER_PARTS);
    memcpy(words, arguments[0], sizeof words);
    for (unsigned i = 0; i < y; i++) {
        ck_assert_uint_eq((words[3 * i] | words[3 * i + 1] | words[3 * i + 2]) % 16, 0);
        memcpy((void *)(uintptr_t)words[3 * i], (const void *)(uintptr_t)words[3 * i + 1], words[3 * i + 2]);
    }
    n_kernels++;
    n_parts += y;
    return answer;
}

static void setup(void)
{
    played = (struct driver){.cuMemcpyDtoDAsync = play_copy, .cuLaunchKernel = play_launch};
    n_alone = n_kernels = n_parts = 0;
    answer = CUDA_SUCCESS;
}

#define AREA (9u << 20)
static char *from, *to;

static void areas(void)
{
    setup();
    from = aligned_alloc(64, AREA);
    to = aligned_alloc(64, AREA);
    ck_assert(from && to);
    for (uint32_t i = 0; i < AREA; i++)
        from[i] = (char)(i * 7 + i / 251);
    memset(to, 0, AREA);
}

static void areas_end(void)
{
    free(from);
    free(to);
}

/* Places of the copies: nothing else may be written. */
struct place {
    uint64_t at, bytes;
};

static void expect(const struct place *places, uint32_t n, uint32_t alone, uint32_t kernels, uint32_t parts)
{
    struct epd_copy copies[16];
    struct epd_error error;
    char *want = calloc(1, AREA);
    ck_assert(want != NULL && n <= 16);
    memset(to, 0, AREA);
    n_alone = n_kernels = n_parts = 0;
    for (uint32_t i = 0; i < n; i++) {
        copies[i] = (struct epd_copy){to + places[i].at, from + places[i].at, places[i].bytes};
        memcpy(want + places[i].at, from + places[i].at, places[i].bytes);
    }
    ck_assert_int_eq(copy_enqueue(KERNEL, copies, n, STREAM, &error), EPD_OK);
    ck_assert_uint_eq(n_alone, alone);
    ck_assert_uint_eq(n_kernels, kernels);
    ck_assert_uint_eq(n_parts, parts);
    ck_assert(memcmp(to, want, AREA) == 0);
    free(want);
}

START_TEST(small_copies_go_together)
{
    expect((struct place[]){{0, 4096}, {8192, 16}, {16384, 48}}, 3, 0, 1, 3);
    expect((struct place[]){{0, 4096}, {8192, COPY_TOGETHER_BYTES}}, 2, 0, 1, 2);
    /* Four to a kernel, and one that is left alone is the driver's. */
    expect((struct place[]){{0, 16}, {64, 16}, {128, 16}, {192, 16}, {256, 16}}, 5, 1, 1, 4);
    expect((struct place[]){{0, 16}, {64, 16}, {128, 16}, {192, 16}, {256, 16}, {320, 32}}, 6, 0, 2, 6);
}
END_TEST

START_TEST(what_does_not_fit_goes_alone)
{
    expect((struct place[]){{0, 4096}}, 1, 1, 0, 0);
    expect((struct place[]){{0, COPY_TOGETHER_BYTES + 16}, {6u << 20, 32}, {7u << 20, 32}}, 3, 1, 1, 2);
    expect((struct place[]){{0, 4095}, {8192, 32}, {16384, 32}}, 3, 1, 1, 2); /* bytes */
    expect((struct place[]){{8, 4096}, {8192, 32}, {16384, 32}}, 3, 1, 1, 2); /* address */
    expect((struct place[]){{1, 5}, {8192, 7}, {16384, COPY_TOGETHER_BYTES + 1}}, 3, 3, 0, 0);
}
END_TEST

START_TEST(nothing_is_copied_where_there_is_nothing)
{
    struct epd_copy same = {from, from, 64};
    struct epd_error error;
    expect((struct place[]){{0, 0}, {8192, 0}}, 2, 0, 0, 0);
    expect((struct place[]){{0, 64}, {8192, 0}, {256, 64}}, 3, 0, 1, 2);
    n_alone = n_kernels = 0;
    ck_assert_int_eq(copy_enqueue(KERNEL, &same, 1, STREAM, &error), EPD_OK);
    ck_assert_int_eq(copy_enqueue(KERNEL, NULL, 0, STREAM, &error), EPD_OK);
    ck_assert_uint_eq(n_alone + n_kernels, 0);
}
END_TEST

START_TEST(what_the_driver_refuses_is_told)
{
    struct epd_copy copies[] = {{to, from, 64}, {to + 64, from + 64, 64}, {to + 128, from + 128, 3}};
    struct epd_error error;
    answer = CUDA_ERROR_INVALID_VALUE;
    ck_assert_int_eq(copy_enqueue(KERNEL, copies, 2, STREAM, &error), EPD_CUDA);
    ck_assert_int_eq(copy_enqueue(KERNEL, copies, 1, STREAM, &error), EPD_CUDA);
    ck_assert_int_eq(copy_enqueue(KERNEL, copies, 3, STREAM, &error), EPD_CUDA);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("copies");
    TCase *tcase = tcase_create("copies");
    tcase_add_checked_fixture(tcase, areas, areas_end);
    tcase_add_test(tcase, small_copies_go_together);
    tcase_add_test(tcase, what_does_not_fit_goes_alone);
    tcase_add_test(tcase, nothing_is_copied_where_there_is_nothing);
    tcase_add_test(tcase, what_the_driver_refuses_is_told);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
