#include "tests/unit/kernels/suite.h"

#include <cblas.h>
#include <stdlib.h>

/* Sanitizer builds on a busy machine are slow; a test that hangs still ends. */
#define TEST_TIMEOUT_S 300

int suite_run(const char *name, const TTest *const *tests, size_t n_tests)
{
    openblas_set_num_threads(1);
    Suite *suite = suite_create(name);
    TCase *tcase = tcase_create(name);
    tcase_set_timeout(tcase, TEST_TIMEOUT_S);
    for (size_t i = 0; i < n_tests; i++)
        tcase_add_test(tcase, tests[i]);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
