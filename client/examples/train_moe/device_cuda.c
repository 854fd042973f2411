#include <cuda_runtime_api.h>
#include <stdio.h>
#include <string.h>

#include "device.h"

static enum epd_status check(cudaError_t error, const char *what)
{
    if (error == cudaSuccess)
        return EPD_OK;
    fprintf(stderr, "epd-train-moe: %s: %s\n", what, cudaGetErrorString(error));
    return EPD_CUDA;
}

enum epd_status device_select(const uint8_t uuid[16])
{
    int n = 0;
    enum epd_status status = check(cudaGetDeviceCount(&n), "counting GPUs");
    for (int i = 0; status == EPD_OK && i < n; i++) {
        struct cudaDeviceProp properties;
        status = check(cudaGetDeviceProperties(&properties, i), "GPU properties");
        if (status == EPD_OK && memcmp(properties.uuid.bytes, uuid, 16) == 0)
            return check(cudaSetDevice(i), "selecting the GPU");
    }
    if (status == EPD_OK)
        fprintf(stderr, "epd-train-moe: the group's GPU is not among the %d that this process sees\n", n);
    return status == EPD_OK ? EPD_INVALID_DEVICE : status;
}

enum epd_status device_copy(void *to, const void *from, size_t n_bytes)
{
    return check(cudaMemcpy(to, from, n_bytes, cudaMemcpyDefault), "copying to or from the GPU");
}
