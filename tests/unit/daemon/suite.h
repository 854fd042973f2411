/* The main function of a suite with one test case. */
#ifndef EPD_TESTS_UNIT_DAEMON_SUITE_H
#define EPD_TESTS_UNIT_DAEMON_SUITE_H

#include <check.h>

static inline int suite_run(const char *name, const TTest *const *tests, void (*setup)(void),
                            void (*teardown)(void))
{
    Suite *suite = suite_create(name);
    TCase *tcase = tcase_create(name);
    if (setup)
        tcase_add_checked_fixture(tcase, setup, teardown);
    tcase_set_timeout(tcase, 60);
    for (; *tests; tests++)
        tcase_add_test(tcase, *tests);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}

#endif
