/* What every kernel here is made of: 16-byte vectors of a dtype, warp sums, bulk copies through shared
 * memory, and flag words between devices. */
#ifndef EPD_KERNELS_CUDA_DEVICE_CUH
#define EPD_KERNELS_CUDA_DEVICE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

static constexpr uint32_t FULL_WARP = 0xffffffffu;

/* 16 bytes of dtype E as fp32 and back; LANES elements. */
template <typename E> struct vec16;

template <> struct vec16<__nv_bfloat16> {
    static constexpr int LANES = 8;
    static __device__ __forceinline__ void unpack(const uint4 &v, float *f)
    {
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            f[2 * i] = __uint_as_float(words[i] << 16);
            f[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
    static __device__ __forceinline__ uint4 pack(const float *f)
    {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            __nv_bfloat162 pair = __floats2bfloat162_rn(f[2 * i], f[2 * i + 1]);
            words[i] = *reinterpret_cast<uint32_t *>(&pair);
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
};

template <> struct vec16<__half> {
    static constexpr int LANES = 8;
    static __device__ __forceinline__ void unpack(const uint4 &v, float *f)
    {
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 pair = __half22float2(*reinterpret_cast<const __half2 *>(&words[i]));
            f[2 * i] = pair.x;
            f[2 * i + 1] = pair.y;
        }
    }
    static __device__ __forceinline__ uint4 pack(const float *f)
    {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            __half2 pair = __floats2half2_rn(f[2 * i], f[2 * i + 1]);
            words[i] = *reinterpret_cast<uint32_t *>(&pair);
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
};

template <> struct vec16<float> {
    static constexpr int LANES = 4;
    static __device__ __forceinline__ void unpack(const uint4 &v, float *f)
    {
        f[0] = __uint_as_float(v.x);
        f[1] = __uint_as_float(v.y);
        f[2] = __uint_as_float(v.z);
        f[3] = __uint_as_float(v.w);
    }
    static __device__ __forceinline__ uint4 pack(const float *f)
    {
        return make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]),
                          __float_as_uint(f[3]));
    }
};

/* Read once: kept out of the first-level cache. Coherent, so it may follow an acquire. */
static __device__ __forceinline__ uint4 load_once(const uint4 *from)
{
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

static __device__ __forceinline__ float warp_sum(float value)
{
#pragma unroll
    for (int step = 16; step > 0; step >>= 1)
        value += __shfl_xor_sync(FULL_WARP, value, step);
    return value;
}

static __device__ __forceinline__ int64_t warp_sum(int64_t value)
{
#pragma unroll
    for (int step = 16; step > 0; step >>= 1)
        value += __shfl_xor_sync(FULL_WARP, (long long)value, step);
    return value;
}

/* Bulk copies: global -> shared completes on an mbarrier, shared -> global by the thread's bulk groups.
 * ------------- */

static __device__ __forceinline__ uint32_t shared_address(const void *pointer)
{
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

static __device__ __forceinline__ void mbarrier_init(uint32_t barrier)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

/* After mbarrier_expect of its bytes. */
static __device__ __forceinline__ void bulk_copy(uint32_t to, const void *from, uint32_t bytes,
                                                 uint32_t barrier)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

static __device__ __forceinline__ void bulk_load(uint32_t to, const void *from, uint32_t bytes,
                                                 uint32_t barrier)
{
    mbarrier_expect(barrier, bytes);
    bulk_copy(to, from, bytes, barrier);
}

/* Ends when the hardware has finished the copy: no other rank can delay it. */
static __device__ __forceinline__ void bulk_load_wait(uint32_t barrier, uint32_t parity)
{
    uint32_t done = 0;
    while (!done)
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
}

static __device__ __forceinline__ void bulk_store(void *to, uint32_t from, uint32_t bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
}

static __device__ __forceinline__ void bulk_commit()
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* The shared memory of all but the latest PENDING committed groups may be written again. */
template <int PENDING> static __device__ __forceinline__ void bulk_wait_read()
{
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

/* All but the latest PENDING groups have been written where they go. */
template <int PENDING> static __device__ __forceinline__ void bulk_wait_written()
{
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* Between ordinary accesses of this thread and bulk copies that follow: to shared memory, or to global memory
 * that another device has written. */
static __device__ __forceinline__ void fence_bulk_shared()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

static __device__ __forceinline__ void fence_bulk_global()
{
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

/* Words in shared memory between warps of a block.
 * ------------------------------------------------------------------ */

static __device__ __forceinline__ void store_release_shared(uint32_t *word, uint32_t value)
{
    asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(shared_address(word)), "r"(value)
                 : "memory");
}

static __device__ __forceinline__ uint32_t load_acquire_shared(const uint32_t *word)
{
    uint32_t value;
    asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];"
                 : "=r"(value)
                 : "r"(shared_address(word))
                 : "memory");
    return value;
}

/* Flag words between devices.
 * --------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void fence_system()
{
    asm volatile("fence.acq_rel.sys;" ::: "memory");
}

static __device__ __forceinline__ void fence_device()
{
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

static __device__ __forceinline__ void store_flag(uint32_t *flag, uint32_t value)
{
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

static __device__ __forceinline__ uint32_t load_relaxed(const uint32_t *flag)
{
    uint32_t value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

static __device__ __forceinline__ uint32_t load_acquire(const uint32_t *flag)
{
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

/* Waits for flag == value, or >= value (counting round) unless exact. False if the abort word was set
 * meanwhile. Hundreds of warps may wait at once: after a few looks they look seldom, so that they do not slow
 * down those who work, and at the abort word very seldom. */
static constexpr uint32_t EAGER_LOOKS = 4, LOOK_NANOSECONDS = 100, LOOKS_PER_ABORT = 128;

static __device__ __forceinline__ bool wait_flag(const uint32_t *flag, uint32_t value, bool exact,
                                                 const uint32_t *abort_word)
{
    for (uint32_t n = 1;; n++) {
        uint32_t seen = load_relaxed(flag);
        if (exact ? seen == value : (int32_t)(seen - value) >= 0) {
            load_acquire(flag);
            return true;
        }
        if (n > EAGER_LOOKS)
            __nanosleep(LOOK_NANOSECONDS);
        if (n % LOOKS_PER_ABORT == 0 && load_relaxed(abort_word) != 0)
            return false;
    }
}

#endif
