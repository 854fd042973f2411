/* exchange_test test [staged] [small|few] | bench [case|all] [dispatch block list] [combine block list]
 * [iterations] */
#include <string.h>

#include "tests/gpu/exchange/cluster.h"
#include "tests/gpu/exchange/test.h"

int main(int argc, char **argv)
{
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    if (device_count() == 0) {
        printf("SKIP: no GPU\n");
        return 77;
    }
    devices_start();
    if (argc > 1 && strcmp(argv[1], "bench") == 0)
        return bench_exchange(argc > 2 && strcmp(argv[2], "all") != 0 ? argv[2] : NULL,
                              argc > 3 ? argv[3] : NULL, argc > 4 ? argv[4] : NULL,
                              argc > 5 ? atoi(argv[5]) : 40) != 0;
    int fused = 1, small = 0;
    for (int i = 2; i < argc; i++) {
        fused &= strcmp(argv[i], "staged") != 0;
        small |= strcmp(argv[i], "small") == 0 ? 1 : strcmp(argv[i], "few") == 0 ? 3 : 0;
    }
    int failed = test_activation() + test_exchange(fused, small) + (fused ? test_abort() : 0);
    printf("%s: %d devices, %d failures\n", failed ? "FAILED" : "PASSED", device_count(), failed);
    return failed != 0;
}
