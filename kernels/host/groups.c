#include "kernels/host/groups.h"

#include "kernels/host/record.h"

void group_cursor_init(struct group_cursor *cursor, const struct row_groups *groups,
                       struct kernel_error *error)
{
    *cursor = (struct group_cursor){.groups = groups, .error = error};
}

/* The rank stays as the caller preset it: a group knows none. */
static void record_bad_split(const struct group_cursor *cursor, int64_t got)
{
    struct kernel_error seen = {
        .status = EPD_BAD_SPLITS,
        .rank = cursor->error->rank,
        .expert = (int32_t)cursor->next_group,
        .token = -1,
        .got = got,
        .allowed = cursor->groups->max_rows,
    };
    record_keep_first(cursor->error, &seen);
}

static int64_t clamped_offset(const struct group_cursor *cursor)
{
    const struct row_groups *groups = cursor->groups;
    if (!groups->offsets)
        return cursor->next_row;
    int64_t offset = groups->offsets[cursor->next_group];
    if (offset >= 0 && offset <= groups->max_rows)
        return offset;
    record_bad_split(cursor, offset);
    return offset < 0 ? 0 : groups->max_rows;
}

static int64_t clamped_split(const struct group_cursor *cursor, int64_t first_row)
{
    int64_t split = cursor->groups->m_splits[cursor->next_group];
    int64_t room = cursor->groups->max_rows - first_row;
    if (split >= 0 && split <= room)
        return split;
    if (split < 0)
        record_bad_split(cursor, split);
    else
        record_bad_split(cursor, split > INT64_MAX - first_row ? INT64_MAX : first_row + split);
    return split < 0 ? 0 : room;
}

int group_cursor_next(struct group_cursor *cursor, struct group_rows *rows)
{
    if (cursor->next_group == cursor->groups->n_groups)
        return 0;
    rows->group_idx = cursor->next_group;
    rows->first_row = clamped_offset(cursor);
    rows->n_rows = clamped_split(cursor, rows->first_row);
    cursor->next_row = rows->first_row + rows->n_rows;
    cursor->next_group++;
    return 1;
}
