#include "daemon/close_reason.h"

struct row {
    const char *name, *text;
    enum epd_status status;
    int expected;
};

static const struct row rows[CLOSE_REASON_COUNT] = {
#define CLOSE_REASON_ROW(id, name, status, expected, text) [id] = {name, text, status, expected},
    CLOSE_REASON_TABLE(CLOSE_REASON_ROW)
#undef CLOSE_REASON_ROW
};

const char *close_reason_name(enum close_reason reason)
{
    return rows[reason].name;
}

const char *close_reason_text(enum close_reason reason)
{
    return rows[reason].text;
}

enum epd_status close_reason_status(enum close_reason reason)
{
    return rows[reason].status;
}

int close_reason_expected(enum close_reason reason)
{
    return rows[reason].expected;
}
