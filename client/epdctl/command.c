#include "client/epdctl/command.h"

#include <stdio.h>

static enum command_exit exit_of(enum epd_status status)
{
    if (status == EPD_OK)
        return COMMAND_OK;
    if (status == EPD_DISCONNECTED || status == EPD_TIMEOUT || status == EPD_PERMISSION)
        return COMMAND_NO_DAEMON;
    return COMMAND_REFUSED;
}

enum command_exit command_request(const struct command *command, const struct message_control *control,
                                  json_t **document)
{
    struct link link;
    struct epd_error error = {0};
    enum epd_status status = link_open(&link, command->socket, command->timeout_ms, &error);
    if (status != EPD_OK) {
        fprintf(stderr, "epdctl: %s\n", error.text);
        return COMMAND_NO_DAEMON;
    }
    status = link_request(&link, control, document, &error);
    link_close(&link);
    if (status != EPD_OK)
        fprintf(stderr, "epdctl: %s: %s\n", status_name(status), error.text);
    return exit_of(status);
}

void command_print_json(const json_t *document)
{
    (void)json_dumpf(document, stdout, JSON_INDENT(2));
    putchar('\n');
}
