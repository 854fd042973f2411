/* What every test program of the ground floor does in main. */
#ifndef EPD_TESTS_UNIT_PROTO_SUITE_H
#define EPD_TESTS_UNIT_PROTO_SUITE_H

#include <check.h>

static inline int suite_run(const char *name, TCase *tcase)
{
    Suite *suite = suite_create(name);

    tcase_set_timeout(tcase, 120);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? 1 : 0;
}

#endif
