/* epd: reads options and configuration, then is either the supervisor or, when the supervisor started it, the
 * worker. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "daemon/inherited.h"
#include "daemon/log.h"
#include "daemon/options.h"
#include "daemon/supervisor.h"
#include "daemon/worker.h"

/* With standard fds closed, the next socket would become "standard error" and get log lines. */
static void fill_standard_fds(void)
{
    int fd;
    do
        fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0)
        (void)close(fd);
}

static int fail(const struct epd_error *error, int code)
{
    (void)fprintf(stderr, "epd: %s\n", error->text);
    return code;
}

static int run_worker(const struct options *options, const struct inherited *fds)
{
    struct log log;
    log_init(&log, "worker", LOG_INFO, STDERR_FILENO);
    const struct worker_start start = {.rank_fd = fds->rank_fd,
                                       .control_fd = fds->control_fd,
                                       .channel_fd = fds->channel_fd,
                                       .recorder_fd = fds->recorder_fd,
                                       .generation = options->generation,
                                       .last_exit = options->last_exit,
                                       .n_hangs = options->n_hangs,
                                       .supervisor_pid = (int)getppid()};
    if (fds->rank_fd < 0 || fds->control_fd < 0 || fds->channel_fd < 0 || fds->recorder_fd < 0) {
        (void)fprintf(stderr, "epd: --worker is for the supervisor's use\n");
        return SUPERVISOR_EXIT_CONFIG;
    }
    const int code = worker_run(&start, &log);
    log_fini(&log);
    return code;
}

static int run_supervisor(const struct options *options, const struct inherited *fds)
{
    struct epd_error error = {0};
    struct config config;
    if (options_load(options, &config, &error) != EPD_OK)
        return fail(&error, SUPERVISOR_EXIT_CONFIG);
    if (options->action == OPTIONS_CHECK_CONFIG) {
        (void)printf("configuration ok: socket %s, control socket %s\n", config.socket,
                     config.control_socket);
        return SUPERVISOR_EXIT_DONE;
    }
    struct log log;
    log_init(&log, "supervisor", (enum log_level)config.log_level, STDERR_FILENO);
    const int code = supervisor_run(options, &config, fds, &log);
    log_fini(&log);
    return code;
}

int main(int argc, char **argv)
{
    struct options options;
    struct inherited fds;
    struct epd_error error = {0};
    fill_standard_fds();
    if (options_parse(&options, argc, argv, &error) != EPD_OK)
        return fail(&error, SUPERVISOR_EXIT_CONFIG);
    if (options.action == OPTIONS_HELP) {
        options_help(stdout);
        return SUPERVISOR_EXIT_DONE;
    }
    if (options.action == OPTIONS_VERSION) {
        (void)printf("epd %s\n", EPD_VERSION);
        return SUPERVISOR_EXIT_DONE;
    }
    if (inherited_take(&fds, &error) != EPD_OK)
        return fail(&error, SUPERVISOR_EXIT_CONFIG);
    return options.action == OPTIONS_WORKER ? run_worker(&options, &fds) : run_supervisor(&options, &fds);
}
