#include "tests/gpu/fault/board.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "proto/status.h"

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

static const char *place_text(int place)
{
    static const char *const texts[] = {
#define PLACE_TEXT(name, text) text,
        BOARD_PLACES(PLACE_TEXT)
#undef PLACE_TEXT
    };
    return place >= 0 && place < (int)(sizeof texts / sizeof texts[0]) ? texts[place] : "a place unknown";
}

/* One line of a file of /proc, without its end. */
static void read_line(int pid, const char *task, const char *name, char *line, size_t bytes)
{
    char path[320];
    snprintf(path, sizeof path, "/proc/%d/task/%s/%s", pid, task, name);
    FILE *file = fopen(path, "r");
    line[0] = 0;
    if (!file)
        return;
    if (!fgets(line, (int)bytes, file))
        line[0] = 0;
    line[strcspn(line, "\n")] = 0;
    fclose(file);
}

static void print_threads(int pid)
{
    char path[64], name[64], place[64], call[128];
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *tasks = opendir(path);
    for (struct dirent *entry; tasks && (entry = readdir(tasks));) {
        if (entry->d_name[0] == '.')
            continue;
        read_line(pid, entry->d_name, "comm", name, sizeof name);
        read_line(pid, entry->d_name, "wchan", place, sizeof place);
        read_line(pid, entry->d_name, "syscall", call, sizeof call);
        fprintf(stderr, "    thread %s %s: %s, syscall %.40s\n", entry->d_name, name, place, call);
    }
    if (tasks)
        closedir(tasks);
}

void board_print(const struct board *board, unsigned slot, int pid)
{
    const struct board_rank *rank = &board->ranks[slot];
    fprintf(stderr, "  rank at place %u, pid %d: in %s; good steps %lu, recoveries %d", slot, pid,
            place_text(atomic_load(&rank->place)), atomic_load(&rank->n_good),
            atomic_load(&rank->n_recovered));
    for (int status = 0; status < BOARD_N_STATUSES; status++)
        if (atomic_load(&rank->n_ended[status]))
            fprintf(stderr, ", %d ended %s", atomic_load(&rank->n_ended[status]),
                    status_name((enum epd_status)status));
    fputc('\n', stderr);
    if (pid)
        print_threads(pid);
}
