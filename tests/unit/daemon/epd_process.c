#include "tests/unit/daemon/epd_process.h"

#include <check.h>
#include <ftw.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tests/unit/daemon/raw_client.h"

#define MAX_ARGS 32

void epd_prepare(struct epd_process *epd)
{
    *epd = (struct epd_process){.directory = "/tmp/epd-unit-XXXXXX"};
    ck_assert_ptr_nonnull(mkdtemp(epd->directory));
    snprintf(epd->socket, sizeof(epd->socket), "%s/epd.sock", epd->directory);
    snprintf(epd->control, sizeof(epd->control), "%s/epd-control.sock", epd->directory);
}

void epd_spawn(struct epd_process *epd, const char *const *flags)
{
    const char *args[MAX_ARGS] = {"epd",       "--backend",        "host",      "--devices", "2", "--socket",
                                  epd->socket, "--control-socket", epd->control};
    int n = 9;
    for (; flags && *flags && n + 1 < MAX_ARGS; flags++)
        args[n++] = *flags;
    epd->pid = fork();
    ck_assert_int_ge(epd->pid, 0);
    if (epd->pid == 0) {
        execv(EPD_BINARY, (char *const *)args);
        _exit(127);
    }
}

long epd_status_number(const struct epd_process *epd, const char *key)
{
    char *text = raw_control(epd->control, CONTROL_STATUS);
    json_t *document = json_loads(text, 0, NULL);
    ck_assert_ptr_nonnull(document);
    long value = (long)json_integer_value(json_object_get(document, key));
    json_decref(document);
    free(text);
    return value;
}

void epd_start(struct epd_process *epd, const char *const *flags)
{
    epd_prepare(epd);
    epd_spawn(epd, flags);
    ck_assert_int_gt(epd_status_number(epd, "pid"), 0); /* answered by the worker, so it serves */
}

int epd_wait(struct epd_process *epd)
{
    int status = 0;
    for (int waited = 0; waitpid(epd->pid, &status, WNOHANG) != epd->pid; waited += 10) {
        ck_assert_msg(waited < 10000, "epd does not end");
        (void)nanosleep(&(struct timespec){0, 10000000}, NULL);
    }
    epd->pid = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static int remove_one(const char *path, const struct stat *info, int type, struct FTW *at)
{
    (void)info;
    (void)type;
    (void)at;
    return remove(path);
}

void epd_clean(struct epd_process *epd)
{
    (void)nftw(epd->directory, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

void epd_stop(struct epd_process *epd)
{
    kill(epd->pid, SIGTERM);
    ck_assert_int_eq(epd_wait(epd), 0);
    epd_clean(epd);
}
