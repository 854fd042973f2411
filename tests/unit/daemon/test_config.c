#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/config.h"
#include "daemon/options.h"
#include "tests/unit/daemon/suite.h"

static struct config config;
static struct epd_error error;

static void start(void)
{
    config_init(&config);
    memset(&error, 0, sizeof(error));
    setenv("XDG_RUNTIME_DIR", "/run/user/7", 1);
}

static void expect_refused(const char *text, const char *part)
{
    ck_assert_int_eq(config_parse(&config, text, "f.conf", &error), EPD_INVALID_ARGUMENT);
    ck_assert_msg(strstr(error.text, part) != NULL, "got '%s', want '%s' in it", error.text, part);
}

START_TEST(defaults_fill_every_key_and_pass_their_own_checks)
{
    ck_assert_int_eq(config_finish(&config, &error), EPD_OK);
    ck_assert_str_eq(config.socket, "/run/user/7/epd/epd.sock");
    ck_assert_str_eq(config.control_socket, "/run/user/7/epd/epd-control.sock");
    ck_assert_uint_eq(config.stuck_ms, 20000);
    ck_assert_uint_eq(config.socket_mode, 0660);
    ck_assert_uint_eq(config.output_per_session, 256 * 1024);
}
END_TEST

START_TEST(file_sets_values_with_units)
{
    const char *text =
        "[timers]\nwarn = 250ms\ndead = 2m\n[limits]\nheap_per_session = 3G\n[daemon]\nbackend = host\n"
        "[sockets]\ncontrol_mode = 0640\n";
    ck_assert_int_eq(config_parse(&config, text, "f.conf", &error), EPD_OK);
    ck_assert_uint_eq(config.warn_ms, 250);
    ck_assert_uint_eq(config.dead_ms, 120000);
    ck_assert_uint_eq(config.heap_per_session, 3ull << 30);
    ck_assert_uint_eq(config.backend, CONFIG_BACKEND_HOST);
    ck_assert_uint_eq(config.control_mode, 0640);
}
END_TEST

START_TEST(errors_name_file_line_key_given_and_allowed)
{
    expect_refused("[daemon]\nbackend = cdua\n", "f.conf:2: backend 'cdua', want one of auto host cuda");
    expect_refused("[timers]\n\nwarn = 5\n", "f.conf:3: warn '5', want a time with ms, s or m");
    expect_refused("[limits]\nsessions = 0\n", "f.conf:2: sessions '0', want a number from 1 to 1000000");
    expect_refused("[limits]\nsessions = -1\n", "sessions '-1'");
    expect_refused("[limits]\nheap_per_uid = 99999999999T\n", "heap_per_uid");
    expect_refused("[sockets]\nsocket_mode = 9\n", "an octal file mode up to 0777");
    expect_refused("[daemon]\nsockte = x\n", "f.conf:2: unknown key sockte in [daemon]");
    expect_refused("[daemon]\nsocket = x\n", "socket stands in [daemon], want [sockets]");
    expect_refused("[daemon\n", "f.conf:1: not a section");
}
END_TEST

START_TEST(refused_file_leaves_the_configuration_alone)
{
    struct config before = config;
    expect_refused("[timers]\nwarn = 1s\nstuck = soon\n", "stuck");
    ck_assert_mem_eq(&before, &config, sizeof(config));
}
END_TEST

START_TEST(keys_that_depend_on_each_other_are_checked)
{
    config.warn_ms = 30000;
    ck_assert_int_eq(config_finish(&config, &error), EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.text, "warn <= stuck <= dead"));
    config_init(&config);
    config.backend = CONFIG_BACKEND_HOST;
    strcpy(config.devices, "17");
    ck_assert_int_eq(config_finish(&config, &error), EPD_INVALID_ARGUMENT);
    config_init(&config);
    strcpy(config.allow_uids, "1,x");
    ck_assert_int_eq(config_finish(&config, &error), EPD_INVALID_ARGUMENT);
    config_init(&config);
    strcpy(config.socket, "/a/b");
    strcpy(config.control_socket, "/a/b");
    ck_assert_int_eq(config_finish(&config, &error), EPD_INVALID_ARGUMENT);
}
END_TEST

START_TEST(rendered_configuration_reads_back_the_same)
{
    static char text[CONFIG_RENDERED_BYTES];
    const char *given = "[timers]\nwarn = 1250ms\n[daemon]\ndevices = 3\n[limits]\nheap_per_uid = 7M\n";
    ck_assert_int_eq(config_parse(&config, given, "f", &error), EPD_OK);
    ck_assert_int_eq(config_render(&config, text, sizeof(text), &error), EPD_OK);
    struct config again;
    config_init(&again);
    ck_assert_msg(config_parse(&again, text, "rendered", &error) == EPD_OK, "%s", error.text);
    ck_assert_mem_eq(&again, &config, sizeof(config));
    ck_assert_int_eq(config_render(&config, text, 100, &error), EPD_INTERNAL);
}
END_TEST

/* As flags give them: longer than a line of a file, and with what a file would take for a comment. */
START_TEST(any_value_of_a_flag_reaches_the_worker)
{
    static char text[CONFIG_RENDERED_BYTES];
    struct config again;
    config_init(&again);
    config_init(&config);
    memset(config.dump_directory, 'd', sizeof(config.dump_directory) - 1);
    strcpy(config.devices, "a ;b # = [c]");
    strcpy(config.network, " tcp ");
    ck_assert_int_eq(config_render(&config, text, sizeof(text), &error), EPD_OK);
    ck_assert_msg(config_take_rendered(&again, text, &error) == EPD_OK, "%s", error.text);
    ck_assert_mem_eq(&again, &config, sizeof(config));
    char wrong[] = "[daemon]\nno such line\n";
    ck_assert_int_eq(config_take_rendered(&again, wrong, &error), EPD_PROTOCOL);
    ck_assert_mem_eq(&again, &config, sizeof(config));
    size_t n_keys;
    const struct config_key *keys = config_keys(&n_keys);
    for (size_t i = 0; i < n_keys; i++)
        if (strcmp(keys[i].key, "devices") == 0)
            ck_assert_int_eq(config_set(&config, &keys[i], "2\nlog_level = error", "--devices", &error),
                             EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.text, "one line"));
}
END_TEST

START_TEST(reload_takes_only_what_is_safe)
{
    struct config fresh;
    uint32_t n_ignored = 0;
    config_init(&fresh);
    fresh.warn_ms = 1;
    fresh.socket_mode = 0600;
    strcpy(fresh.allow_uids, "5");
    ck_assert_uint_eq(config_reload(&config, &fresh, &n_ignored), 2);
    ck_assert_uint_eq(n_ignored, 1);
    ck_assert_uint_eq(config.warn_ms, 1);
    ck_assert_uint_eq(config.socket_mode, 0660);
    ck_assert(config_allows_uid(&config, 5) && !config_allows_uid(&config, 6));
}
END_TEST

START_TEST(every_key_has_a_flag_that_wins_over_the_file)
{
    char path[] = "/tmp/epd-config-XXXXXX";
    int fd = mkstemp(path);
    const char *text = "[timers]\nwarn = 7s\nstuck = 8s\n";
    ck_assert_int_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
    char config_flag[] = "--config", flag[] = "--stuck=9s", name[] = "epd";
    char *argv[] = {name, config_flag, path, flag, NULL};
    struct options options;
    ck_assert_int_eq(options_parse(&options, 4, argv, &error), EPD_OK);
    ck_assert_msg(options_load(&options, &config, &error) == EPD_OK, "%s", error.text);
    ck_assert_uint_eq(config.warn_ms, 7000);
    ck_assert_uint_eq(config.stuck_ms, 9000);
    ck_assert_str_eq(config.file, path);
    unlink(path);

    size_t n_keys = 0;
    const struct config_key *keys = config_keys(&n_keys);
    for (size_t i = 0; i < n_keys; i++) {
        char key_flag[128];
        snprintf(key_flag, sizeof(key_flag), "--%s=%s", keys[i].key, keys[i].fallback);
        for (char *at = key_flag; *at && *at != '='; at++)
            *at = *at == '_' ? '-' : *at;
        char *key_argv[] = {name, key_flag, NULL};
        ck_assert_int_eq(options_parse(&options, 2, key_argv, &error), EPD_OK);
        ck_assert_msg(options_load(&options, &config, &error) == EPD_OK, "%s: %s", key_flag, error.text);
    }
}
END_TEST

START_TEST(bad_command_lines_are_named)
{
    struct options options;
    char name[] = "epd", unknown[] = "--nonsense", missing[] = "--socket", word[] = "start";
    char *with_unknown[] = {name, unknown, NULL}, *with_missing[] = {name, missing, NULL},
         *with_word[] = {name, word, NULL};
    ck_assert_int_eq(options_parse(&options, 2, with_unknown, &error), EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.text, "--nonsense: no such option"));
    ck_assert_int_eq(options_parse(&options, 2, with_missing, &error), EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.text, "--socket: a value is missing"));
    ck_assert_int_eq(options_parse(&options, 2, with_word, &error), EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.text, "'start'"));
}
END_TEST

START_TEST(shipped_file_names_every_key_with_its_default)
{
    static char text[CONFIG_RENDERED_BYTES];
    FILE *file = fopen(EPD_CONF, "r");
    ck_assert_ptr_nonnull(file);
    ck_assert_uint_gt(fread(text, 1, sizeof(text) - 1, file), 0);
    fclose(file);
    size_t n_keys = 0;
    const struct config_key *keys = config_keys(&n_keys);
    for (size_t i = 0; i < n_keys; i++) {
        char line[256];
        snprintf(line, sizeof(line), "\n#%s =%s%s\n", keys[i].key, keys[i].fallback[0] ? " " : "",
                 keys[i].fallback);
        ck_assert_msg(strstr(text, line) != NULL, "epd.conf lacks '%s'", line + 1);
        snprintf(line, sizeof(line), "# %s%s\n", keys[i].help, keys[i].reloadable ? " [reload]" : "");
        ck_assert_msg(strstr(text, line) != NULL, "epd.conf lacks '%s'", line);
    }
    ck_assert_msg(config_read(&config, EPD_CONF, &error) == EPD_OK, "%s", error.text);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {defaults_fill_every_key_and_pass_their_own_checks,
                                  file_sets_values_with_units,
                                  errors_name_file_line_key_given_and_allowed,
                                  refused_file_leaves_the_configuration_alone,
                                  keys_that_depend_on_each_other_are_checked,
                                  rendered_configuration_reads_back_the_same,
                                  any_value_of_a_flag_reaches_the_worker,
                                  reload_takes_only_what_is_safe,
                                  every_key_has_a_flag_that_wins_over_the_file,
                                  bad_command_lines_are_named,
                                  shipped_file_names_every_key_with_its_default,
                                  NULL};
    return suite_run("daemon_config", tests, start, NULL);
}
