#include "client/copy_cuda.h"

#include <pthread.h>

#include "client/driver_cuda.h"

/* Blocks of a part at most, and 16-byte pieces that a thread of one moves at a time. */
#define COPY_BLOCKS  66u
#define COPY_THREADS 512u
#define COPY_UNROLL  4u

struct copy_part {
    uint64_t to, from, bytes;
};
struct copy_parts {
    struct copy_part parts[COPY_TOGETHER_PARTS];
    uint32_t n_parts;
};

/* Row y of the grid copies parts[y], four pieces of 16 bytes in flight per thread, and the rest one by one. Written for the
 * driver's own compiler, so that libepd is built without one: the layout is that of copy_part, bytes a multiple of 16. */
static const char kernel_text[] = ".version 7.0\n"
                                  ".target sm_52\n"
                                  ".address_size 64\n"
                                  ".visible .entry epd_copy(.param .align 8 .b8 parts[96])\n"
                                  "{\n"
                                  ".reg .pred %p;\n"
                                  ".reg .b32 %a, %b, %c;\n"
                                  ".reg .b64 %at, %step, %far, %to, %from, %end, %i, %x, %y;\n"
                                  ".reg .b32 %u<16>;\n"
                                  "mov.u32 %a, %ctaid.y;\n"
                                  "mul.wide.u32 %at, %a, 24;\n"
                                  "mov.u64 %x, parts;\n"
                                  "add.u64 %x, %x, %at;\n"
                                  "ld.param.u64 %to, [%x];\n"
                                  "ld.param.u64 %from, [%x+8];\n"
                                  "ld.param.u64 %end, [%x+16];\n"
                                  "cvta.to.global.u64 %to, %to;\n"
                                  "cvta.to.global.u64 %from, %from;\n"
                                  "mov.u32 %a, %ctaid.x;\n"
                                  "mov.u32 %b, %ntid.x;\n"
                                  "mov.u32 %c, %tid.x;\n"
                                  "mul.wide.u32 %i, %a, %b;\n"
                                  "cvt.u64.u32 %x, %c;\n"
                                  "add.u64 %i, %i, %x;\n"
                                  "shl.b64 %i, %i, 4;\n"
                                  "mov.u32 %a, %nctaid.x;\n"
                                  "mul.wide.u32 %step, %a, %b;\n"
                                  "shl.b64 %step, %step, 4;\n"
                                  "mad.lo.u64 %far, %step, 3, %i;\n"
                                  "four:\n"
                                  "setp.ge.u64 %p, %far, %end;\n"
                                  "@%p bra one;\n"
                                  "add.u64 %x, %from, %i;\n"
                                  "ld.global.v4.b32 {%u0, %u1, %u2, %u3}, [%x];\n"
                                  "add.u64 %x, %x, %step;\n"
                                  "ld.global.v4.b32 {%u4, %u5, %u6, %u7}, [%x];\n"
                                  "add.u64 %x, %x, %step;\n"
                                  "ld.global.v4.b32 {%u8, %u9, %u10, %u11}, [%x];\n"
                                  "add.u64 %x, %x, %step;\n"
                                  "ld.global.v4.b32 {%u12, %u13, %u14, %u15}, [%x];\n"
                                  "add.u64 %y, %to, %i;\n"
                                  "st.global.v4.b32 [%y], {%u0, %u1, %u2, %u3};\n"
                                  "add.u64 %y, %y, %step;\n"
                                  "st.global.v4.b32 [%y], {%u4, %u5, %u6, %u7};\n"
                                  "add.u64 %y, %y, %step;\n"
                                  "st.global.v4.b32 [%y], {%u8, %u9, %u10, %u11};\n"
                                  "add.u64 %y, %y, %step;\n"
                                  "st.global.v4.b32 [%y], {%u12, %u13, %u14, %u15};\n"
                                  "mad.lo.u64 %i, %step, 4, %i;\n"
                                  "mad.lo.u64 %far, %step, 4, %far;\n"
                                  "bra four;\n"
                                  "one:\n"
                                  "setp.ge.u64 %p, %i, %end;\n"
                                  "@%p bra done;\n"
                                  "add.u64 %x, %from, %i;\n"
                                  "ld.global.v4.b32 {%u0, %u1, %u2, %u3}, [%x];\n"
                                  "add.u64 %y, %to, %i;\n"
                                  "st.global.v4.b32 [%y], {%u0, %u1, %u2, %u3};\n"
                                  "add.u64 %i, %i, %step;\n"
                                  "bra one;\n"
                                  "done:\n"
                                  "ret;\n"
                                  "}\n";

/* Written once, under loaded; read-only afterwards. */
static CUlibrary library;
static CUkernel library_kernel;
static CUresult load_result;
static pthread_once_t loaded = PTHREAD_ONCE_INIT;

static void load_library(void)
{
    load_result = driver()->cuLibraryLoadData(&library, kernel_text, NULL, NULL, 0, NULL, NULL, 0);
    if (load_result == CUDA_SUCCESS)
        load_result = driver()->cuLibraryGetKernel(&library_kernel, library, "epd_copy");
}

enum epd_status copy_load(CUfunction *kernel, struct epd_error *error)
{
    pthread_once(&loaded, load_library);
    if (driver_result(load_result, "kernel that copies", error))
        return error->status;
    return driver_result(driver()->cuKernelGetFunction(kernel, library_kernel), "kernel that copies", error);
}

static int goes_together(const struct epd_copy *copy)
{
    const uint64_t all = (uintptr_t)copy->to | (uintptr_t)copy->from | copy->bytes;
    return all % 16 == 0 && copy->bytes <= COPY_TOGETHER_BYTES;
}

static enum epd_status copy_alone(const struct copy_part *part, CUstream stream, struct epd_error *error)
{
    return driver_result(driver()->cuMemcpyDtoDAsync(part->to, part->from, part->bytes, stream),
                         "stream: copy", error);
}

static enum epd_status copy_together(CUfunction kernel, struct copy_parts *together, CUstream stream,
                                     struct epd_error *error)
{
    const uint64_t at_once = 16u * COPY_THREADS * COPY_UNROLL;
    uint64_t most = 0;
    void *arguments[] = {together->parts};
    if (together->n_parts < 2) /* no dearer than a kernel */
        return together->n_parts ? copy_alone(&together->parts[0], stream, error) : EPD_OK;
    for (uint32_t i = 0; i < together->n_parts; i++)
        most = together->parts[i].bytes > most ? together->parts[i].bytes : most;
    const uint64_t blocks = (most + at_once - 1) / at_once;
    return driver_result(
        driver()->cuLaunchKernel(kernel, blocks < COPY_BLOCKS ? (uint32_t)blocks : COPY_BLOCKS,
                                 together->n_parts, 1, COPY_THREADS, 1, 1, 0, stream, arguments, NULL),
        "stream: copies", error);
}

enum epd_status copy_enqueue(CUfunction kernel, const struct epd_copy *copies, uint32_t n_copies,
                             CUstream stream, struct epd_error *error)
{
    struct copy_parts together = {.n_parts = 0};
    for (uint32_t i = 0; i < n_copies; i++) {
        const struct copy_part part = {
            .to = (uintptr_t)copies[i].to, .from = (uintptr_t)copies[i].from, .bytes = copies[i].bytes};
        if (part.bytes == 0 || part.to == part.from)
            continue;
        if (!goes_together(&copies[i])) {
            if (copy_alone(&part, stream, error))
                return error->status;
            continue;
        }
        together.parts[together.n_parts++] = part;
        if (together.n_parts < COPY_TOGETHER_PARTS)
            continue;
        if (copy_together(kernel, &together, stream, error))
            return error->status;
        together.n_parts = 0;
    }
    return copy_together(kernel, &together, stream, error);
}
