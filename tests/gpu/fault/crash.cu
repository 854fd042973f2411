// A kernel that writes where nothing is: the context that runs it is lost (error 700). And one that does not end.
#include <cuda_runtime_api.h>

static __global__ void crash_kernel(int *nowhere)
{
    *nowhere = 1;
}

extern "C" void gpu_crash(void)
{
    crash_kernel<<<1, 1>>>(reinterpret_cast<int *>(64));
    (void)cudaDeviceSynchronize();
}

static __global__ void hold_kernel(const volatile int *ends)
{
    while (!*ends)
        __nanosleep(1000);
}

extern "C" void gpu_hold(void)
{
    int *ends = nullptr;
    void *block = nullptr;
    if (cudaMallocHost(&ends, sizeof *ends) != cudaSuccess || cudaMalloc(&block, 1 << 20) != cudaSuccess)
        return;
    *ends = 0;
    hold_kernel<<<1, 1>>>(ends);
    (void)cudaFree(block);
}
