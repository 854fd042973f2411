#include "daemon/worker_process.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daemon/channel.h"
#include "daemon/clock.h"
#include "daemon/process.h"

/* ---- start ---- */

/* The child, between fork and exec: what may take a lock was done before. */
static void become_worker(struct handover *handover, const sigset_t *signals, char *const argv[])
{
    (void)sigprocmask(SIG_SETMASK, signals, NULL);
    if (handover_give(handover) == 0)
        (void)execve("/proc/self/exe", argv, handover->environment);
    _exit(127);
}

/* The child does not come back. */
static pid_t fork_worker(const struct worker_process *process, struct handover *handover,
                         const sigset_t *signals)
{
    char generation[24], n_hangs[24], last_exit[sizeof(process->last_exit)];
    (void)snprintf(generation, sizeof(generation), "%" PRIu64, process->generation);
    (void)snprintf(n_hangs, sizeof(n_hangs), "%" PRIu64, process->n_hangs);
    (void)snprintf(last_exit, sizeof(last_exit), "%s", process->last_exit);
    char name[] = "epd", worker[] = "--worker", flag[] = "--generation", last[] = "--last-exit",
         hangs[] = "--hangs";
    char *const argv[] = {name, worker, flag, generation, last, last_exit, hangs, n_hangs, NULL};
    const pid_t pid = fork();
    if (pid == 0)
        become_worker(handover, signals, argv);
    return pid;
}

enum epd_status worker_process_start(struct worker_process *process, const struct inherited *given,
                                     const sigset_t *signals, const struct config *config,
                                     struct epd_error *error)
{
    int channel[2];
    struct handover handover;
    enum epd_status status = channel_create(channel, error);
    if (status != EPD_OK)
        return status;
    struct inherited fds = *given;
    fds.channel_fd = channel[1];
    status = handover_create(&handover, &fds, error);
    const pid_t pid = status == EPD_OK ? fork_worker(process, &handover, signals) : -1;
    if (status == EPD_OK && pid < 0)
        status = error_set(error, EPD_SYSTEM, "fork: %s", strerror(errno));
    handover_destroy(&handover);
    (void)close(channel[1]);
    if (status != EPD_OK) {
        (void)close(channel[0]);
        return status;
    }
    process->pid = pid;
    process->channel_fd = channel[0];
    process->generation++;
    process->started_ns = clock_ns();
    process->listens_ns = 0;
    process->kill_at_ns = process->started_ns + clock_ms_to_ns(config->start_deadline_ms);
    process->ends = 0;
    process->killed_why[0] = 0;
    loop_watch_start(&process->watch, 0, process->started_ns);
    return EPD_OK;
}

void worker_process_serves(struct worker_process *process, const struct config *config)
{
    process->listens_ns = clock_ns();
    loop_watch_start(&process->watch, config->loop_deadline_ms, process->listens_ns);
}

/* ---- end ---- */

void worker_process_hang_up(struct worker_process *process)
{
    (void)close(process->channel_fd);
    process->channel_fd = -1;
    loop_watch_start(&process->watch, 0, clock_ns());
}

void worker_process_reaped(struct worker_process *process, int status)
{
    const size_t bytes = sizeof(process->last_exit);
    if (WIFSIGNALED(status) && process->killed_why[0])
        (void)snprintf(process->last_exit, bytes, "%s", process->killed_why);
    else if (WIFSIGNALED(status))
        (void)snprintf(process->last_exit, bytes, "signal %d (%s)", WTERMSIG(status),
                       strsignal(WTERMSIG(status)));
    else
        (void)snprintf(process->last_exit, bytes, "exit code %d", WEXITSTATUS(status));
    if (process->channel_fd >= 0)
        worker_process_hang_up(process);
    process->pid = 0;
}

void worker_process_kill(struct worker_process *process, const struct config *config, struct log *log,
                         uint64_t now_ns)
{
    char *why = process->killed_why;
    process->kill_at_ns = now_ns + clock_ms_to_ns(WORKER_PROCESS_KILL_MS);
    if (process_ending(process->pid)) /* it does end: the kernel takes down what it had */
        return;
    (void)kill(process->pid, SIGKILL);
    if (why[0])
        return;
    if (!process->listens_ns)
        (void)snprintf(why, sizeof(process->killed_why), "did not serve within %" PRIu64 " ms, killed",
                       config->start_deadline_ms);
    else
        (void)snprintf(why, sizeof(process->killed_why), "did not end in time, killed");
    (void)snprintf(process->last_exit, sizeof(process->last_exit), "%s", why);
    log_write(log, LOG_ERROR, "worker pid %d %s", (int)process->pid, why);
}

/* ---- its loop ---- */

static uint64_t waited_ms(const struct worker_process *process)
{
    return process->watch.waited_ns / CLOCK_NS_PER_MS;
}

static uint64_t limit_ms(const struct worker_process *process)
{
    return process->watch.limit_ns / CLOCK_NS_PER_MS;
}

static void ask(struct worker_process *process)
{
    struct epd_error ignored = {0}; /* it does not read, or has died: that time counts, or SIGCHLD follows */
    if (channel_send_question(process->channel_fd, &ignored) == EPD_OK)
        loop_watch_asked(&process->watch);
}

static void warn(const struct worker_process *process, struct log *log)
{
    char what[96];
    process_describe(process->pid, what, sizeof(what));
    log_write(log, LOG_WARN,
              "worker pid %d loop has not come round for_ms %" PRIu64 " loop_deadline_ms %" PRIu64 " %s",
              (int)process->pid, waited_ms(process), limit_ms(process), what);
}

static void end_stuck(struct worker_process *process, struct log *log, uint64_t now_ns)
{
    char what[96];
    process_describe(process->pid, what, sizeof(what));
    process->n_hangs++;
    (void)snprintf(process->killed_why, sizeof(process->killed_why), "loop stuck for %" PRIu64 " ms, killed",
                   waited_ms(process));
    (void)snprintf(process->last_exit, sizeof(process->last_exit), "%s", process->killed_why);
    log_write(log, LOG_ERROR, "worker pid %d %s loop_deadline_ms %" PRIu64 " %s hangs %" PRIu64,
              (int)process->pid, process->killed_why, limit_ms(process), what, process->n_hangs);
    (void)kill(process->pid, SIGABRT);
    (void)kill(process->pid, SIGCONT); /* one that was stopped hears the other signal only then */
    process->kill_at_ns = now_ns + clock_ms_to_ns(WORKER_PROCESS_KILL_MS);
    loop_watch_start(&process->watch, 0, now_ns);
}

void worker_process_watch(struct worker_process *process, const struct config *config, struct log *log,
                          uint64_t now_ns)
{
    struct loop_watch *watch = &process->watch;
    if (!process->listens_ns || process->channel_fd < 0 || process->kill_at_ns != CLOCK_NEVER) {
        loop_watch_start(watch, 0, now_ns); /* it does not serve yet, or its time runs out anyway */
        return;
    }
    loop_watch_limit(watch, config->loop_deadline_ms, now_ns);
    if (now_ns < watch->at_ns)
        return;
    if (process_held(process->pid))
        loop_watch_excuse(watch, now_ns);
    switch (loop_watch_look(watch, now_ns)) {
    case LOOP_WATCH_ASK:
        ask(process);
        break;
    case LOOP_WATCH_SUSPECT:
        warn(process, log);
        break;
    case LOOP_WATCH_STUCK:
        end_stuck(process, log, now_ns);
        break;
    default:
        break;
    }
}

void worker_process_answers(struct worker_process *process, struct log *log)
{
    struct loop_watch *watch = &process->watch;
    if (!watch->limit_ns) /* it was killed for it, or is not watched any more */
        return;
    if (watch->suspected)
        log_write(log, LOG_WARN, "worker pid %d loop comes round again after_ms %" PRIu64, (int)process->pid,
                  waited_ms(process));
    loop_watch_answered(watch, clock_ns());
}

int worker_process_is_suspect(const struct worker_process *process)
{
    return process->watch.suspected;
}
