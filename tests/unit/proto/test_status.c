/* Results have stable numbers, names and one-line texts. */
#include <string.h>

#include "proto/status.h"
#include "tests/unit/proto/suite.h"

START_TEST(every_status_has_its_own_name_and_text)
{
    static const struct {
        enum epd_status status;
        uint32_t number;
        const char *name;
        const char *text;
    } table[] = {
#define ROW(id, number, text) {id, number, #id, text},
        EPD_STATUS_TABLE(ROW)
#undef ROW
    };

    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        ck_assert_uint_eq(table[i].number, i);
        ck_assert_str_eq(status_name(table[i].status), table[i].name);
        ck_assert_str_eq(status_text(table[i].status), table[i].text);
        ck_assert_int_eq(status_known(table[i].number), 1);
    }
}
END_TEST

START_TEST(a_number_outside_the_table_is_unknown)
{
    ck_assert_int_eq(status_known(34), 0);
    ck_assert_int_eq(status_known(UINT32_MAX), 0);
    ck_assert_str_eq(status_name((enum epd_status)34), "EPD_?");
    ck_assert_str_eq(status_text((enum epd_status)34), "unknown status");
}
END_TEST

START_TEST(error_set_returns_the_status_and_fills_the_text)
{
    struct epd_error error;

    ck_assert_int_eq(error_set(&error, EPD_INVALID_SHAPE, "rows %d, want %d", 241, 240), EPD_INVALID_SHAPE);
    ck_assert_int_eq(error.status, EPD_INVALID_SHAPE);
    ck_assert_str_eq(error.text, "rows 241, want 240");
}
END_TEST

START_TEST(error_set_cuts_long_texts_and_keeps_them_on_one_line)
{
    struct epd_error error;
    char lines[2 * EPD_ERROR_TEXT_BYTES];

    memset(lines, '\n', sizeof lines);
    lines[sizeof lines - 1] = 0;
    ck_assert_int_eq(error_set(&error, EPD_CUDA, "%s", lines), EPD_CUDA);
    ck_assert_uint_eq(strlen(error.text), EPD_ERROR_TEXT_BYTES - 1);
    ck_assert_uint_eq(strspn(error.text, " "), EPD_ERROR_TEXT_BYTES - 4);
    /* Who reads it knows that there was more. */
    ck_assert_str_eq(error.text + EPD_ERROR_TEXT_BYTES - 4, "...");
}
END_TEST

int main(void)
{
    TCase *tcase = tcase_create("status");

    tcase_add_test(tcase, every_status_has_its_own_name_and_text);
    tcase_add_test(tcase, a_number_outside_the_table_is_unknown);
    tcase_add_test(tcase, error_set_returns_the_status_and_fills_the_text);
    tcase_add_test(tcase, error_set_cuts_long_texts_and_keeps_them_on_one_line);
    return suite_run("status", tcase);
}
