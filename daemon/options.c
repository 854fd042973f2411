#include "daemon/options.h"

#include <assert.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#define MAX_FLAGS       96
#define MAX_FLAG_BYTES  32
#define FIRST_KEY_VALUE 1000 /* getopt value of the first configuration flag */

enum own_flag {
    FLAG_CONFIG = 256,
    FLAG_CHECK,
    FLAG_HELP,
    FLAG_VERSION,
    FLAG_WORKER,
    FLAG_GENERATION,
    FLAG_LAST_EXIT,
    FLAG_HANGS
};

static const struct option own_flags[] = {
    {"config", required_argument, NULL, FLAG_CONFIG},
    {"check-config", no_argument, NULL, FLAG_CHECK},
    {"help", no_argument, NULL, FLAG_HELP},
    {"version", no_argument, NULL, FLAG_VERSION},
    {"worker", no_argument, NULL, FLAG_WORKER},
    {"generation", required_argument, NULL, FLAG_GENERATION},
    {"last-exit", required_argument, NULL, FLAG_LAST_EXIT},
    {"hangs", required_argument, NULL, FLAG_HANGS},
};

#define N_OWN (sizeof(own_flags) / sizeof(own_flags[0]))

/* The flags that getopt_long wants: ours, then one for each key. */
struct flags {
    struct option list[MAX_FLAGS];
    char names[MAX_FLAGS][MAX_FLAG_BYTES];
};

static void name_flag(const struct config_key *key, char name[MAX_FLAG_BYTES])
{
    (void)snprintf(name, MAX_FLAG_BYTES, "%s", key->key);
    for (char *at = name; *at; at++)
        if (*at == '_')
            *at = '-';
}

static void make_flags(struct flags *flags)
{
    size_t n_keys = 0;
    const struct config_key *keys = config_keys(&n_keys);
    assert(N_OWN + n_keys < MAX_FLAGS); /* and one to end the list */
    memset(flags, 0, sizeof(*flags));
    memcpy(flags->list, own_flags, sizeof(own_flags));
    for (size_t i = 0; i < n_keys; i++) {
        name_flag(&keys[i], flags->names[i]);
        flags->list[N_OWN + i] =
            (struct option){flags->names[i], required_argument, NULL, FIRST_KEY_VALUE + (int)i};
    }
}

static void take_own(struct options *options, int flag, const char *value)
{
    if (flag == FLAG_CONFIG)
        options->config_file = value;
    else if (flag == FLAG_CHECK)
        options->action = OPTIONS_CHECK_CONFIG;
    else if (flag == FLAG_HELP)
        options->action = OPTIONS_HELP;
    else if (flag == FLAG_VERSION)
        options->action = OPTIONS_VERSION;
    else if (flag == FLAG_WORKER)
        options->action = OPTIONS_WORKER;
    else if (flag == FLAG_GENERATION)
        options->generation = strtoull(value, NULL, 10);
    else if (flag == FLAG_LAST_EXIT)
        options->last_exit = value;
    else if (flag == FLAG_HANGS)
        options->n_hangs = strtoull(value, NULL, 10);
}

enum epd_status options_parse(struct options *options, int argc, char **argv, struct epd_error *error)
{
    struct flags flags;
    make_flags(&flags);
    *options = (struct options){.argc = argc, .argv = argv, .last_exit = ""};
    optind = 1;
    opterr = 0;
    for (;;) {
        const int at = optind;
        int flag = getopt_long(argc, argv, "+:", flags.list, NULL);
        if (flag == -1)
            break;
        if (flag == ':')
            return error_set(error, EPD_INVALID_ARGUMENT, "%.64s: a value is missing (try epd --help)",
                             argv[at]);
        if (flag == '?')
            return error_set(error, EPD_INVALID_ARGUMENT, "%.64s: no such option (try epd --help)", argv[at]);
        if (flag < FIRST_KEY_VALUE)
            take_own(options, flag, optarg);
    }
    if (optind < argc)
        return error_set(error, EPD_INVALID_ARGUMENT, "'%.64s': epd takes options only (try epd --help)",
                         argv[optind]);
    return EPD_OK;
}

static enum epd_status apply_flags(const struct options *options, struct config *config,
                                   struct epd_error *error)
{
    struct flags flags;
    make_flags(&flags);
    size_t n_keys = 0;
    const struct config_key *keys = config_keys(&n_keys);
    optind = 1;
    opterr = 0;
    for (;;) {
        int flag = getopt_long(options->argc, options->argv, "+:", flags.list, NULL);
        if (flag == -1)
            return EPD_OK;
        if (flag < FIRST_KEY_VALUE)
            continue;
        const struct config_key *key = &keys[flag - FIRST_KEY_VALUE];
        char where[MAX_FLAG_BYTES + 2];
        (void)snprintf(where, sizeof(where), "--%s", flags.names[flag - FIRST_KEY_VALUE]);
        enum epd_status status = config_set(config, key, optarg, where, error);
        if (status != EPD_OK)
            return status;
    }
}

enum epd_status options_load(const struct options *options, struct config *config, struct epd_error *error)
{
    struct config fresh;
    config_init(&fresh);
    enum epd_status status = EPD_OK;
    if (options->config_file)
        status = config_read(&fresh, options->config_file, error);
    if (status == EPD_OK)
        status = apply_flags(options, &fresh, error);
    if (status == EPD_OK)
        status = config_finish(&fresh, error);
    if (status == EPD_OK)
        *config = fresh;
    return status;
}

void options_help(FILE *file)
{
    fprintf(file,
            "epd %s: expert-parallel service for Mixture-of-Experts layers\n\n"
            "usage: epd [--config FILE] [--KEY VALUE]...\n\n"
            "  --config FILE        read this file first (see epd.conf(5)); flags come after it\n"
            "  --check-config       check file and flags, say what is wrong, and exit\n"
            "  --version            print the version and exit\n"
            "  --help               print this and exit\n",
            EPD_VERSION);
    size_t n_keys = 0;
    const struct config_key *keys = config_keys(&n_keys);
    const char *section = "";
    for (size_t i = 0; i < n_keys; i++) {
        char name[MAX_FLAG_BYTES];
        name_flag(&keys[i], name);
        if (strcmp(section, keys[i].section) != 0)
            fprintf(file, "\n[%s]\n", section = keys[i].section);
        fprintf(file, "  --%-26s %s%s%s%s\n", name, keys[i].help, keys[i].fallback[0] ? " (default " : "",
                keys[i].fallback, keys[i].fallback[0] ? ")" : "");
    }
    fprintf(
        file,
        "\nsignals: TERM drains and ends, a second TERM ends at once, HUP reads the file again\n"
        "exit codes: 0 ended as asked, 1 cannot serve, 2 bad configuration, 4 the worker failed too often\n");
}
