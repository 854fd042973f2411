/* Per group, from m_splits and offsets: sizes and pointers of the three operands, 72 bytes. cuBLASLt is column-major, so
 * a row-major [r, c] matrix is its [c, r]:
 *   TN  Yt[N, m]  = W[K, N]t  X[K, m]       NN  dXt[K, m] = W[K, N]  dY[N, m]       NT  dWt[K, N] = X[K, m]  dY[N, m]t */
#include "kernels/gemm/cublaslt_groups.h"

static constexpr int THREADS = 256, CLEAR_BLOCKS = 32;

static __device__ size_t bytes_of(enum epd_dtype dtype)
{
    return dtype == EPD_F32 ? 4 : 2;
}

static __device__ void *row_of(const void *base, int64_t row, uint32_t columns, enum epd_dtype dtype)
{
    return static_cast<char *>(const_cast<void *>(base)) + row * columns * bytes_of(dtype);
}

static __device__ void set_operand(const struct cublaslt_operand &operand, uint32_t group, int64_t rows,
                                   int64_t cols, void *data)
{
    operand.rows[group] = static_cast<int32_t>(rows);
    operand.cols[group] = static_cast<int32_t>(cols);
    operand.data[group] = data;
}

static __device__ void fill_group(const struct cublaslt_groups_args &args, uint32_t group, int64_t first,
                                  int64_t m)
{
    const struct gemm_args &gemm = args.gemm;
    const struct gemm_shape &shape = gemm.shape;
    const struct cublaslt_tables &tables = args.tables;
    size_t weights = static_cast<size_t>(shape.n) * shape.k * group;
    if (shape.layout == EPD_GEMM_NT) {
        void *c = gemm.c_parts ? gemm.c_parts[group]
                               : static_cast<char *>(gemm.c) + weights * bytes_of(shape.dtype_c);
        set_operand(tables.a, group, shape.k, m, row_of(gemm.b, first, shape.k, shape.dtype));
        set_operand(tables.b, group, shape.n, m, row_of(gemm.a, first, shape.n, shape.dtype));
        set_operand(tables.c, group, shape.k, shape.n, c);
        return;
    }
    bool tn = shape.layout == EPD_GEMM_TN;
    uint32_t in = tn ? shape.k : shape.n, out = tn ? shape.n : shape.k;
    const void *w = gemm.b_parts ? gemm.b_parts[group]
                                 : static_cast<const char *>(gemm.b) + weights * bytes_of(shape.dtype);
    set_operand(tables.a, group, shape.k, shape.n, const_cast<void *>(w));
    set_operand(tables.b, group, in, m, row_of(gemm.a, first, in, shape.dtype));
    set_operand(tables.c, group, out, m, row_of(gemm.c, first, out, shape.dtype_c));
}

/* One block. Packed groups start where the clamped splits before them end: one thread adds them up. */
static __global__ void __launch_bounds__(THREADS)
    fill_tables(const __grid_constant__ cublaslt_groups_args args)
{
    extern __shared__ int64_t starts[];
    const struct row_groups &groups = args.gemm.groups;
    int64_t limit = groups.max_rows;
    if (threadIdx.x == 0) {
        int64_t next = 0;
        bool bad = false;
        for (uint32_t l = 0; l < groups.n_groups; l++) {
            int64_t got = groups.m_splits[l], first = groups.offsets ? groups.offsets[l] : next;
            bool inside = first >= 0 && first <= limit;
            int64_t room = inside ? limit - first : 0, m = got < 0 ? 0 : got > room ? room : got;
            starts[2 * l] = inside ? first : 0;
            starts[2 * l + 1] = m;
            next = first + m;
            if (m == got || bad || !args.gemm.error || args.gemm.error->status != 0)
                continue;
            bad = true;
            args.gemm.error->status = EPD_BAD_SPLITS;
            args.gemm.error->expert = static_cast<int32_t>(l);
            args.gemm.error->token = -1;
            args.gemm.error->got = got;
            args.gemm.error->allowed = room;
        }
    }
    __syncthreads();
    for (uint32_t l = threadIdx.x; l < groups.n_groups; l += THREADS)
        fill_group(args, l, starts[2 * l], starts[2 * l + 1]);
}

/* NT: block (x, group) clears its share of an empty group's matrix, 16 bytes at a time. */
static __global__ void __launch_bounds__(THREADS)
    clear_empty(const __grid_constant__ cublaslt_groups_args args)
{
    const struct gemm_shape &shape = args.gemm.shape;
    uint32_t group = blockIdx.y;
    if (args.tables.a.cols[group] != 0)
        return;
    uint4 *c = static_cast<uint4 *>(args.tables.c.data[group]);
    size_t n = static_cast<size_t>(shape.n) * shape.k * bytes_of(shape.dtype_c) / 16;
    for (size_t i = blockIdx.x * THREADS + threadIdx.x; i < n; i += CLEAR_BLOCKS * THREADS)
        c[i] = make_uint4(0, 0, 0, 0);
}

extern "C" cudaError_t cublaslt_groups_prepare(void)
{
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, fill_tables);
    return error == cudaSuccess ? cudaFuncGetAttributes(&attributes, clear_empty) : error;
}

extern "C" cudaError_t cublaslt_groups_launch(const struct cublaslt_groups_args *args, cudaStream_t stream)
{
    uint32_t n_groups = args->gemm.groups.n_groups;
    fill_tables<<<1, THREADS, n_groups * 2 * sizeof(int64_t), stream>>>(*args);
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess || args->gemm.shape.layout != EPD_GEMM_NT || args->gemm.shape.accumulate)
        return error;
    clear_empty<<<dim3(CLEAR_BLOCKS, n_groups), THREADS, 0, stream>>>(*args);
    return cudaGetLastError();
}
