/* A worker without its supervisor: the test plays that, on the channel and as the parent. */
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daemon/channel.h"
#include "daemon/inherited.h"
#include "daemon/recorder.h"
#include "daemon/worker.h"
#include "tests/unit/daemon/suite.h"

#define DEADLINE_MS 10000

static char directory[64];
static struct config config;
static struct inherited fds;
static int channel; /* the supervisor's end */
static struct epd_error error;

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    ck_assert_uint_lt(strlen(path), sizeof(address.sun_path));
    strcpy(address.sun_path, path);
    ck_assert_int_eq(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    ck_assert_int_eq(listen(fd, 8), 0);
    return fd;
}

/* What a worker gets, and who it hears. */
static void prepare(void)
{
    int ends[2];
    strcpy(directory, "/tmp/epd-unit-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(directory));
    config_init(&config);
    config.backend = CONFIG_BACKEND_HOST;
    (void)snprintf(config.socket, sizeof(config.socket), "%s/epd.sock", directory);
    (void)snprintf(config.control_socket, sizeof(config.control_socket), "%s/control.sock", directory);
    ck_assert_int_eq(channel_create(ends, &error), EPD_OK);
    ck_assert_int_eq(recorder_create(&fds.recorder_fd, &error), EPD_OK);
    fds.rank_fd = listen_at(config.socket);
    fds.control_fd = listen_at(config.control_socket);
    fds.channel_fd = ends[1];
    channel = ends[0];
}

static void clean(void)
{
    char command[128];
    if (channel >= 0)
        close(channel);
    close(fds.recorder_fd);
    close(fds.rank_fd);
    close(fds.control_fd);
    (void)snprintf(command, sizeof(command), "rm -r %s", directory);
    ck_assert_int_eq(system(command), 0);
}

/* The test, or a child of it, becomes the worker. */
static void become_worker(void)
{
    struct handover handover;
    char name[] = "epd", worker[] = "--worker";
    char *const argv[] = {name, worker, NULL};
    if (handover_create(&handover, &fds, &error) == EPD_OK && handover_give(&handover) == 0)
        (void)execve(EPD_BINARY, argv, handover.environment);
    _exit(127);
}

static enum channel_event next_word(void)
{
    struct config unused;
    struct pollfd wait = {.fd = channel, .events = POLLIN};
    if (poll(&wait, 1, DEADLINE_MS) != 1)
        return CHANNEL_NOTHING;
    return channel_receive(channel, &unused, &error);
}

static pid_t start_worker(void)
{
    const pid_t pid = fork();
    if (pid == 0)
        become_worker();
    close(fds.channel_fd);
    ck_assert_int_eq(channel_send_config(channel, &config, &error), EPD_OK);
    ck_assert_int_eq(next_word(), CHANNEL_LISTENING);
    ck_assert_int_eq(next_word(), CHANNEL_READY);
    return pid;
}

/* Its wait status, if it ends in time. */
static int wait_end(pid_t pid)
{
    int status = 0;
    for (int waited = 0; waitpid(pid, &status, WNOHANG) != pid; waited++, usleep(1000))
        ck_assert_int_lt(waited, DEADLINE_MS);
    return status;
}

START_TEST(it_says_that_its_loop_comes_round_whenever_it_is_asked)
{
    const pid_t pid = start_worker();
    for (int i = 0; i < 100; i++) {
        ck_assert_int_eq(channel_send_question(channel, &error), EPD_OK);
        ck_assert_int_eq(next_word(), CHANNEL_ANSWER);
    }
    kill(pid, SIGKILL);
    (void)wait_end(pid);
}
END_TEST

START_TEST(it_says_that_it_ends_before_it_takes_itself_down)
{
    const pid_t pid = start_worker();
    ck_assert_int_eq(kill(pid, SIGTERM), 0);
    ck_assert_int_eq(next_word(), CHANNEL_ENDING);
    ck_assert_int_eq(next_word(), CHANNEL_ENDED);
    const int status = wait_end(pid);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == WORKER_EXIT_DONE);
}
END_TEST

/* The supervisor may have died before the worker could ask to die with it. */
START_TEST(it_ends_when_the_channel_does_though_its_parent_lives)
{
    const pid_t pid = start_worker();
    close(channel);
    channel = -1;
    const int status = wait_end(pid);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == WORKER_EXIT_FATAL);
}
END_TEST

/* Its loop may stand, so that it hears nothing: stopped, it is killed all the same. */
START_TEST(it_dies_with_its_parent_though_the_channel_lives)
{
    int told[2];
    pid_t pid = 0;
    ck_assert_int_eq(prctl(PR_SET_CHILD_SUBREAPER, 1), 0); /* whose child it is then */
    ck_assert_int_eq(pipe(told), 0);
    const pid_t parent = fork();
    if (parent == 0) {
        pid = start_worker();
        (void)!write(told[1], &pid, sizeof(pid));
        for (;;)
            pause();
    }
    close(fds.channel_fd);
    ck_assert_int_eq((int)read(told[0], &pid, sizeof(pid)), (int)sizeof(pid));
    ck_assert_int_eq(kill(pid, SIGSTOP), 0);
    kill(parent, SIGKILL);
    (void)wait_end(parent);
    const int status = wait_end(pid);
    ck_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    close(told[0]);
    close(told[1]);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {it_says_that_its_loop_comes_round_whenever_it_is_asked,
                                  it_says_that_it_ends_before_it_takes_itself_down,
                                  it_ends_when_the_channel_does_though_its_parent_lives,
                                  it_dies_with_its_parent_though_the_channel_lives, NULL};
    return suite_run("daemon_worker", tests, prepare, clean);
}
