/* wgmma, D[64, N] (+)= A[64, 16] B[N, 16]^T for every N the instruction has, operands in shared memory, D in registers.
 * The register list of an inline instruction must be spelled out, hence the tables of macros: REGS_n is the text of
 * the n / 2 registers, DATA_n their operands; the numbers after them are those of the two descriptors, the
 * accumulate flag and the two transpose flags. Device code only. */
#ifndef EPD_KERNELS_GEMM_SM90_WGMMA_CUH
#define EPD_KERNELS_GEMM_SM90_WGMMA_CUH

#include <stdint.h>

namespace sm90 {

/* How a tile lies in shared memory, all with the 128-byte swizzle (layout type 1).
 * Reduction-major: rows of 64 reduction elements, 8 rows = 1024 bytes. Outer-major: rows of 64 outer elements, one row
 * per reduction index, 8 of them = 1024 bytes; 64 such rows make a chunk and chunk follows chunk every 8192 bytes. */
constexpr uint64_t DESCRIPTOR_BASE = (1ull << 62) | (uint64_t(1024 >> 4) << 32) | (uint64_t(8192 >> 4) << 16);

__device__ __forceinline__ uint64_t descriptor(uint32_t smem)
{
    return DESCRIPTOR_BASE | ((smem & 0x3ffff) >> 4);
}

/* Bytes >> 4 to the next 16 reduction elements. */
template <bool OUTER_MAJOR> constexpr uint64_t descriptor_step()
{
    return OUTER_MAJOR ? 2048 >> 4 : 32 >> 4;
}

__device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

template <int N, bool F16, bool TRANSPOSE_A, bool TRANSPOSE_B> struct wgmma;

// clang-format off
#define REGS_8 "%0, %1, %2, %3"
#define REGS_16 REGS_8 ", %4, %5, %6, %7"
#define REGS_24 REGS_16 ", %8, %9, %10, %11"
#define REGS_32 REGS_24 ", %12, %13, %14, %15"
#define REGS_40 REGS_32 ", %16, %17, %18, %19"
#define REGS_48 REGS_40 ", %20, %21, %22, %23"
#define REGS_56 REGS_48 ", %24, %25, %26, %27"
#define REGS_64 REGS_56 ", %28, %29, %30, %31"
#define REGS_72 REGS_64 ", %32, %33, %34, %35"
#define REGS_80 REGS_72 ", %36, %37, %38, %39"
#define REGS_88 REGS_80 ", %40, %41, %42, %43"
#define REGS_96 REGS_88 ", %44, %45, %46, %47"
#define REGS_104 REGS_96 ", %48, %49, %50, %51"
#define REGS_112 REGS_104 ", %52, %53, %54, %55"
#define REGS_120 REGS_112 ", %56, %57, %58, %59"
#define REGS_128 REGS_120 ", %60, %61, %62, %63"
#define REGS_136 REGS_128 ", %64, %65, %66, %67"
#define REGS_144 REGS_136 ", %68, %69, %70, %71"
#define REGS_152 REGS_144 ", %72, %73, %74, %75"
#define REGS_160 REGS_152 ", %76, %77, %78, %79"
#define REGS_168 REGS_160 ", %80, %81, %82, %83"
#define REGS_176 REGS_168 ", %84, %85, %86, %87"
#define REGS_184 REGS_176 ", %88, %89, %90, %91"
#define REGS_192 REGS_184 ", %92, %93, %94, %95"
#define REGS_200 REGS_192 ", %96, %97, %98, %99"
#define REGS_208 REGS_200 ", %100, %101, %102, %103"
#define REGS_216 REGS_208 ", %104, %105, %106, %107"
#define REGS_224 REGS_216 ", %108, %109, %110, %111"
#define REGS_232 REGS_224 ", %112, %113, %114, %115"
#define REGS_240 REGS_232 ", %116, %117, %118, %119"
#define REGS_248 REGS_240 ", %120, %121, %122, %123"
#define REGS_256 REGS_248 ", %124, %125, %126, %127"
#define DATA(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DATA_8 DATA(0)
#define DATA_16 DATA_8, DATA(4)
#define DATA_24 DATA_16, DATA(8)
#define DATA_32 DATA_24, DATA(12)
#define DATA_40 DATA_32, DATA(16)
#define DATA_48 DATA_40, DATA(20)
#define DATA_56 DATA_48, DATA(24)
#define DATA_64 DATA_56, DATA(28)
#define DATA_72 DATA_64, DATA(32)
#define DATA_80 DATA_72, DATA(36)
#define DATA_88 DATA_80, DATA(40)
#define DATA_96 DATA_88, DATA(44)
#define DATA_104 DATA_96, DATA(48)
#define DATA_112 DATA_104, DATA(52)
#define DATA_120 DATA_112, DATA(56)
#define DATA_128 DATA_120, DATA(60)
#define DATA_136 DATA_128, DATA(64)
#define DATA_144 DATA_136, DATA(68)
#define DATA_152 DATA_144, DATA(72)
#define DATA_160 DATA_152, DATA(76)
#define DATA_168 DATA_160, DATA(80)
#define DATA_176 DATA_168, DATA(84)
#define DATA_184 DATA_176, DATA(88)
#define DATA_192 DATA_184, DATA(92)
#define DATA_200 DATA_192, DATA(96)
#define DATA_208 DATA_200, DATA(100)
#define DATA_216 DATA_208, DATA(104)
#define DATA_224 DATA_216, DATA(108)
#define DATA_232 DATA_224, DATA(112)
#define DATA_240 DATA_232, DATA(116)
#define DATA_248 DATA_240, DATA(120)
#define DATA_256 DATA_248, DATA(124)
#define WGMMA_TEXT(n, type, a, b, p, ta, tb)                                                                 \
    "{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #p ", 0;\n"                                                   \
    "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" REGS_##n "}, "                       \
    "%" #a ", %" #b ", keep, 1, 1, %" #ta ", %" #tb ";\n}"
#define WGMMA(n, a, b, p, ta, tb)                                                                            \
    template <bool F16, bool TA, bool TB> struct wgmma<n, F16, TA, TB> {                                     \
        template <int S> static __device__ __forceinline__ void run(float (&d)[S], uint64_t da, uint64_t db, int keep) \
        {                                                                                                    \
            if constexpr (F16)                                                                               \
                asm volatile(WGMMA_TEXT(n, "f16", a, b, p, ta, tb)                                           \
                             : DATA_##n : "l"(da), "l"(db), "r"(keep), "n"(int(TA)), "n"(int(TB)));          \
            else                                                                                             \
                asm volatile(WGMMA_TEXT(n, "bf16", a, b, p, ta, tb)                                          \
                             : DATA_##n : "l"(da), "l"(db), "r"(keep), "n"(int(TA)), "n"(int(TB)));          \
        }                                                                                                    \
    };
WGMMA(8, 4, 5, 6, 7, 8)
WGMMA(16, 8, 9, 10, 11, 12)
WGMMA(24, 12, 13, 14, 15, 16)
WGMMA(32, 16, 17, 18, 19, 20)
WGMMA(40, 20, 21, 22, 23, 24)
WGMMA(48, 24, 25, 26, 27, 28)
WGMMA(56, 28, 29, 30, 31, 32)
WGMMA(64, 32, 33, 34, 35, 36)
WGMMA(72, 36, 37, 38, 39, 40)
WGMMA(80, 40, 41, 42, 43, 44)
WGMMA(88, 44, 45, 46, 47, 48)
WGMMA(96, 48, 49, 50, 51, 52)
WGMMA(104, 52, 53, 54, 55, 56)
WGMMA(112, 56, 57, 58, 59, 60)
WGMMA(120, 60, 61, 62, 63, 64)
WGMMA(128, 64, 65, 66, 67, 68)
WGMMA(136, 68, 69, 70, 71, 72)
WGMMA(144, 72, 73, 74, 75, 76)
WGMMA(152, 76, 77, 78, 79, 80)
WGMMA(160, 80, 81, 82, 83, 84)
WGMMA(168, 84, 85, 86, 87, 88)
WGMMA(176, 88, 89, 90, 91, 92)
WGMMA(184, 92, 93, 94, 95, 96)
WGMMA(192, 96, 97, 98, 99, 100)
WGMMA(200, 100, 101, 102, 103, 104)
WGMMA(208, 104, 105, 106, 107, 108)
WGMMA(216, 108, 109, 110, 111, 112)
WGMMA(224, 112, 113, 114, 115, 116)
WGMMA(232, 116, 117, 118, 119, 120)
WGMMA(240, 120, 121, 122, 123, 124)
WGMMA(248, 124, 125, 126, 127, 128)
WGMMA(256, 128, 129, 130, 131, 132)
#undef WGMMA
#undef WGMMA_TEXT
// clang-format on

} // namespace sm90

#endif
