// A kernel that writes where nothing is: the context that runs it is lost (error 700).
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
