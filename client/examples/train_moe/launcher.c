#include "launcher.h"

#include <errno.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

/* What a rank is told beyond the launcher's own arguments. */
#define N_RANK_ARGUMENTS 3

static enum epd_status start_rank(int argc, char **argv, int rank, int exchange_fd, pid_t *pid)
{
    char rank_option[32], fd_option[32], launcher_option[32];
    snprintf(rank_option, sizeof(rank_option), "--rank=%d", rank);
    snprintf(fd_option, sizeof(fd_option), "--exchange-fd=%d", exchange_fd);
    snprintf(launcher_option, sizeof(launcher_option), "--launcher-pid=%d", (int)getpid());
    char *more[N_RANK_ARGUMENTS] = {rank_option, fd_option, launcher_option};
    char **arguments = calloc((size_t)argc + N_RANK_ARGUMENTS + 1, sizeof(char *));
    if (!arguments)
        return EPD_NO_MEMORY;
    memcpy(arguments, argv, (size_t)argc * sizeof(char *));
    memcpy(arguments + argc, more, sizeof(more));
    /* A fresh program image for each rank, as every launcher of training jobs does it: what a library has set
     * up in this process does not leak into the ranks. */
    int error = posix_spawn(pid, "/proc/self/exe", NULL, NULL, arguments, environ);
    free(arguments);
    if (error) {
        fprintf(stderr, "epd-train-moe: starting rank %d: %s\n", rank, strerror(error));
        return EPD_SYSTEM;
    }
    return EPD_OK;
}

static void end_ranks(const pid_t *pids, uint32_t n_ranks)
{
    for (uint32_t rank = 0; rank < n_ranks; rank++)
        if (pids[rank] > 0)
            kill(pids[rank], SIGTERM);
}

static void print_end(uint32_t rank, int wait_status)
{
    if (WIFSIGNALED(wait_status))
        fprintf(stderr, "epd-train-moe: rank %u was ended by signal %d\n", rank, WTERMSIG(wait_status));
    else
        fprintf(stderr, "epd-train-moe: rank %u ended with exit code %d\n", rank, WEXITSTATUS(wait_status));
}

/* Reaps one rank; returns its number, or -1 when none is left. */
static int wait_rank(pid_t *pids, uint32_t n_ranks, int *wait_status)
{
    pid_t pid = -1;
    while ((pid = waitpid(-1, wait_status, 0)) < 0 && errno == EINTR)
        ;
    for (uint32_t rank = 0; pid > 0 && rank < n_ranks; rank++) {
        if (pids[rank] == pid) {
            pids[rank] = 0;
            return (int)rank;
        }
    }
    return -1;
}

enum epd_status launcher_run(const struct settings *settings, struct exchange *exchange, int exchange_fd,
                             int argc, char **argv)
{
    pid_t pids[MAX_RANKS] = {0};
    uint32_t n_running = 0;
    enum epd_status result = EPD_OK;
    while (result == EPD_OK && n_running < settings->n_ranks) {
        result = start_rank(argc, argv, (int)n_running, exchange_fd, &pids[n_running]);
        n_running += result == EPD_OK;
    }
    if (result != EPD_OK)
        end_ranks(pids, settings->n_ranks);
    while (n_running > 0) {
        int wait_status = 0;
        int rank = wait_rank(pids, settings->n_ranks, &wait_status);
        if (rank < 0)
            break;
        n_running--;
        if (wait_status == 0)
            continue;
        /* The first failure is the one to tell; the others only follow from it. */
        if (result == EPD_OK)
            print_end((uint32_t)rank, wait_status);
        result = EPD_PEER_LOST;
        exchange_abort(exchange);
        end_ranks(pids, settings->n_ranks);
    }
    return result;
}
