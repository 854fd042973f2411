#include "ep/cuda_import.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/error.h"

struct cuda_mapping {
    enum epd_memory_kind kind;
    CUdeviceptr base;
    uint64_t bytes;
    CUmemGenericAllocationHandle handle; /* VMM */
    uint32_t n_imports;
    uint32_t n_opened; /* IPC: as CUDA counts; those beyond n_imports are to be closed */
    int counted;       /* IPC: its bytes have been told of as mapped */
    struct cuda_mapping *next;
};

static struct cuda_mapping *add_vmm(struct cuda_imports *imports, CUdeviceptr base, uint64_t bytes)
{
    struct cuda_mapping *mapping = calloc(1, sizeof *mapping);
    if (!mapping)
        return NULL;
    *mapping = (struct cuda_mapping){
        .kind = EPD_MEMORY_CUDA_VMM, .base = base, .bytes = bytes, .next = imports->first};
    imports->first = mapping;
    return mapping;
}

static enum epd_status check_range(const struct memory_request *request, uint64_t size,
                                   struct epd_error *error)
{
    if (request->offset > size || request->bytes > size - request->offset)
        return error_set(error, EPD_OUT_OF_RANGE,
                         "imported memory: offset %llu bytes %llu, the allocation has %llu bytes",
                         (unsigned long long)request->offset, (unsigned long long)request->bytes,
                         (unsigned long long)size);
    return EPD_OK;
}

static struct backend_import import_at(const struct memory_request *request, struct cuda_mapping *mapping,
                                       uint64_t mapped_bytes)
{
    mapping->n_imports++;
    return (struct backend_import){.data = (void *)(uintptr_t)(mapping->base + request->offset),
                                   .mapped_bytes = mapped_bytes,
                                   .mapping = mapping};
}

static void name_gpu(int ordinal, char name[2 * EPD_UUID_BYTES + 1])
{
    struct cudaDeviceProp properties;
    snprintf(name, 2 * EPD_UUID_BYTES + 1, "number %d", ordinal);
    if (cudaGetDeviceProperties(&properties, ordinal) != cudaSuccess) {
        (void)cudaGetLastError();
        return;
    }
    for (int i = 0; i < EPD_UUID_BYTES; i++)
        snprintf(name + 2 * i, 3, "%02x", (unsigned char)properties.uuid.bytes[i]);
}

/* What a request says about its GPU has been checked; this is where the memory really is. */
static enum epd_status check_gpu(const struct cuda_imports *imports, int ordinal, struct epd_error *error)
{
    char given[2 * EPD_UUID_BYTES + 1], want[2 * EPD_UUID_BYTES + 1];
    if (ordinal == imports->heap->ordinal)
        return EPD_OK;
    name_gpu(ordinal, given);
    name_gpu(imports->heap->ordinal, want);
    return error_set(error, EPD_INVALID_DEVICE,
                     "imported memory: it lies on GPU %s and was registered as memory of GPU %s", given,
                     want);
}

/* ---- cudaMalloc ---- */

static struct cuda_mapping *find_ipc(const struct cuda_imports *imports, CUdeviceptr base)
{
    for (struct cuda_mapping *mapping = imports->first; mapping; mapping = mapping->next)
        if (mapping->kind == EPD_MEMORY_CUDA_IPC && mapping->base == base)
            return mapping;
    return NULL;
}

static enum epd_status ipc_open(const struct memory_request *request, CUdeviceptr *base,
                                struct epd_error *error)
{
    cudaIpcMemHandle_t handle;
    void *opened = NULL;
    _Static_assert(sizeof handle == EPD_IPC_HANDLE_BYTES, "an IPC handle is what the wire carries");
    memcpy(&handle, request->ipc_handle, sizeof handle);
    cudaError_t result = cudaIpcOpenMemHandle(&opened, handle, cudaIpcMemLazyEnablePeerAccess);
    if (cuda_error_status((int)result) == EPD_CUDA) /* not the handle's fault */
        return cuda_runtime_check(result, "imported memory", error);
    if (result != cudaSuccess) {
        (void)cudaGetLastError();
        return error_set(error, EPD_INVALID_ARGUMENT, "imported memory: the IPC handle does not open: %s",
                         cudaGetErrorString(result));
    }
    *base = (CUdeviceptr)(uintptr_t)opened;
    return EPD_OK;
}

/* NULL and the error. From here on the handle is open, and closed when the device is idle, whatever is found out about it.
 * The mapping's place is made before that. */
static struct cuda_mapping *ipc_map(struct cuda_imports *imports, const struct memory_request *request,
                                    struct epd_error *error)
{
    CUdeviceptr base = 0;
    struct cuda_mapping *made = calloc(1, sizeof *made), *known;
    if (!made) {
        error_set(error, EPD_NO_MEMORY, "imported memory: %zu bytes", sizeof *made);
        return NULL;
    }
    if (ipc_open(request, &base, error)) {
        free(made);
        return NULL;
    }
    known = find_ipc(imports, base);
    if (known) {
        free(made);
        known->n_opened++;
        return known;
    }
    *made = (struct cuda_mapping){
        .kind = EPD_MEMORY_CUDA_IPC, .base = base, .n_opened = 1, .next = imports->first};
    imports->first = made;
    return made;
}

static enum epd_status ipc_check(const struct cuda_imports *imports, const struct memory_request *request,
                                 struct cuda_mapping *mapping, struct epd_error *error)
{
    const struct cuda_driver *driver = imports->heap->driver;
    size_t size = 0;
    if (cuda_driver_check(driver, driver->cuMemGetAddressRange(NULL, &size, mapping->base), "imported memory",
                          error))
        return error->status;
    mapping->bytes = size;
    return check_range(request, size, error);
}

static enum epd_status import_ipc(struct cuda_imports *imports, const struct memory_request *request,
                                  struct backend_import *import, struct epd_error *error)
{
    struct cuda_mapping *mapping = ipc_map(imports, request, error);
    if (!mapping)
        return error->status;
    if (ipc_check(imports, request, mapping, error)) {
        imports->n_to_close++;
        return error->status;
    }
    const uint64_t mapped_bytes = mapping->counted ? 0 : mapping->bytes;
    mapping->counted = 1;
    *import = import_at(request, mapping, mapped_bytes);
    return EPD_OK;
}

/* ---- VMM ---- */

static enum epd_status check_location(struct cuda_imports *imports, CUmemGenericAllocationHandle handle,
                                      struct epd_error *error)
{
    const struct cuda_driver *driver = imports->heap->driver;
    CUmemAllocationProp prop;
    if (cuda_driver_check(driver, driver->cuMemGetAllocationPropertiesFromHandle(&prop, handle),
                          "imported memory", error))
        return error->status;
    if (prop.location.type != CU_MEM_LOCATION_TYPE_DEVICE)
        return error_set(error, EPD_INVALID_DEVICE, "imported memory: it does not lie on a GPU");
    return check_gpu(imports, prop.location.id, error);
}

static enum epd_status import_vmm(struct cuda_imports *imports, const struct memory_request *request,
                                  struct backend_import *import, struct epd_error *error)
{
    const struct cuda_heap *heap = imports->heap;
    /* An allocation is mapped as a whole or not at all. */
    uint64_t end = request->allocation_bytes ? request->allocation_bytes : request->offset + request->bytes;
    uint64_t granularity = heap->granularity;
    uint64_t bytes = (end + granularity - 1) / granularity * granularity;
    CUmemGenericAllocationHandle handle;
    CUdeviceptr base = 0;
    CUresult result = heap->driver->cuMemImportFromShareableHandle(&handle, (void *)(uintptr_t)request->fd,
                                                                   CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (result != CUDA_SUCCESS)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "imported memory: the fd is no device memory of this node (%d)", (int)result);
    if (check_location(imports, handle, error))
        goto release;
    /* The driver refuses to map more than there is, and less. */
    if (cuda_heap_map(heap, handle, bytes, 0, &base, error)) {
        error_set(error, EPD_OUT_OF_RANGE, "imported memory: offset %llu bytes %llu cannot be mapped",
                  (unsigned long long)request->offset, (unsigned long long)request->bytes);
        goto release;
    }
    struct cuda_mapping *mapping = add_vmm(imports, base, bytes);
    if (!mapping) {
        error_set(error, EPD_NO_MEMORY, "imported memory: %zu bytes", sizeof *mapping);
        goto unmap;
    }
    mapping->handle = handle;
    *import = import_at(request, mapping, bytes);
    return EPD_OK;

unmap:
    cuda_heap_unmap(heap, base, bytes);
release:
    (void)heap->driver->cuMemRelease(handle);
    return error->status;
}

enum epd_status cuda_import(struct cuda_imports *imports, const struct memory_request *request,
                            struct backend_import *import, struct epd_error *error)
{
    switch (request->kind) {
    case EPD_MEMORY_CUDA_IPC:
        return import_ipc(imports, request, import, error);
    case EPD_MEMORY_CUDA_VMM:
        return import_vmm(imports, request, import, error);
    default:
        return error_set(error, EPD_UNSUPPORTED,
                         "memory kind %d: the CUDA backend imports CUDA IPC (%d) and VMM (%d) memory",
                         (int)request->kind, (int)EPD_MEMORY_CUDA_IPC, (int)EPD_MEMORY_CUDA_VMM);
    }
}

static void unlink_mapping(struct cuda_imports *imports, const struct cuda_mapping *mapping)
{
    struct cuda_mapping **link = &imports->first;
    while (*link != mapping)
        link = &(*link)->next;
    *link = mapping->next;
}

uint64_t cuda_unimport(struct cuda_imports *imports, struct cuda_mapping *mapping)
{
    assert(mapping->n_imports > 0);
    mapping->n_imports--;
    if (mapping->kind == EPD_MEMORY_CUDA_IPC) {
        imports->n_to_close++;
        return 0;
    }
    if (mapping->n_imports)
        return 0;
    const uint64_t bytes = mapping->bytes;
    unlink_mapping(imports, mapping);
    cuda_heap_unmap(imports->heap, mapping->base, bytes);
    (void)imports->heap->driver->cuMemRelease(mapping->handle);
    free(mapping);
    return bytes;
}

uint64_t cuda_imports_close(struct cuda_imports *imports)
{
    uint64_t bytes = 0;
    for (struct cuda_mapping *mapping = imports->first, *next; mapping; mapping = next) {
        next = mapping->next;
        if (mapping->kind != EPD_MEMORY_CUDA_IPC)
            continue;
        for (; mapping->n_opened > mapping->n_imports; mapping->n_opened--)
            (void)cudaIpcCloseMemHandle((void *)(uintptr_t)mapping->base);
        if (mapping->n_imports)
            continue;
        bytes += mapping->counted ? mapping->bytes : 0;
        unlink_mapping(imports, mapping);
        free(mapping);
    }
    imports->n_to_close = 0;
    return bytes;
}
