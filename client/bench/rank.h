/* A rank process of the benchmark: does what the board says, leaves its times and, if it fails, its reason
 * there. */
#ifndef EPD_BENCH_RANK_H
#define EPD_BENCH_RANK_H

#include <epd.h>

/* In the child: returns the exit code. */
int rank_run(int board_fd, uint32_t rank);

#endif
