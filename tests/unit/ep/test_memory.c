/* Owned and imported memory: limits, seals, ranges, the import cache, and that everything is counted back. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ep/memory_impl.h"
#include "tests/unit/ep/harness.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

static int make_memfd(uint64_t bytes, int seals)
{
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(ftruncate(fd, (off_t)bytes), 0);
    if (seals)
        ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}

static struct memory_request import_request(int fd, uint64_t offset, uint64_t bytes)
{
    return (struct memory_request){.kind = EPD_MEMORY_MEMFD, .fd = fd, .offset = offset, .bytes = bytes};
}

static void expect_refused(struct harness *harness, struct memory_request request, enum epd_status status,
                           const char *text)
{
    struct epd_error error;
    struct memory *memory = NULL;
    ck_assert_int_eq(harness_acquire(harness, &request, &memory, &error), status);
    ck_assert_msg(strstr(error.text, text) != NULL, "%s, want %s", error.text, text);
}

static struct memory *acquire(struct harness *harness, struct memory_request request)
{
    struct epd_error error;
    struct memory *memory = NULL;
    ck_assert_msg(harness_acquire(harness, &request, &memory, &error) == EPD_OK, "%s", error.text);
    return memory;
}

START_TEST(imports_are_checked_before_they_are_mapped)
{
    struct harness harness;
    harness_open(&harness, 2, 0);
    expect_refused(&harness, import_request(make_memfd(8192, 0), 0, 8192), EPD_INVALID_ARGUMENT,
                   "seals 0x0, want F_SEAL_SHRINK");
    expect_refused(&harness, import_request(make_memfd(8192, F_SEAL_SHRINK | F_SEAL_WRITE), 0, 8192),
                   EPD_INVALID_ARGUMENT, "sealed against writing");
    expect_refused(&harness, import_request(open("/dev/null", O_RDWR | O_CLOEXEC), 0, 4096),
                   EPD_INVALID_ARGUMENT, "not a memfd");
    const uint64_t bad[][2] = {
        {0, 8193}, {8192, 1}, {1, 8192}, {UINT64_MAX - 10, 5}, {4096, UINT64_MAX - 4096}};
    for (size_t i = 0; i < COUNT(bad); i++)
        expect_refused(&harness, import_request(make_memfd(8192, F_SEAL_SHRINK), bad[i][0], bad[i][1]),
                       EPD_OUT_OF_RANGE, "the file has 8192 bytes");
    expect_refused(&harness, import_request(make_memfd(8192, F_SEAL_SHRINK), UINT64_MAX - 1, 5),
                   EPD_OUT_OF_RANGE, "offset");
    expect_refused(&harness, import_request(make_memfd(8192, F_SEAL_SHRINK), 0, 0), EPD_OUT_OF_RANGE,
                   "bytes 0");
    struct memory_request request = import_request(make_memfd(8192, F_SEAL_SHRINK), 0, 8192);
    request.device_idx = 2;
    expect_refused(&harness, request, EPD_INVALID_DEVICE, "device 2, want 0..1");
    request = import_request(make_memfd(8192, F_SEAL_SHRINK), 0, 8192);
    request.kind = EPD_MEMORY_CUDA_VMM;
    expect_refused(&harness, request, EPD_UNSUPPORTED, "memfds");
    request = import_request(-1, 0, 8192);
    expect_refused(&harness, request, EPD_INVALID_ARGUMENT, "with an fd");
    request = (struct memory_request){.kind = EPD_MEMORY_CUDA_IPC, .bytes = 64, .fd = -1};
    expect_refused(&harness, request, EPD_UNSUPPORTED, "memfds");
    harness_close(&harness);
}
END_TEST

START_TEST(imports_of_one_file_share_a_mapping)
{
    struct harness harness;
    struct device_info info;
    harness_open(&harness, 1, 0);
    int fd = make_memfd(1 << 20, F_SEAL_SHRINK);
    char *own = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    strcpy(own + 8200, "hello");
    struct memory *whole = acquire(&harness, import_request(fcntl(fd, F_DUPFD_CLOEXEC, 0), 0, 65536));
    struct memory *part = acquire(&harness, import_request(fcntl(fd, F_DUPFD_CLOEXEC, 0), 8200, 100));
    struct memory *other = acquire(&harness, import_request(fcntl(fd, F_DUPFD_CLOEXEC, 0), 65000, 1000));
    ck_assert_str_eq(memory_data(part), "hello");
    ck_assert_ptr_eq(memory_data(part), (char *)memory_data(whole) + 8200);
    node_device_info(harness.node, 0, &info);
    ck_assert_uint_eq(info.n_imports, 3);
    ck_assert_uint_eq(info.imported_bytes, 65536 + 2 * 4096);
    /* The mapping stays as long as one of its imports does. */
    memory_release(whole);
    harness_settle(&harness);
    ck_assert_str_eq(memory_data(part), "hello");
    memory_release(part);
    memory_release(other);
    harness_settle(&harness);
    node_device_info(harness.node, 0, &info);
    ck_assert_uint_eq(info.imported_bytes, 0);
    munmap(own, 1 << 20);
    close(fd);
    harness_close(&harness);
}
END_TEST

START_TEST(owned_memory_is_zero_sealed_and_limited)
{
    struct harness harness;
    struct device_info info;
    harness_open(&harness, 1, 1 << 20);
    struct memory_request request = {.kind = EPD_MEMORY_HEAP, .bytes = 600000, .fd = -1};
    struct memory *memory = acquire(&harness, request);
    int fd = memory_fd(memory);
    ck_assert_int_eq(fcntl(fd, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    ck_assert_int_ne(ftruncate(fd, 0), 0);
    for (size_t i = 0; i < 600000; i += 1000)
        ck_assert_int_eq(((char *)memory_data(memory))[i], 0);
    expect_refused(&harness, request, EPD_NO_MEMORY, "600000 bytes asked, 602112 of 1048576 in use");
    node_device_info(harness.node, 0, &info);
    ck_assert_uint_eq(info.heap_bytes, 602112);
    memory_retain(memory);
    memory_release(memory);
    memory_release(memory);
    harness_settle(&harness);
    memory_release(acquire(&harness, request));
    harness_settle(&harness);
    node_device_info(harness.node, 0, &info);
    ck_assert_uint_eq(info.heap_bytes, 0);
    ck_assert_uint_eq(info.heap_peak_bytes, 602112);
    request.bytes = UINT64_MAX;
    expect_refused(&harness, request, EPD_NO_MEMORY, "asked");
    harness_close(&harness);
}
END_TEST

START_TEST(devices_are_found_by_uuid)
{
    struct harness harness;
    struct device_info info;
    struct epd_error error;
    uint32_t idx;
    harness_open(&harness, 3, 0);
    for (uint32_t i = 0; i < 3; i++) {
        node_device_info(harness.node, i, &info);
        ck_assert_int_eq(node_find_device(harness.node, info.uuid, &idx, &error), EPD_OK);
        ck_assert_uint_eq(idx, i);
    }
    info.uuid[0] ^= 1;
    ck_assert_int_eq(node_find_device(harness.node, info.uuid, &idx, &error), EPD_INVALID_DEVICE);
    ck_assert_msg(strstr(error.text, "6570642d686f73742d64657669636500") != NULL, "%s", error.text);
    harness_close(&harness);
}
END_TEST

START_TEST(a_node_refuses_what_it_does_not_have)
{
    struct node *node;
    struct epd_error error;
    struct node_config config = {.backend = EPD_BACKEND_HOST, .n_devices = EPD_MAX_DEVICES + 1};
    ck_assert_int_eq(node_open(&config, &node, &error), EPD_INVALID_ARGUMENT);
    config.n_devices = 0;
    ck_assert_int_eq(node_open(&config, &node, &error), EPD_INVALID_ARGUMENT);
    config.n_devices = 1;
    config.gemm_engine = "sm90";
    ck_assert_int_eq(node_open(&config, &node, &error), EPD_UNSUPPORTED);
    ck_assert_str_eq(error.text, "gemm engine sm90: the host backend has cblas only");
    config.backend = (enum epd_backend_kind)77;
    ck_assert_int_eq(node_open(&config, &node, &error), EPD_UNSUPPORTED);
    ck_assert(node_backend_available(EPD_BACKEND_HOST, &error));
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        imports_are_checked_before_they_are_mapped, imports_of_one_file_share_a_mapping,
        owned_memory_is_zero_sealed_and_limited,    devices_are_found_by_uuid,
        a_node_refuses_what_it_does_not_have,
    };
    return suite_run("ep memory", tests, COUNT(tests));
}
