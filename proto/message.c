#include "proto/message.h"

const char *message_kind_name(enum message_kind kind)
{
    static const char *const names[MESSAGE_KIND_COUNT] = {
        [MESSAGE_NONE] = "none",
        [MESSAGE_HELLO] = "hello",
        [MESSAGE_GROUP_JOIN] = "group_join",
        [MESSAGE_GROUP_LEAVE] = "group_leave",
        [MESSAGE_BUFFER_ALLOC] = "buffer_alloc",
        [MESSAGE_BUFFER_REGISTER] = "buffer_register",
        [MESSAGE_BUFFER_RELEASE] = "buffer_release",
        [MESSAGE_PLAN_CREATE] = "plan_create",
        [MESSAGE_PLAN_DESTROY] = "plan_destroy",
        [MESSAGE_LAUNCH] = "launch",
        [MESSAGE_STATS] = "stats",
        [MESSAGE_CONTROL] = "control",
        [MESSAGE_REPLY_ERROR] = "reply_error",
        [MESSAGE_REPLY_OK] = "reply_ok",
        [MESSAGE_REPLY_HELLO] = "reply_hello",
        [MESSAGE_REPLY_GROUP] = "reply_group",
        [MESSAGE_REPLY_BUFFER] = "reply_buffer",
        [MESSAGE_REPLY_PLAN] = "reply_plan",
        [MESSAGE_REPLY_DOCUMENT] = "reply_document",
        [MESSAGE_CLOSED] = "closed",
    };

    if ((unsigned)kind >= MESSAGE_KIND_COUNT)
        return "?";
    return names[kind];
}
