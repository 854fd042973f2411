/* main() of the fault suites: runs a list of tests, silent unless one fails. */
#ifndef EPD_TESTS_FAULT_SUITE_H
#define EPD_TESTS_FAULT_SUITE_H

#include <check.h>

#define SUITE_TIMEOUT_S 300

/* setup and teardown run around every test, in its process; NULL: none. Returns the exit code of main. */
int suite_run(const char *name, const TTest *const *tests, unsigned n_tests, SFun setup, SFun teardown);

#define SUITE_COUNT(tests) ((unsigned)(sizeof(tests) / sizeof((tests)[0])))

#endif
