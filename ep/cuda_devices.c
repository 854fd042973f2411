#include "ep/cuda_devices.h"

#include <ctype.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ep/cuda_driver.h"

#define NAME_BYTES 64

/* Refused for a moment: an MPS server that ends the clients of a fault, a machine that is still starting. */
static int comes_back(cudaError_t result)
{
    switch (result) {
    case cudaErrorDevicesUnavailable:
    case cudaErrorSystemNotReady:
    case cudaErrorMpsConnectionFailed:
    case cudaErrorMpsRpcFailure:
    case cudaErrorMpsServerNotReady:
    case cudaErrorMpsMaxClientsReached:
    case cudaErrorMpsMaxConnectionsReached:
    case cudaErrorMpsClientTerminated:
        return 1;
    default:
        return 0;
    }
}

int cuda_devices_available(struct epd_error *reason)
{
    int n = 0;
    cudaError_t result = cudaGetDeviceCount(&n);
    if (result == cudaSuccess && n > 0)
        return 1;
    (void)cudaGetLastError();
    if (comes_back(result))
        error_set(reason, EPD_CUDA, "the GPUs cannot be used now: %s", cudaGetErrorString(result));
    else if (result == cudaErrorInsufficientDriver)
        error_set(reason, EPD_UNSUPPORTED, "no NVIDIA driver, or one older than CUDA %d.%d",
                  CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    else
        error_set(reason, EPD_UNSUPPORTED, "no GPU: %s",
                  result == cudaSuccess ? "CUDA counts 0 devices" : cudaGetErrorString(result));
    return 0;
}

/* 32 hex digits; "GPU-" in front and dashes are passed over. 0 if the name is none. */
static int parse_uuid(const char *name, unsigned char uuid[EPD_UUID_BYTES])
{
    int n_digits = 0;
    if (strncmp(name, "GPU-", 4) == 0)
        name += 4;
    for (; *name; name++) {
        if (*name == '-')
            continue;
        if (!isxdigit((unsigned char)*name) || n_digits == 2 * EPD_UUID_BYTES)
            return 0;
        int digit = isdigit((unsigned char)*name) ? *name - '0' : tolower((unsigned char)*name) - 'a' + 10;
        unsigned char *byte = &uuid[n_digits++ / 2];
        *byte = (unsigned char)(*byte << 4 | digit);
    }
    return n_digits == 2 * EPD_UUID_BYTES;
}

static enum epd_status find_uuid(const char *name, int n_gpus, int *ordinal, struct epd_error *error)
{
    unsigned char uuid[EPD_UUID_BYTES] = {0};
    if (!parse_uuid(name, uuid))
        return error_set(error, EPD_INVALID_ARGUMENT, "device %s: want an index or a UUID", name);
    for (int i = 0; i < n_gpus; i++) {
        struct cudaDeviceProp properties;
        if (cuda_runtime_check(cudaGetDeviceProperties(&properties, i), "device properties", error))
            return error->status;
        if (memcmp(properties.uuid.bytes, uuid, sizeof uuid) == 0) {
            *ordinal = i;
            return EPD_OK;
        }
    }
    return error_set(error, EPD_INVALID_DEVICE, "device %s is not among the %d GPUs here", name, n_gpus);
}

static enum epd_status find_device(const char *name, int n_gpus, int *ordinal, struct epd_error *error)
{
    char *end;
    unsigned long idx = strtoul(name, &end, 10);
    if (*name == 0 || *end || !isdigit((unsigned char)*name) || strlen(name) > 4)
        return find_uuid(name, n_gpus, ordinal, error);
    if (idx >= (unsigned long)n_gpus)
        return error_set(error, EPD_INVALID_DEVICE, "device %lu, want 0..%d", idx, n_gpus - 1);
    *ordinal = (int)idx;
    return EPD_OK;
}

static enum epd_status add_device(struct cuda_devices *devices, const char *name, int n_gpus,
                                  struct epd_error *error)
{
    int ordinal = -1;
    if (find_device(name, n_gpus, &ordinal, error))
        return error->status;
    for (uint32_t i = 0; i < devices->n; i++)
        if (devices->ordinals[i] == ordinal)
            return error_set(error, EPD_INVALID_ARGUMENT, "device %s is named twice", name);
    if (devices->n == EPD_MAX_DEVICES)
        return error_set(error, EPD_INVALID_ARGUMENT, "more than %d devices", EPD_MAX_DEVICES);
    devices->ordinals[devices->n++] = ordinal;
    return EPD_OK;
}

/* A name and what follows its comma; NULL after the last. */
static const char *next_name(const char *names, char name[NAME_BYTES])
{
    while (*names == ' ')
        names++;
    size_t length = strcspn(names, ",");
    snprintf(name, NAME_BYTES, "%.*s", (int)(length < NAME_BYTES ? length : NAME_BYTES - 1), names);
    for (size_t end = strlen(name); end > 0 && name[end - 1] == ' '; end--)
        name[end - 1] = 0;
    return names[length] ? names + length + 1 : NULL;
}

enum epd_status cuda_devices_choose(const char *names, struct cuda_devices *devices, struct epd_error *error)
{
    struct cuda_devices chosen = {0};
    int n_gpus = 0;
    if (!cuda_devices_available(error) ||
        cuda_runtime_check(cudaGetDeviceCount(&n_gpus), "device count", error))
        return error->status;
    if (!names || !*names) {
        chosen.n = n_gpus < EPD_MAX_DEVICES ? (uint32_t)n_gpus : EPD_MAX_DEVICES;
        for (uint32_t i = 0; i < chosen.n; i++)
            chosen.ordinals[i] = (int)i;
    }
    while (names && *names) {
        char name[NAME_BYTES];
        names = next_name(names, name);
        if (add_device(&chosen, name, n_gpus, error))
            return error->status;
    }
    *devices = chosen;
    return EPD_OK;
}
