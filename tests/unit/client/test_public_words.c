/* The words of client/epd.h equal those of proto/, and none is missing there. */
#include <check.h>
#include <string.h>

#include "proto/limits.h"
#include "proto/status.h"
#include "proto/words.h"
#include "tests/unit/client/public_words.h"

static long public_value(const char *name)
{
    for (const struct word *word = public_words; word->name; word++)
        if (strcmp(word->name, name) == 0)
            return word->value;
    return -1;
}

START_TEST(public_words_equal_those_of_the_ground_floor)
{
    for (const struct word *word = ground_words; word->name; word++)
        ck_assert_msg(public_value(word->name) == word->value, "%s: epd.h has %ld, proto has %ld", word->name,
                      public_value(word->name), word->value);
}
END_TEST

START_TEST(public_header_has_every_status)
{
#define HAS_STATUS(id, number, text) ck_assert_int_eq(public_value(#id), number);
    EPD_STATUS_TABLE(HAS_STATUS)
#undef HAS_STATUS
}
END_TEST

/* A word that only proto has would shift the count of its enum. */
START_TEST(public_header_has_every_op_role_and_phase)
{
    ck_assert_int_eq(public_value("EPD_OP_COUNT"), EPD_OP_COUNT);
    ck_assert_int_eq(public_value("EPD_ROLE_COUNT"), EPD_ROLE_COUNT);
    ck_assert_int_eq(public_value("EPD_PHASE_COUNT"), EPD_PHASE_COUNT);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("public words");
    TCase *cases = tcase_create("words");

    tcase_add_test(cases, public_words_equal_those_of_the_ground_floor);
    tcase_add_test(cases, public_header_has_every_status);
    tcase_add_test(cases, public_header_has_every_op_role_and_phase);
    suite_add_tcase(suite, cases);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
