#include "daemon/supervisor.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daemon/channel.h"
#include "daemon/clock.h"
#include "daemon/endpoint.h"
#include "daemon/notify.h"
#include "daemon/outage.h"
#include "daemon/postmortem.h"
#include "daemon/process.h"
#include "daemon/worker.h"
#include "daemon/worker_process.h"

_Static_assert(WORKER_PROCESS_KILL_MS >= WORKER_END_MS + 500,
               "a worker that ends as it should is not killed");

enum supervisor_state {
    SUPERVISOR_STARTING, /* a worker runs that has not said "ready"; killed at kill_at_ns if it does not even listen */
    SUPERVISOR_RUNNING,  /* a worker serves */
    SUPERVISOR_WAITING,  /* no worker; the next one starts at restart_at_ns */
    SUPERVISOR_STOPPING, /* the worker was told to end; it is killed at kill_at_ns */
    SUPERVISOR_ENDED,    /* exit_code says how */
};

struct supervisor {
    const struct options *options; /* borrowed */
    struct config config;
    struct log *log; /* borrowed */
    struct endpoint rank, control;
    struct recorder recorder;
    struct postmortem *postmortem; /* owned; NULL: none was written yet */
    int recorder_fd, signal_fd;
    sigset_t signals, old_signals;
    enum supervisor_state state;
    int exit_code;
    struct worker_process worker;
    uint64_t failures; /* in a row */
    uint64_t restart_at_ns;
    uint64_t look_at_ns; /* when callers of a running worker are looked at again */
};

/* ---- the worker's start ---- */

static enum epd_status spawn(struct supervisor *supervisor, struct epd_error *error)
{
    struct worker_process *worker = &supervisor->worker;
    const struct inherited fds = {supervisor->rank.fd, supervisor->control.fd, -1, supervisor->recorder_fd};
    if (worker_process_start(worker, &fds, &supervisor->old_signals, &supervisor->config, error) != EPD_OK)
        return error->status;
    supervisor->state = SUPERVISOR_STARTING;
    struct epd_error ignored = {0};
    if (channel_send_config(worker->channel_fd, &supervisor->config, &ignored) != EPD_OK)
        log_write(supervisor->log, LOG_WARN, "worker pid %d: %s", (int)worker->pid,
                  ignored.text); /* it has died; SIGCHLD follows */
    return EPD_OK;
}

static void end(struct supervisor *supervisor, int code)
{
    supervisor->state = SUPERVISOR_ENDED;
    supervisor->exit_code = code;
}

static void schedule_restart(struct supervisor *supervisor)
{
    const struct config *config = &supervisor->config;
    uint64_t wait_ms = config->restart_first_ms;
    for (uint64_t i = 1; i < supervisor->failures && wait_ms < config->restart_max_ms; i++)
        wait_ms *= 2;
    wait_ms = wait_ms < config->restart_max_ms ? wait_ms : config->restart_max_ms;
    supervisor->restart_at_ns = clock_ns() + clock_ms_to_ns(wait_ms);
    supervisor->state = SUPERVISOR_WAITING;
    log_write(supervisor->log, LOG_WARN,
              "worker restarts in_ms %" PRIu64 " failures %" PRIu64 " last_exit %s", wait_ms,
              supervisor->failures, supervisor->worker.last_exit);
    char status[160];
    (void)snprintf(status, sizeof(status), "STATUS=worker failed %" PRIu64 " times (%s), restarting",
                   supervisor->failures, supervisor->worker.last_exit);
    (void)notify_send(status);
}

static void start_worker(struct supervisor *supervisor)
{
    struct epd_error error = {0};
    recorder_clear(&supervisor->recorder); /* of the worker before: this one may die before it can */
    if (spawn(supervisor, &error) == EPD_OK)
        return;
    log_write(supervisor->log, LOG_ERROR, "worker not started: %s", error.text);
    (void)snprintf(supervisor->worker.last_exit, sizeof(supervisor->worker.last_exit), "not started");
    supervisor->failures++;
    schedule_restart(supervisor);
}

/* ---- the worker's end ---- */

/* A worker that was killed could not write its flight recorder. */
static void dump_recorder(struct supervisor *supervisor)
{
    const struct postmortem_of of = {.config = &supervisor->config,
                                     .last_exit = supervisor->worker.last_exit,
                                     .generation = supervisor->worker.generation};
    postmortem_start(&supervisor->postmortem, &supervisor->recorder, &of, supervisor->log);
}

/* However long a start took that led to nothing, it was a failure like the one before. */
static int was_healthy(const struct supervisor *supervisor)
{
    return supervisor->worker.listens_ns && clock_ns() - supervisor->worker.listens_ns >=
                                                clock_ms_to_ns(supervisor->config.restart_healthy_ms);
}

static void worker_failed(struct supervisor *supervisor, pid_t pid, int status)
{
    const struct config *config = &supervisor->config;
    log_write(supervisor->log, LOG_ERROR, "worker pid %d failed: %s", (int)pid, supervisor->worker.last_exit);
    if (WIFSIGNALED(status))
        dump_recorder(supervisor);
    if (was_healthy(supervisor))
        supervisor->failures = 0;
    supervisor->failures++;
    if (WIFEXITED(status) && WEXITSTATUS(status) == WORKER_EXIT_CONFIG) {
        log_write(supervisor->log, LOG_ERROR, "worker cannot run with this configuration");
        end(supervisor, SUPERVISOR_EXIT_CONFIG);
    } else if (config->restart_limit && supervisor->failures >= config->restart_limit) {
        log_write(supervisor->log, LOG_ERROR, "worker failed %" PRIu64 " times in a row, giving up",
                  supervisor->failures);
        (void)notify_send("STATUS=worker failed too often");
        end(supervisor, SUPERVISOR_EXIT_GAVE_UP);
    } else {
        schedule_restart(supervisor);
    }
}

/* Also of a worker that was told to end before it could hear that: it had not begun to serve anybody. */
static int ended_as_told(const struct supervisor *supervisor, int status)
{
    if (WIFEXITED(status))
        return WEXITSTATUS(status) == WORKER_EXIT_DONE;
    return supervisor->state == SUPERVISOR_STOPPING && !supervisor->worker.listens_ns &&
           (WTERMSIG(status) == SIGTERM || supervisor->worker.killed_why[0]);
}

static void reap(struct supervisor *supervisor)
{
    struct worker_process *worker = &supervisor->worker;
    const pid_t pid = worker->pid;
    int status = 0;
    if (!pid || waitpid(pid, &status, WNOHANG) != pid)
        return;
    worker_process_reaped(worker, status);
    if (ended_as_told(supervisor, status))
        end(supervisor, SUPERVISOR_EXIT_DONE);
    else if (supervisor->state == SUPERVISOR_STOPPING)
        end(supervisor, SUPERVISOR_EXIT_FAILED);
    else
        worker_failed(supervisor, pid, status);
}

/* ---- signals ---- */

static void stop_worker(struct supervisor *supervisor)
{
    if (!supervisor->worker.pid) {
        end(supervisor, SUPERVISOR_EXIT_DONE);
        return;
    }
    const int again = supervisor->state == SUPERVISOR_STOPPING;
    const int drains = supervisor->worker.listens_ns && !again;
    const uint64_t patience_ms = WORKER_PROCESS_KILL_MS + (drains ? supervisor->config.drain_ms : 0);
    supervisor->state = SUPERVISOR_STOPPING;
    supervisor->worker.kill_at_ns = clock_ns() + clock_ms_to_ns(patience_ms);
    supervisor->worker.killed_why[0] = 0;
    (void)notify_send("STOPPING=1");
    if (supervisor->worker.ends)
        return;
    log_write(supervisor->log, LOG_INFO, "worker pid %d told to %s", (int)supervisor->worker.pid,
              again ? "stop" : "drain");
    (void)kill(supervisor->worker.pid, SIGTERM);
}

static void reload(struct supervisor *supervisor)
{
    struct config fresh;
    struct epd_error error = {0};
    if (options_load(supervisor->options, &fresh, &error) != EPD_OK) {
        log_write(supervisor->log, LOG_ERROR, "config not reloaded, the old one stays: %s", error.text);
        return;
    }
    uint32_t n_ignored = 0;
    const uint32_t n_changed = config_reload(&supervisor->config, &fresh, &n_ignored);
    supervisor->log->level = (enum log_level)supervisor->config.log_level;
    if (supervisor->worker.channel_fd >= 0 &&
        channel_send_config(supervisor->worker.channel_fd, &supervisor->config, &error) != EPD_OK)
        log_write(supervisor->log, LOG_ERROR, "config not passed to the worker: %s", error.text);
    else if (n_ignored)
        log_write(supervisor->log, LOG_WARN, "config reloaded keys_changed %u keys_that_need_a_restart %u",
                  n_changed, n_ignored);
}

static void on_signal(struct supervisor *supervisor)
{
    struct signalfd_siginfo info;
    if (read(supervisor->signal_fd, &info, sizeof(info)) != (ssize_t)sizeof(info))
        return;
    if (info.ssi_signo == SIGCHLD)
        reap(supervisor);
    else if (info.ssi_signo == SIGHUP)
        reload(supervisor);
    else
        stop_worker(supervisor);
}

/* By a signal, or because somebody has drained it: it has nobody to serve any more. */
static void on_ending(struct supervisor *supervisor)
{
    struct worker_process *worker = &supervisor->worker;
    worker->ends = 1;
    if (supervisor->state == SUPERVISOR_STOPPING)
        return;
    supervisor->state = SUPERVISOR_STOPPING;
    worker->kill_at_ns = clock_ns() + clock_ms_to_ns(WORKER_PROCESS_KILL_MS);
    (void)notify_send("STOPPING=1");
}

static void on_listening(struct supervisor *supervisor)
{
    struct worker_process *worker = &supervisor->worker;
    worker_process_serves(worker, &supervisor->config);
    if (supervisor->state == SUPERVISOR_STARTING && !worker->killed_why[0])
        worker->kill_at_ns = CLOCK_NEVER;
}

static void on_channel(struct supervisor *supervisor)
{
    struct worker_process *worker = &supervisor->worker;
    struct config unused;
    struct epd_error error = {0};
    switch (channel_receive(worker->channel_fd, &unused, &error)) {
    case CHANNEL_LISTENING:
        on_listening(supervisor);
        break;
    case CHANNEL_READY:
        if (supervisor->state == SUPERVISOR_STARTING) {
            supervisor->state = SUPERVISOR_RUNNING;
            (void)notify_send("READY=1\nSTATUS=serving");
        }
        break;
    case CHANNEL_ANSWER:
        worker_process_answers(worker, supervisor->log);
        break;
    case CHANNEL_ENDING:
        on_ending(supervisor);
        break;
    case CHANNEL_ENDED: /* SIGCHLD says the rest, and soon: the worker has nobody to serve any more */
        worker_process_hang_up(worker);
        if (worker->kill_at_ns == CLOCK_NEVER)
            worker->kill_at_ns = clock_ns() + clock_ms_to_ns(WORKER_PROCESS_KILL_MS);
        break;
    default:
        break;
    }
}

static const char *worker_state(const struct supervisor *supervisor)
{
    const struct worker_process *worker = &supervisor->worker;
    if (worker->pid && worker_process_is_suspect(worker))
        return "stuck";
    if (worker->pid && (worker->listens_ns || worker->killed_why[0]))
        return "ending";
    return supervisor->state == SUPERVISOR_WAITING ? "waiting" : "starting";
}

/* Callers wait. Those of a worker that serves are its own: it takes them in a moment. */
static void on_control(struct supervisor *supervisor)
{
    const struct worker_process *worker = &supervisor->worker;
    const uint64_t now_ns = clock_ns();
    const uint64_t at_ns = supervisor->restart_at_ns;
    if (worker->pid && worker->listens_ns && worker->channel_fd >= 0 && !worker->killed_why[0] &&
        !worker_process_is_suspect(worker) && !process_ending(worker->pid)) {
        supervisor->look_at_ns = now_ns + clock_ms_to_ns(OUTAGE_LOOK_MS);
        return;
    }
    const struct outage outage = {.worker = worker_state(supervisor),
                                  .generation = worker->generation,
                                  .hangs = worker->n_hangs,
                                  .failures = supervisor->failures,
                                  .restart_in_ms = at_ns > now_ns ? (at_ns - now_ns) / CLOCK_NS_PER_MS : 0,
                                  .last_exit = worker->last_exit};
    outage_answer(supervisor->control.fd, &outage);
}

/* ---- the loop ---- */

/* Until when callers of the control socket are left to the worker that starts. At the daemon's own start they wait for it,
 * however long it takes. */
static uint64_t patient_until_ns(const struct supervisor *supervisor)
{
    return supervisor->worker.generation > 1
               ? supervisor->worker.started_ns + clock_ms_to_ns(OUTAGE_PATIENCE_MS)
               : CLOCK_NEVER;
}

/* When callers are looked at: 0 while there is no worker, or one that was killed (a driver may hold it for long) or whose loop
 * does not come round. */
static uint64_t callers_at_ns(const struct supervisor *supervisor)
{
    if (supervisor->state == SUPERVISOR_WAITING || supervisor->worker.killed_why[0] ||
        worker_process_is_suspect(&supervisor->worker))
        return 0;
    return supervisor->worker.listens_ns ? supervisor->look_at_ns : patient_until_ns(supervisor);
}

static int answers_control(const struct supervisor *supervisor, uint64_t now_ns)
{
    if (supervisor->state == SUPERVISOR_STOPPING || supervisor->state == SUPERVISOR_ENDED)
        return 0;
    return now_ns >= callers_at_ns(supervisor);
}

static uint64_t earlier(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* When something is to be done that no fd tells of. */
static uint64_t next_at_ns(const struct supervisor *supervisor, uint64_t now_ns)
{
    const struct worker_process *worker = &supervisor->worker;
    if (supervisor->state == SUPERVISOR_WAITING)
        return supervisor->restart_at_ns;
    uint64_t at_ns = CLOCK_NEVER;
    if (worker->pid)
        at_ns = earlier(worker->kill_at_ns, worker->watch.at_ns);
    if (supervisor->state != SUPERVISOR_STOPPING && !answers_control(supervisor, now_ns))
        at_ns = earlier(at_ns, callers_at_ns(supervisor));
    return at_ns;
}

/* From the same moment as what is polled: else a time that passes in between is waited for by nobody. */
static int timeout_ms(const struct supervisor *supervisor, uint64_t now_ns)
{
    const uint64_t at_ns = next_at_ns(supervisor, now_ns);
    if (at_ns == CLOCK_NEVER)
        return -1;
    const uint64_t wait_ms = at_ns > now_ns ? (at_ns - now_ns) / CLOCK_NS_PER_MS + 1 : 0;
    return wait_ms < 60000 ? (int)wait_ms : 60000;
}

static void on_time(struct supervisor *supervisor)
{
    const uint64_t now_ns = clock_ns();
    struct worker_process *worker = &supervisor->worker;
    if (supervisor->state == SUPERVISOR_WAITING && now_ns >= supervisor->restart_at_ns)
        start_worker(supervisor);
    if (!worker->pid)
        return;
    if (now_ns >= worker->kill_at_ns)
        worker_process_kill(worker, &supervisor->config, supervisor->log, now_ns);
    else
        worker_process_watch(worker, &supervisor->config, supervisor->log, now_ns);
}

static void run_loop(struct supervisor *supervisor)
{
    while (supervisor->state != SUPERVISOR_ENDED) {
        const uint64_t now_ns = clock_ns();
        struct pollfd fds[3] = {
            {.fd = supervisor->signal_fd, .events = POLLIN},
            {.fd = supervisor->worker.channel_fd, .events = POLLIN},
            {.fd = answers_control(supervisor, now_ns) ? supervisor->control.fd : -1, .events = POLLIN},
        };
        if (poll(fds, 3, timeout_ms(supervisor, now_ns)) < 0 && errno != EINTR)
            break;
        if (fds[1].revents)
            on_channel(supervisor);
        if (fds[2].revents)
            on_control(supervisor);
        if (fds[0].revents)
            on_signal(supervisor);
        on_time(supervisor);
    }
}

/* ---- start and end ---- */

static enum epd_status open_endpoints(struct supervisor *supervisor, const struct inherited *inherited,
                                      struct epd_error *error)
{
    const struct config *config = &supervisor->config;
    enum epd_status status;
    if (inherited->rank_fd >= 0)
        status = endpoint_adopt(&supervisor->rank, inherited->rank_fd, config->socket, error);
    else
        status = endpoint_open(&supervisor->rank, config->socket, (uint32_t)config->socket_mode,
                               config->socket_group, error);
    if (status != EPD_OK)
        return status;
    if (inherited->control_fd >= 0)
        return endpoint_adopt(&supervisor->control, inherited->control_fd, config->control_socket, error);
    return endpoint_open(&supervisor->control, config->control_socket, (uint32_t)config->control_mode,
                         config->control_group, error);
}

static enum epd_status open_signals(struct supervisor *supervisor, struct epd_error *error)
{
    sigemptyset(&supervisor->signals);
    sigaddset(&supervisor->signals, SIGTERM);
    sigaddset(&supervisor->signals, SIGINT);
    sigaddset(&supervisor->signals, SIGHUP);
    sigaddset(&supervisor->signals, SIGCHLD);
    if (sigprocmask(SIG_BLOCK, &supervisor->signals, &supervisor->old_signals) != 0)
        return error_set(error, EPD_SYSTEM, "signals: %s", strerror(errno));
    supervisor->signal_fd = signalfd(-1, &supervisor->signals, SFD_CLOEXEC | SFD_NONBLOCK);
    if (supervisor->signal_fd < 0)
        return error_set(error, EPD_SYSTEM, "signalfd: %s", strerror(errno));
    return EPD_OK;
}

static void close_all(struct supervisor *supervisor)
{
    endpoint_close(&supervisor->rank);
    endpoint_close(&supervisor->control);
    recorder_close(&supervisor->recorder);
    postmortem_finish(&supervisor->postmortem, supervisor->log, SUPERVISOR_RECORD_MS);
    const int fds[] = {supervisor->recorder_fd, supervisor->signal_fd, supervisor->worker.channel_fd};
    for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
        if (fds[i] >= 0)
            (void)close(fds[i]);
}

int supervisor_run(const struct options *options, const struct config *config,
                   const struct inherited *inherited, struct log *log)
{
    struct supervisor supervisor = {.options = options,
                                    .config = *config,
                                    .log = log,
                                    .rank = {.fd = -1, .lock_fd = -1},
                                    .control = {.fd = -1, .lock_fd = -1},
                                    .recorder_fd = -1,
                                    .signal_fd = -1,
                                    .worker = {.channel_fd = -1, .kill_at_ns = CLOCK_NEVER}};
    struct epd_error error = {0};
    (void)signal(SIGPIPE, SIG_IGN);
    enum epd_status status = open_signals(&supervisor, &error);
    if (status == EPD_OK)
        status = open_endpoints(&supervisor, inherited, &error);
    if (status == EPD_OK)
        status = recorder_create(&supervisor.recorder_fd, &error);
    if (status == EPD_OK)
        status = recorder_open(&supervisor.recorder, supervisor.recorder_fd, &error);
    if (status == EPD_OK) {
        log_write(log, LOG_INFO, "epd %s socket %s control_socket %s", EPD_VERSION, supervisor.rank.path,
                  supervisor.control.path);
        start_worker(&supervisor);
        run_loop(&supervisor);
        log_write(log, LOG_INFO, "epd ends code %d", supervisor.exit_code);
    } else {
        log_write(log, LOG_ERROR, "cannot serve: %s", error.text);
        supervisor.exit_code = SUPERVISOR_EXIT_FAILED;
    }
    close_all(&supervisor);
    return supervisor.exit_code;
}
