#include "client/epdctl/look.h"

#include <stdio.h>
#include <unistd.h>

#include "client/epdctl/fabric_view.h"
#include "client/epdctl/field.h"
#include "client/epdctl/list_view.h"
#include "client/epdctl/stats_view.h"
#include "client/epdctl/status_view.h"

/* What `epdctl stats` shows rates of. */
#define STATS_PERIOD_S 1

static void keep_newest(json_t *document, uint64_t max_ops)
{
    const json_t *ops = field_array(document, "ops");
    const size_t n_ops = json_array_size(ops);
    json_t *kept = json_array();
    for (size_t i = max_ops && n_ops > max_ops ? n_ops - max_ops : 0; i < n_ops; i++)
        (void)json_array_append(kept, json_array_get(ops, i));
    (void)json_object_set_new(document, "ops", kept);
}

static void show(const struct command *command, enum control_verb verb, json_t *document,
                 const json_t *before)
{
    if (command->json) {
        if (verb == CONTROL_DUMP && command->has_last)
            keep_newest(document, command->max_ops);
        command_print_json(document);
        return;
    }
    switch (verb) {
    case CONTROL_STATUS:
        status_view(document, command->verbose, stdout);
        return;
    case CONTROL_STATS:
        stats_view(document, before, stdout);
        return;
    case CONTROL_CLIENTS:
        clients_view(document, stdout);
        return;
    case CONTROL_GROUPS:
        groups_view(document, stdout);
        return;
    case CONTROL_PLANS:
        plans_view(document, stdout);
        return;
    case CONTROL_DEVICES:
        devices_view(document, stdout);
        return;
    case CONTROL_FABRIC:
        fabric_view(document, before, stdout);
        return;
    case CONTROL_DUMP:
        dump_view(document, command->max_ops, stdout);
        return;
    default:
        command_print_json(document);
        return;
    }
}

/* A later document may be compared with an earlier one only within one life of the worker. */
static int same_worker(const json_t *document, const json_t *before)
{
    return before && field_number(document, "pid") == field_number(before, "pid") &&
           field_number(document, "uptime_ms") > field_number(before, "uptime_ms");
}

/* For people statistics are what has changed: the first look is one that they do not see. */
static enum command_exit look_first(const struct command *command, enum control_verb verb, json_t **document)
{
    if (verb != CONTROL_STATS || command->json)
        return COMMAND_OK;
    enum command_exit result = command_request(command, &(struct message_control){.verb = verb}, document);
    if (result == COMMAND_OK)
        sleep(STATS_PERIOD_S);
    return result;
}

enum command_exit look_run(const struct command *command, enum control_verb verb)
{
    json_t *before = NULL;
    enum command_exit result = look_first(command, verb, &before);
    if (result != COMMAND_OK)
        return result;
    for (;;) {
        json_t *document = NULL;
        result = command_request(command, &(struct message_control){.verb = verb}, &document);
        if (result != COMMAND_OK) {
            json_decref(before);
            return result;
        }
        if (command->watch_s && !command->json && isatty(STDOUT_FILENO))
            fputs("\033[H\033[2J", stdout); /* cursor home, clear the screen */
        show(command, verb, document, same_worker(document, before) ? before : NULL);
        json_decref(before);
        before = document;
        if (!command->watch_s)
            break;
        fflush(stdout);
        sleep(command->watch_s);
    }
    json_decref(before);
    return COMMAND_OK;
}

enum command_exit look_version(const struct command *command)
{
    struct link link;
    struct epd_error error = {0};
    json_t *document = NULL;
    printf("epdctl %s, protocol %d.%d\n", EPD_VERSION, EPD_PROTOCOL_MAJOR, EPD_PROTOCOL_MINOR);
    if (link_open(&link, command->socket, command->timeout_ms, &error) != EPD_OK) {
        printf("epd    not running at %s\n", command->socket);
        return COMMAND_OK;
    }
    if (link_request(&link, &(struct message_control){.verb = CONTROL_STATUS}, &document, &error) == EPD_OK)
        printf("epd    %s at %s\n", field_text(document, "version", "-"), command->socket);
    else
        printf("epd    at %s does not answer: %s\n", command->socket, error.text);
    json_decref(document);
    link_close(&link);
    return COMMAND_OK;
}
