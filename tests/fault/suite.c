#include "tests/fault/suite.h"

#include <stdlib.h>

int suite_run(const char *name, const TTest *const *tests, unsigned n_tests, SFun setup, SFun teardown)
{
    Suite *suite = suite_create(name);
    TCase *list = tcase_create(name);
    tcase_set_timeout(list, SUITE_TIMEOUT_S);
    if (setup)
        tcase_add_checked_fixture(list, setup, teardown);
    for (unsigned i = 0; i < n_tests; i++)
        tcase_add_test(list, tests[i]);
    suite_add_tcase(suite, list);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_SILENT);
    const int n_failed = srunner_ntests_failed(runner);
    if (n_failed)
        srunner_print(runner, CK_NORMAL);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
