/* Preloaded into a daemon: when the test says so, the worker's own context on one GPU is lost, as by an error of the
 * hardware or, under MPS, of a neighbour. The test says it through a page in the file that FAULT_GPU_SHIM names. */
#include "tests/gpu/fault/worker_shim.h"

#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/gpu/fault/gpu_rank.h"

#define LOOK_US 2000

static int in_worker(void)
{
    char text[4096] = "";
    FILE *file = fopen("/proc/self/cmdline", "r");
    size_t n = file ? fread(text, 1, sizeof text - 1, file) : 0;
    if (file)
        fclose(file);
    return memmem(text, n, "--worker", strlen("--worker")) != NULL;
}

static void *look(void *arg)
{
    struct worker_shim *shim = arg;
    for (;;) {
        const int device = atomic_exchange(&shim->crash_device, -1);
        if (device >= 0 && cudaSetDevice(device) == cudaSuccess) {
            gpu_crash();
            atomic_fetch_add(&shim->n_crashes, 1);
        }
        int own = (int)getpid();
        if (atomic_compare_exchange_strong(&shim->hold_worker, &own, 0) && cudaSetDevice(0) == cudaSuccess)
            gpu_hold();
        usleep(LOOK_US);
    }
    return NULL;
}

__attribute__((constructor)) static void open_shim(void)
{
    const char *path = getenv("FAULT_GPU_SHIM");
    int fd = path && in_worker() ? open(path, O_RDWR | O_CLOEXEC) : -1;
    pthread_t thread;
    if (fd < 0)
        return;
    void *page = mmap(NULL, sizeof(struct worker_shim), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (page != MAP_FAILED && pthread_create(&thread, NULL, look, page) == 0)
        pthread_detach(thread);
}
