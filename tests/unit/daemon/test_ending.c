/* The supervisor and a worker that takes itself down. The worker is this program too: the supervisor starts what it is
 * itself. */
#include <linux/sockios.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daemon/channel.h"
#include "daemon/inherited.h"
#include "daemon/supervisor.h"
#include "tests/unit/daemon/suite.h"

#define DEADLINE_MS 10000
#define TEARDOWN_MS 300

static struct epd_error error;

/* All that was said has been read. */
static void await_reader(int fd)
{
    int n_bytes = 1;
    for (int waited = 0; ioctl(fd, SIOCOUTQ, &n_bytes) == 0 && n_bytes && waited < DEADLINE_MS; waited++)
        usleep(1000);
}

/* Its loop is over, and what has handled its signals with it. */
static int be_worker(void)
{
    struct inherited fds = {-1, -1, -1, -1};
    if (inherited_take(&fds, &error) != EPD_OK || channel_send_listening(fds.channel_fd, &error) != EPD_OK ||
        channel_send_ready(fds.channel_fd, &error) != EPD_OK ||
        channel_send_ending(fds.channel_fd, &error) != EPD_OK)
        return 9;
    await_reader(fds.channel_fd);
    (void)kill(getppid(), SIGTERM); /* as an operator who has drained it, and stops it at that moment */
    usleep(TEARDOWN_MS * 1000);
    return 0;
}

static int be_supervisor(const char *directory)
{
    char name[] = "epd";
    char *argv[] = {name, NULL};
    const struct options options = {.argc = 1, .argv = argv};
    const struct inherited none = {-1, -1, -1, -1};
    struct config config;
    struct log log;
    config_init(&config);
    (void)snprintf(config.socket, sizeof(config.socket), "%s/epd.sock", directory);
    (void)snprintf(config.control_socket, sizeof(config.control_socket), "%s/control.sock", directory);
    log_init(&log, "supervisor", LOG_INFO, STDERR_FILENO);
    const int code = supervisor_run(&options, &config, &none, &log);
    log_fini(&log);
    return code;
}

START_TEST(a_signal_while_the_worker_takes_itself_down_does_not_make_its_end_a_failure)
{
    char directory[] = "/tmp/epd-unit-XXXXXX";
    int status = 0;
    ck_assert_ptr_nonnull(mkdtemp(directory));
    const pid_t pid = fork();
    if (pid == 0)
        _exit(be_supervisor(directory));
    for (int waited = 0; waitpid(pid, &status, WNOHANG) != pid; waited++, usleep(1000))
        ck_assert_int_lt(waited, DEADLINE_MS);
    ck_assert(WIFEXITED(status));
    ck_assert_int_eq(WEXITSTATUS(status), SUPERVISOR_EXIT_DONE);
    char command[64];
    (void)snprintf(command, sizeof(command), "rm -r %s", directory);
    ck_assert_int_eq(system(command), 0);
}
END_TEST

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "--worker") == 0)
        return be_worker();
    const TTest *const tests[] = {a_signal_while_the_worker_takes_itself_down_does_not_make_its_end_a_failure,
                                  NULL};
    return suite_run("daemon_ending", tests, NULL, NULL);
}
