/* epdctl: looks into a running epd and steers it, through its control socket. */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/epdctl/act.h"
#include "client/epdctl/doctor.h"
#include "client/epdctl/look.h"

#define WATCH_S_DEFAULT 2
#define MAX_WATCH_S     86400

struct verb {
    const char *name;
    enum control_verb control; /* CONTROL_UNSPECIFIED: run() does it */
    enum command_exit (*run)(const struct command *command);
    const char *argument; /* NULL: none */
    const char *help;
};

static const struct verb verbs[] = {
    {"status", CONTROL_STATUS, NULL, NULL, "health, version, sockets; --verbose: the configuration too"},
    {"stats", CONTROL_STATS, NULL, NULL, "what the node does, how fast, and what holds it back"},
    {"clients", CONTROL_CLIENTS, NULL, NULL, "connected processes and what they hold"},
    {"groups", CONTROL_GROUPS, NULL, NULL, "groups, their ranks, and which rank is awaited"},
    {"plans", CONTROL_PLANS, NULL, NULL, "plans and their launches"},
    {"devices", CONTROL_DEVICES, NULL, NULL, "devices and their memory"},
    {"fabric", CONTROL_FABRIC, NULL, NULL, "nodes that are joined, their links, and groups that span them"},
    {"dump", CONTROL_DUMP, NULL, NULL, "the flight recorder: the last steps with their times; --last N"},
    {"drain", CONTROL_UNSPECIFIED, act_drain, NULL, "finish what is in flight, refuse new work, end"},
    {"evict", CONTROL_UNSPECIFIED, act_evict, "ID", "close a session; --reason TEXT is shown to the client"},
    {"doctor", CONTROL_UNSPECIFIED, doctor_run, NULL, "check this machine and say what to fix"},
    {"version", CONTROL_UNSPECIFIED, look_version, NULL, "versions of epdctl and the daemon"},
};
#define N_VERBS (sizeof(verbs) / sizeof(verbs[0]))

enum { OPTION_TIMEOUT = 256, OPTION_LAST, OPTION_REASON, OPTION_VERSION };

struct option_help {
    struct option option;
    const char *argument; /* "" without one */
    const char *help;
};

static const struct option_help options[] = {
    {{"control-socket", required_argument, NULL, 's'},
     " PATH",
     "control socket of the daemon ($EPD_CONTROL_SOCKET, else beside $EPD_SOCKET, else "
     "$XDG_RUNTIME_DIR/epd/epd-control.sock, but /run/epd/epd-control.sock where only that is there)"},
    {{"json", no_argument, NULL, 'j'}, "", "the daemon's document as it is"},
    {{"watch", optional_argument, NULL, 'w'}, "[=S]", "again every S seconds (2); stats then shows rates"},
    {{"verbose", no_argument, NULL, 'v'}, "", "more of it"},
    {{"last", required_argument, NULL, OPTION_LAST}, " N", "dump: only the last N steps (40; 0: all)"},
    {{"reason", required_argument, NULL, OPTION_REASON}, " TEXT", "evict: why, at most 255 bytes"},
    {{"timeout", required_argument, NULL, OPTION_TIMEOUT}, " MS", "wait so long for an answer (5000)"},
    {{"version", no_argument, NULL, OPTION_VERSION}, "", "print the version of epdctl and exit"},
    {{"help", no_argument, NULL, 'h'}, "", "this text"},
};
#define N_OPTIONS (sizeof(options) / sizeof(options[0]))

static void print_help(void)
{
    printf("usage: epdctl [options] VERB\n\n");
    for (size_t i = 0; i < N_VERBS; i++)
        printf("  %-8s %-3s %s\n", verbs[i].name, verbs[i].argument ? verbs[i].argument : "", verbs[i].help);
    printf("\n");
    for (size_t i = 0; i < N_OPTIONS; i++) {
        char option[32];
        (void)snprintf(option, sizeof(option), "--%s%s", options[i].option.name, options[i].argument);
        printf("  %-21s  %s\n", option, options[i].help);
    }
    printf("\nExit codes: 0 done, 1 refused by the daemon (doctor: something to fix), 2 usage, 3 no daemon "
           "answers.\n");
}

static int parse_count(const char *what, const char *text, uint64_t min, uint64_t max, uint64_t *value)
{
    char *end = NULL;
    errno = 0;
    *value = strtoull(text, &end, 10);
    if (!errno && end != text && !*end && text[0] != '-' && *value >= min && *value <= max)
        return 0;
    fprintf(stderr, "epdctl: %s '%s': want a number from %llu to %llu\n", what, text, (unsigned long long)min,
            (unsigned long long)max);
    return -1;
}

static int set_socket(struct command *command, const char *path)
{
    if ((size_t)snprintf(command->socket, sizeof(command->socket), "%s", path) < sizeof(command->socket))
        return 0;
    fprintf(stderr, "epdctl: --control-socket: %zu bytes, at most %zu\n", strlen(path),
            sizeof(command->socket) - 1);
    return -1;
}

/* 0: taken; -1: usage error, has been printed. */
static int take_option(struct command *command, int option)
{
    uint64_t value = 0;
    switch (option) {
    case 's':
        return set_socket(command, optarg);
    case 'j':
        command->json = 1;
        return 0;
    case 'v':
        command->verbose = 1;
        return 0;
    case 'w':
        value = WATCH_S_DEFAULT;
        if (optarg && parse_count("--watch", optarg, 1, MAX_WATCH_S, &value))
            return -1;
        command->watch_s = (uint32_t)value;
        return 0;
    case OPTION_TIMEOUT:
        if (parse_count("--timeout", optarg, 1, 3600000, &value))
            return -1;
        command->timeout_ms = (int)value;
        return 0;
    case OPTION_LAST:
        command->has_last = 1;
        return parse_count("--last", optarg, 0, UINT64_MAX, &command->max_ops);
    case OPTION_REASON:
        command->reason = optarg;
        if (strlen(optarg) < EPD_ERROR_TEXT_BYTES)
            return 0;
        fprintf(stderr, "epdctl: --reason: %zu bytes, at most %d\n", strlen(optarg),
                EPD_ERROR_TEXT_BYTES - 1);
        return -1;
    default: /* getopt has said what it is */
        return -1;
    }
}

static int run_verb(struct command *command, int n_words, char **words)
{
    const struct verb *verb = NULL;
    for (size_t i = 0; n_words && i < N_VERBS; i++)
        if (strcmp(verbs[i].name, words[0]) == 0)
            verb = &verbs[i];
    if (!verb) {
        fprintf(stderr,
                n_words ? "epdctl: unknown verb '%s'; see epdctl --help\n"
                        : "epdctl: no verb%s; see --help\n",
                n_words ? words[0] : "");
        return COMMAND_USAGE;
    }
    if (n_words != 1 + (verb->argument != NULL)) {
        fprintf(stderr, "epdctl: %s takes %s\n", verb->name, verb->argument ? verb->argument : "no argument");
        return COMMAND_USAGE;
    }
    if (verb->argument && parse_count("session id", words[1], 1, UINT64_MAX, &command->session_id))
        return COMMAND_USAGE;
    return (int)(verb->run ? verb->run(command) : look_run(command, verb->control));
}

int main(int argc, char **argv)
{
    struct command command = {.timeout_ms = LINK_TIMEOUT_MS_DEFAULT, .max_ops = 40};
    struct option table[N_OPTIONS + 1];
    memset(table, 0, sizeof(table));
    for (size_t i = 0; i < N_OPTIONS; i++)
        table[i] = options[i].option;
    link_default_path(command.socket, sizeof(command.socket));
    for (int option; (option = getopt_long(argc, argv, "s:jw::vh", table, NULL)) != -1;) {
        if (option == 'h') {
            print_help();
            return COMMAND_OK;
        }
        if (option == OPTION_VERSION) {
            printf("epdctl %s\n", EPD_VERSION);
            return COMMAND_OK;
        }
        if (take_option(&command, option))
            return COMMAND_USAGE;
    }
    return run_verb(&command, argc - optind, argv + optind);
}
