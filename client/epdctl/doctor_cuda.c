/* The driver library is loaded at run time: epdctl itself depends on no NVIDIA software and tells the truth
 * where there is none. Only functions of the stable driver ABI are used; the types are spelled out so that no
 * CUDA header is needed. */
#include <dlfcn.h>
#include <stdio.h>

#include "client/epdctl/doctor.h"
#include "proto/mps.h"

#define MAX_CUDA_DEVICES 16
/* CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR */
#define ATTRIBUTE_MAJOR 75
#define ATTRIBUTE_MINOR 76

struct driver {
    int (*init)(unsigned flags);
    int (*version)(int *version);
    int (*count)(int *count);
    int (*name)(char *name, int bytes, int device);
    int (*attribute)(int *value, int attribute, int device);
    int (*can_access)(int *can, int device, int peer);
};

static int load_symbol(void *library, const char *name, void *function)
{
    *(void **)function = dlsym(library, name);
    return *(void **)function != NULL;
}

static int driver_load(struct driver *driver, void *library)
{
    return load_symbol(library, "cuInit", &driver->init) &&
           load_symbol(library, "cuDriverGetVersion", &driver->version) &&
           load_symbol(library, "cuDeviceGetCount", &driver->count) &&
           load_symbol(library, "cuDeviceGetName", &driver->name) &&
           load_symbol(library, "cuDeviceGetAttribute", &driver->attribute) &&
           load_symbol(library, "cuDeviceCanAccessPeer", &driver->can_access);
}

static void report_devices(struct doctor *doctor, const struct driver *driver, int n_devices)
{
    for (int device = 0; device < n_devices && device < MAX_CUDA_DEVICES; device++) {
        char name[128] = "";
        int major = 0, minor = 0;
        (void)driver->name(name, sizeof(name), device);
        (void)driver->attribute(&major, ATTRIBUTE_MAJOR, device);
        (void)driver->attribute(&minor, ATTRIBUTE_MINOR, device);
        doctor_report(doctor, FINDING_OK, "GPU", NULL, "%d: %s, compute capability %d.%d", device, name,
                      major, minor);
    }
}

static void report_peers(struct doctor *doctor, const struct driver *driver, int n_devices)
{
    int n_missing = 0;
    for (int device = 0; device < n_devices; device++) {
        for (int peer = 0; peer < n_devices; peer++) {
            int can = 0;
            if (device != peer && (driver->can_access(&can, device, peer) != 0 || !can))
                n_missing++;
        }
    }
    if (n_devices < 2)
        return;
    doctor_report(
        doctor, n_missing ? FINDING_WARN : FINDING_OK, "peer access",
        "ranks of a group must sit on GPUs that reach each other (NVLink); check `nvidia-smi topo -m`",
        "%d of %d pairs of GPUs cannot reach each other's memory", n_missing, n_devices * (n_devices - 1));
}

/* Without MPS the contexts of a client and of the daemon on one GPU take turns in slices of time. The numbers are those of
 * `epd-bench --op handoff` by four ranks, one H200 each, with a kernel of the client before each launch. */
static void report_mps(struct doctor *doctor)
{
    char path[512];
    const int found = mps_find(path, sizeof(path));
    doctor_report(
        doctor, found ? FINDING_OK : FINDING_WARN, "MPS",
        "start nvidia-cuda-mps-control -d before the daemon and its clients (measured on an H200: 20 us a "
        "hand-off); measure here: epd-bench --op handoff",
        found ? "control pipe %s"
              : "no control pipe %s: every hand-off between a client and the daemon on one GPU "
                "waits for a change of context, up to about 300 us",
        path);
}

void doctor_cuda(struct doctor *doctor)
{
    struct driver driver = {0};
    int version = 0, n_devices = 0;
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        doctor_report(doctor, FINDING_OK, "CUDA", NULL, "no NVIDIA driver here; the host backend needs none");
        return;
    }
    if (!driver_load(&driver, library)) {
        doctor_report(doctor, FINDING_FAIL, "CUDA", "reinstall the NVIDIA driver",
                      "libcuda.so.1 lacks functions every driver has");
        return;
    }
    const int error = driver.init(0);
    if (error != 0) {
        doctor_report(doctor, FINDING_WARN, "CUDA",
                      "load the kernel module; check that /dev/nvidia* can be opened",
                      "the driver is installed, but cuInit fails with error %d", error);
        return;
    }
    (void)driver.version(&version);
    (void)driver.count(&n_devices);
    doctor_report(doctor, n_devices ? FINDING_OK : FINDING_WARN, "CUDA",
                  "check that a GPU is visible: nvidia-smi", "driver for CUDA %d.%d, %d GPUs", version / 1000,
                  version % 1000 / 10, n_devices);
    report_devices(doctor, &driver, n_devices);
    report_peers(doctor, &driver, n_devices);
    if (n_devices)
        report_mps(doctor);
}
