#include "tests/gpu/fault/board.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct board *board_open(int fd)
{
    void *board = mmap(NULL, sizeof(struct board), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (board == MAP_FAILED)
        abort();
    return board;
}

struct board *board_create(int *fd)
{
    *fd = memfd_create("gpu-fault-board", 0); /* no MFD_CLOEXEC: the ranks inherit it */
    if (*fd < 0 || ftruncate(*fd, sizeof(struct board)) != 0)
        abort();
    return board_open(*fd);
}

void board_reset(struct board *board)
{
    memset((void *)board, 0, sizeof *board);
}
