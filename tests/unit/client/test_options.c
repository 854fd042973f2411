/* Versioned structs, socket paths, names and texts: what needs no daemon. */
#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/deadline.h"
#include "client/dial.h"
#include "client/options.h"
#include "client/public.h"

struct sample {
    size_t size;
    uint32_t first, second;
};
struct newer_sample {
    size_t size;
    uint32_t first, second;
    uint64_t third;
};

START_TEST(options_of_an_older_caller_have_a_zero_tail)
{
    struct sample given = {.size = offsetof(struct sample, second), .first = 5, .second = 77};
    struct sample known;
    struct epd_error error;

    ck_assert_int_eq(options_read(&known, sizeof known, &given, "sample", &error), EPD_OK);
    ck_assert_uint_eq(known.first, 5);
    ck_assert_uint_eq(known.second, 0);
}
END_TEST

START_TEST(options_of_a_newer_caller_are_taken_if_their_tail_is_zero)
{
    struct newer_sample given = {.size = sizeof given, .first = 5, .second = 6};
    struct sample known;
    struct epd_error error;

    ck_assert_int_eq(options_read(&known, sizeof known, &given, "sample", &error), EPD_OK);
    ck_assert_uint_eq(known.second, 6);
    given.third = 1ull << 40;
    ck_assert_int_eq(options_read(&known, sizeof known, &given, "sample", &error), EPD_INVALID_ARGUMENT);
    ck_assert_str_eq(error.text, "sample: size 24 with a field at byte 21 set, this library knows 16 bytes");
}
END_TEST

START_TEST(options_without_a_size_are_refused_by_name)
{
    struct sample given = {.size = 0, .first = 5};
    struct sample known;
    struct epd_error error;

    ck_assert_int_eq(options_read(&known, sizeof known, &given, "sample", &error), EPD_INVALID_ARGUMENT);
    ck_assert_str_eq(error.text, "sample: size 0, want sizeof(struct sample)");
    ck_assert_int_eq(options_read(&known, sizeof known, NULL, "sample", &error), EPD_INVALID_ARGUMENT);
    ck_assert_str_eq(error.text, "sample: NULL");
}
END_TEST

START_TEST(info_is_cut_for_an_older_caller_and_zeroed_for_a_newer_one)
{
    const struct sample known = {.size = sizeof known, .first = 1, .second = 2};
    struct newer_sample given = {.size = offsetof(struct newer_sample, second), .second = 9, .third = 9};
    struct epd_error error;

    ck_assert_int_eq(options_write(&given, &known, sizeof known, "sample", &error), EPD_OK);
    ck_assert_uint_eq(given.size, offsetof(struct newer_sample, second));
    ck_assert_uint_eq(given.first, 1);
    ck_assert_uint_eq(given.second, 9);
    given.size = sizeof given;
    ck_assert_int_eq(options_write(&given, &known, sizeof known, "sample", &error), EPD_OK);
    ck_assert_uint_eq(given.size, sizeof given);
    ck_assert_uint_eq(given.second, 2);
    ck_assert_uint_eq(given.third, 0);
}
END_TEST

START_TEST(socket_path_comes_from_the_first_place_that_names_one)
{
    char path[DIAL_PATH_BYTES];
    struct epd_error error;

    setenv("EPD_SOCKET", "/a/epd.sock", 1);
    setenv("XDG_RUNTIME_DIR", "/b", 1);
    ck_assert_int_eq(dial_path("/given", path, &error), EPD_OK);
    ck_assert_str_eq(path, "/given");
    ck_assert_int_eq(dial_path(NULL, path, &error), EPD_OK);
    ck_assert_str_eq(path, "/a/epd.sock");
    setenv("EPD_SOCKET", "", 1);
    ck_assert_int_eq(dial_path(NULL, path, &error), EPD_OK);
    ck_assert_str_eq(path, access("/run/epd/epd.sock", F_OK) == 0 ? "/run/epd/epd.sock" : "/b/epd/epd.sock");
    unsetenv("XDG_RUNTIME_DIR");
    ck_assert_int_eq(dial_path(NULL, path, &error), EPD_OK);
    ck_assert_str_eq(path, "/run/epd/epd.sock");
}
END_TEST

/* A user who is logged in has a folder for sockets of his own; the daemon of the machine has not put one there. */
START_TEST(socket_of_the_system_is_taken_where_the_user_has_none)
{
    const char *there = "/proc/self/status", *absent = "/proc/self/nothing";

    ck_assert_ptr_eq(dial_first_there(there, there), there);
    ck_assert_str_eq(dial_first_there(there, absent), there);
    ck_assert_str_eq(dial_first_there(absent, there), there);
    ck_assert_str_eq(dial_first_there(absent, "/proc/self/neither"), absent);
}
END_TEST

START_TEST(socket_path_that_the_system_would_cut_is_refused)
{
    char given[200];
    char path[DIAL_PATH_BYTES];
    struct epd_error error;

    memset(given, 'p', sizeof given);
    given[107] = 0;
    ck_assert_int_eq(dial_path(given, path, &error), EPD_OK);
    given[107] = 'p';
    given[108] = 0;
    ck_assert_int_eq(dial_path(given, path, &error), EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.text, "108 bytes, at most 107"));
    ck_assert_int_eq(dial_path("", path, &error), EPD_INVALID_ARGUMENT);
}
END_TEST

START_TEST(open_without_a_daemon_ends_at_its_timeout_and_names_the_path)
{
    const struct epd_open_options options = {
        .size = sizeof options, .socket_path = "/tmp/epd-nobody-is-here.sock", .timeout_ms = 60};
    struct epd_client *client = NULL;
    uint64_t start_ns = deadline_now_ns();

    ck_assert_int_eq(epd_open(&options, &client), EPD_DISCONNECTED);
    ck_assert_uint_ge(deadline_now_ns() - start_ns, 60000000);
    ck_assert_ptr_nonnull(strstr(epd_error_text(), "/tmp/epd-nobody-is-here.sock"));
    ck_assert_ptr_null(client);
}
END_TEST

START_TEST(open_refuses_a_name_that_does_not_fit)
{
    char name[65];
    const struct epd_open_options options = {
        .size = sizeof options, .socket_path = "/tmp/x", .client_name = name};
    struct epd_client *client;

    memset(name, 'n', 64);
    name[64] = 0;
    ck_assert_int_eq(epd_open(&options, &client), EPD_INVALID_ARGUMENT);
    ck_assert_str_eq(epd_error_text(), "epd_open_options client_name: 64 bytes, at most 63");
    ck_assert_int_eq(epd_open(NULL, NULL), EPD_INVALID_ARGUMENT);
}
END_TEST

START_TEST(null_objects_are_refused_by_what_they_are)
{
    struct epd_plan *plan;
    char *json;

    ck_assert_int_eq(epd_stats(NULL, &json), EPD_INVALID_ARGUMENT);
    ck_assert_str_eq(epd_error_text(), "client: NULL");
    ck_assert_int_eq(epd_plan_create(NULL, NULL, &plan), EPD_INVALID_ARGUMENT);
    ck_assert_str_eq(epd_error_text(), "group: NULL");
    ck_assert_int_eq(epd_plan_launch(NULL, NULL), EPD_INVALID_ARGUMENT);
    ck_assert_str_eq(epd_error_text(), "plan: NULL");
    ck_assert_int_eq(epd_buffer_release(NULL), EPD_OK);
    ck_assert_str_eq(epd_error_text(), "");
    ck_assert_ptr_null(epd_buffer_data(NULL));
    ck_assert_uint_eq(epd_buffer_bytes(NULL), 0);
    epd_plan_destroy(NULL);
    epd_group_leave(NULL);
    epd_close(NULL);
    epd_free(NULL);
}
END_TEST

START_TEST(status_words_are_those_of_the_table)
{
    ck_assert_str_eq(epd_status_name(EPD_TIMEOUT), "EPD_TIMEOUT");
    ck_assert_str_eq(epd_status_text(EPD_TIMEOUT), "deadline passed");
    ck_assert_str_eq(epd_status_name((enum epd_status)999), "EPD_?");
    ck_assert_str_eq(epd_version(), EPD_VERSION);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client options");
    TCase *cases = tcase_create("no daemon");

    tcase_add_test(cases, options_of_an_older_caller_have_a_zero_tail);
    tcase_add_test(cases, options_of_a_newer_caller_are_taken_if_their_tail_is_zero);
    tcase_add_test(cases, options_without_a_size_are_refused_by_name);
    tcase_add_test(cases, info_is_cut_for_an_older_caller_and_zeroed_for_a_newer_one);
    tcase_add_test(cases, socket_path_comes_from_the_first_place_that_names_one);
    tcase_add_test(cases, socket_of_the_system_is_taken_where_the_user_has_none);
    tcase_add_test(cases, socket_path_that_the_system_would_cut_is_refused);
    tcase_add_test(cases, open_without_a_daemon_ends_at_its_timeout_and_names_the_path);
    tcase_add_test(cases, open_refuses_a_name_that_does_not_fit);
    tcase_add_test(cases, null_objects_are_refused_by_what_they_are);
    tcase_add_test(cases, status_words_are_those_of_the_table);
    suite_add_tcase(suite, cases);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
