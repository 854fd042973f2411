/* Walking struct row_groups: the rows of one group after another, with splits and offsets that do not fit the
 * buffers clamped and recorded (EPD_BAD_SPLITS: expert = the group; got = the negative split or offset, or
 * else the end of the group's rows; allowed = max_rows). */
#ifndef EPD_KERNELS_HOST_GROUPS_H
#define EPD_KERNELS_HOST_GROUPS_H

#include "kernels/kernels.h"

struct group_cursor {
    const struct row_groups *groups; /* borrowed */
    struct kernel_error *error;      /* borrowed */
    uint32_t next_group;
    int64_t next_row; /* where the next packed group begins */
};

/* Rows first_row .. first_row + n_rows - 1 of the buffers, always inside 0 .. max_rows. */
struct group_rows {
    uint32_t group_idx;
    int64_t first_row;
    int64_t n_rows;
};

void group_cursor_init(struct group_cursor *cursor, const struct row_groups *groups,
                       struct kernel_error *error);
/* 0 at the end. */
int group_cursor_next(struct group_cursor *cursor, struct group_rows *rows);

#endif
