#include "daemon/failpoint.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int parse_action(struct failpoint *point, char *action)
{
    char *at = strchr(action, '@');
    if (at) {
        *at = 0;
        point->only_hit = strtoull(at + 1, NULL, 10);
    }
    if (strcmp(action, "error") == 0)
        point->action = FAILPOINT_ERROR;
    else if (strcmp(action, "lost") == 0)
        point->action = FAILPOINT_LOST;
    else if (strcmp(action, "abort") == 0)
        point->action = FAILPOINT_ABORT;
    else if (strcmp(action, "kill") == 0)
        point->action = FAILPOINT_KILL;
    else if (strncmp(action, "sleep:", 6) == 0)
        point->action = FAILPOINT_SLEEP;
    else
        return 0;
    if (point->action == FAILPOINT_SLEEP)
        point->sleep_ms = (uint32_t)strtoul(action + 6, NULL, 10);
    return 1;
}

static int parse_point(struct failpoint *point, char *item)
{
    char *equals = strchr(item, '=');
    if (!equals || equals == item || equals - item >= FAILPOINT_NAME_BYTES)
        return 0;
    *equals = 0;
    *point = (struct failpoint){0};
    memcpy(point->name, item, strlen(item) + 1);
    return parse_action(point, equals + 1);
}

enum epd_status failpoint_parse(struct failpoints *failpoints, const char *text, struct epd_error *error)
{
    failpoints->n_points = 0;
    if (!text || !text[0])
        return EPD_OK;
    char copy[1024];
    if ((size_t)snprintf(copy, sizeof(copy), "%s", text) >= sizeof(copy))
        return error_set(error, EPD_INVALID_ARGUMENT, "EPD_FAILPOINTS: longer than %zu bytes",
                         sizeof(copy) - 1);
    char *rest = NULL;
    for (char *item = strtok_r(copy, ",", &rest); item; item = strtok_r(NULL, ",", &rest)) {
        if (failpoints->n_points == FAILPOINT_MAX)
            return error_set(error, EPD_INVALID_ARGUMENT, "EPD_FAILPOINTS: more than %d", FAILPOINT_MAX);
        if (!parse_point(&failpoints->points[failpoints->n_points], item))
            return error_set(error, EPD_INVALID_ARGUMENT,
                             "EPD_FAILPOINTS: '%.60s', want name=error|lost|sleep:MS|abort|kill[@n]", item);
        failpoints->n_points++;
    }
    return EPD_OK;
}

#ifdef EPD_FAILPOINTS
static enum epd_status act(const struct failpoint *point, struct epd_error *error)
{
    switch (point->action) {
    case FAILPOINT_ERROR:
        return error_set(error, EPD_SYSTEM, "failpoint %s", point->name);
    case FAILPOINT_LOST:
        return error_set(error, EPD_CUDA, "failpoint %s", point->name);
    case FAILPOINT_SLEEP: {
        struct timespec time = {point->sleep_ms / 1000, (long)(point->sleep_ms % 1000) * 1000000};
        while (nanosleep(&time, &time) != 0 && errno == EINTR) /* what hangs does not hear signals */
            continue;
        return EPD_OK;
    }
    case FAILPOINT_ABORT:
        abort();
    case FAILPOINT_KILL:
        (void)kill(getpid(), SIGKILL);
        return EPD_OK;
    default:
        return EPD_OK;
    }
}

enum epd_status failpoint_hit(struct failpoints *failpoints, const char *name, struct epd_error *error)
{
    for (uint32_t i = 0; i < failpoints->n_points; i++) {
        struct failpoint *point = &failpoints->points[i];
        if (strcmp(point->name, name) != 0)
            continue;
        point->n_hits++;
        if (!point->only_hit || point->only_hit == point->n_hits)
            return act(point, error);
    }
    return EPD_OK;
}
#endif
