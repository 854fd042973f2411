#include "client/epdctl/act.h"

#include <stdio.h>

static enum command_exit act(const struct command *command, const struct message_control *control,
                             const char *done)
{
    json_t *document = NULL;
    enum command_exit result = command_request(command, control, &document);
    if (result == COMMAND_OK && command->json && document)
        command_print_json(document);
    else if (result == COMMAND_OK)
        printf("%s\n", done);
    json_decref(document);
    return result;
}

enum command_exit act_drain(const struct command *command)
{
    return act(command, &(struct message_control){.verb = CONTROL_DRAIN},
               "draining: what is in flight is finished, new work is refused");
}

enum command_exit act_evict(const struct command *command)
{
    struct message_control control = {.verb = CONTROL_EVICT, .session_id = command->session_id};
    char done[64];
    (void)snprintf(control.reason, sizeof(control.reason), "%s",
                   command->reason ? command->reason : "evicted with epdctl");
    (void)snprintf(done, sizeof(done), "session %llu evicted", (unsigned long long)command->session_id);
    return act(command, &control, done);
}
