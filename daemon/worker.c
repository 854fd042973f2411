#include "daemon/worker.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/channel.h"
#include "daemon/clock.h"
#include "daemon/flight.h"
#include "daemon/gather.h"
#include "daemon/group.h"
#include "daemon/group_span.h"
#include "daemon/session.h"

/* ---- epoch, dump ---- */

uint64_t worker_next_epoch(struct worker *worker)
{
    return ++worker->epoch;
}

void worker_dump(struct worker *worker, const char *why)
{
    const uint64_t now_ns = clock_ns();
    if (worker->dumped_ns && now_ns - worker->dumped_ns < WORKER_DUMP_INTERVAL_NS)
        return;
    worker->dumped_ns = now_ns;
    dump_to_file(worker, why);
}

/* ---- stop ---- */

/* To the supervisor: it sees the channel end. */
static void leave_callers(struct worker *worker)
{
    (void)uv_poll_stop(&worker->channel);
    (void)shutdown(worker->start.channel_fd, SHUT_WR);
}

void worker_stop(struct worker *worker, enum close_reason reason, enum worker_exit code)
{
    if (worker->state == WORKER_STOPPING)
        return;
    worker->state = WORKER_STOPPING;
    worker->exit_code = code;
    worker->stop_deadline_ns = clock_ns() + clock_ms_to_ns(WORKER_STOP_MS);
    listener_stop(&worker->rank_listener);
    listener_stop(&worker->control_listener);
    if (code == WORKER_EXIT_FATAL)
        leave_callers(worker);
    list_each(node, after, &worker->sessions)
        session_close(list_owner(node, struct session, in_worker), reason, NULL);
    session_end_closed(worker); /* the other nodes hear why their groups end before they hear that we do */
    fabric_stop(worker->fabric);
    worker_watch(worker);
}

void worker_fail(struct worker *worker, const struct epd_error *error)
{
    if (worker->state == WORKER_STOPPING || worker->fails)
        return;
    worker->fails = 1;
    log_write(worker->log, LOG_ERROR, "worker fails status %s: %s", status_name(error->status), error->text);
    dump_to_file_last(worker, error->text); /* a copy: what the stop does to the steps is no part of it */
}

void worker_drain(struct worker *worker)
{
    if (worker->state != WORKER_SERVING)
        return;
    struct epd_error error = {0};
    (void)!failpoint_hit(&worker->failpoints, "drain", &error); /* may sleep or kill; cannot fail */
    worker->state = WORKER_DRAINING;
    worker->drain_deadline_ns = clock_ns() + clock_ms_to_ns(worker->config.drain_ms);
    log_write(worker->log, LOG_INFO, "worker draining sessions %zu flights %u",
              registry_count(&worker->registry, REGISTRY_SESSION), worker->n_flights);
    list_each(node, after, &worker->groups) group_drain(list_owner(node, struct group, in_worker));
    worker_watch(worker);
}

static int all_idle(const struct worker *worker)
{
    list_each(node, after,
              &worker->groups) if (!group_idle(list_owner(node, struct group, in_worker))) return 0;
    return 1;
}

static int all_gone(const struct worker *worker)
{
    return registry_count(&worker->registry, REGISTRY_SESSION) == 0 && list_empty(&worker->groups);
}

/* ---- the loop's callbacks ---- */

static void on_before_sleep(uv_prepare_t *prepare)
{
    struct worker *worker = prepare->data;
    if (worker->fails)
        worker_stop(worker, CLOSE_RESTART, WORKER_EXIT_FATAL);
    /* Who was told by a lane how a step has ended, and left, ended after that step. */
    if (!list_empty(&worker->closing))
        (void)node_poll(worker->node);
    session_end_closed(worker);
    if (worker->state == WORKER_STOPPING && all_gone(worker))
        uv_stop(&worker->loop);
}

/* Returns how many sessions the sweep has to look at again. */
static int sweep_sessions(struct worker *worker, uint64_t now_ns)
{
    int n_waiting = 0;
    const uint64_t limit_ns = clock_ms_to_ns(worker->config.hello_ms);
    list_each(node, after, &worker->sessions)
    {
        struct session *session = list_owner(node, struct session, in_worker);
        n_waiting += session_retry(session);
        if (session->state != SESSION_OPENING)
            continue;
        n_waiting++;
        if (now_ns - session->opened_ns > limit_ns)
            session_close(session, CLOSE_HELLO_TIMEOUT, NULL);
    }
    return n_waiting;
}

static void on_sweep(uv_timer_t *timer)
{
    struct worker *worker = timer->data;
    const uint64_t now_ns = clock_ns();
    const int n_waiting = sweep_sessions(worker, now_ns);
    if (worker->state == WORKER_DRAINING && (all_idle(worker) || now_ns > worker->drain_deadline_ns))
        worker_stop(worker, CLOSE_DRAINING, WORKER_EXIT_DONE);
    else if (worker->state == WORKER_STOPPING && now_ns > worker->stop_deadline_ns)
        uv_stop(&worker->loop);
    else if (worker->state == WORKER_SERVING && !n_waiting)
        (void)uv_timer_stop(timer);
}

void worker_watch(struct worker *worker)
{
    if (!uv_is_active((uv_handle_t *)&worker->sweep))
        (void)uv_timer_start(&worker->sweep, on_sweep, WORKER_SWEEP_MS, WORKER_SWEEP_MS);
}

/* Called by a lane thread. */
static void notify_loop(void *arg)
{
    (void)uv_async_send(arg); /* fails only on a closing handle, when nobody needs it */
}

static void on_jobs(uv_async_t *async)
{
    struct worker *worker = async->data;
    (void)node_poll(worker->node);
    dump_poll(worker);
    if (!list_empty(&worker->blocked))
        gather_retry(worker);
    if (worker->fabric)
        group_span_retry(worker->fabric);
}

static void on_term(uv_signal_t *handle, int number)
{
    (void)number;
    struct worker *worker = handle->data;
    if (worker->state == WORKER_SERVING)
        worker_drain(worker);
    else
        worker_stop(worker, CLOSE_DRAINING, WORKER_EXIT_DONE);
}

static void reload(struct worker *worker, const struct config *fresh)
{
    uint32_t n_ignored = 0;
    const uint32_t n_changed = config_reload(&worker->config, fresh, &n_ignored);
    worker->log->level = (enum log_level)worker->config.log_level;
    log_write(worker->log, LOG_INFO, "config reloaded keys_changed %u keys_that_need_a_restart %u", n_changed,
              n_ignored);
}

/* The loop comes round: that is what was asked. */
static void answer_question(struct worker *worker)
{
    struct epd_error ignored = {0};                              /* it does not read now: it will ask again */
    (void)!failpoint_hit(&worker->failpoints, "loop", &ignored); /* may sleep */
    (void)!channel_send_answer(worker->start.channel_fd, &ignored);
}

static void on_channel(uv_poll_t *poll, int status, int events)
{
    (void)status;
    (void)events;
    struct worker *worker = poll->data;
    struct config fresh;
    struct epd_error error = {0};
    switch (channel_receive(worker->start.channel_fd, &fresh, &error)) {
    case CHANNEL_CONFIG:
        reload(worker, &fresh);
        break;
    case CHANNEL_QUESTION:
        answer_question(worker);
        break;
    case CHANNEL_ENDED:
        log_write(worker->log, LOG_ERROR, "worker ends: %s", error.text);
        _exit(
            WORKER_EXIT_FATAL); /* the kernel is about to kill us too, and nobody would start another: nothing to tell */
    default:
        break;
    }
}

/* ---- start ---- */

static void raise_fd_limit(struct worker *worker)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return;
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0)
        log_write(worker->log, LOG_WARN, "fd limit not raised: %s", strerror(errno));
}

static enum epd_status take_config(struct worker *worker, struct epd_error *error)
{
    if (channel_receive(worker->start.channel_fd, &worker->config, error) != CHANNEL_CONFIG)
        return error->status ? error->status
                             : error_set(error, EPD_PROTOCOL, "channel: no configuration came");
    worker->log->level = (enum log_level)worker->config.log_level;
    return config_finish(&worker->config, error);
}

static enum epd_status resolve_backend(const struct worker *worker, enum epd_backend_kind *backend,
                                       struct epd_error *error)
{
    const struct config *config = &worker->config;
    struct epd_error reason = {0};
    *backend = config->backend == CONFIG_BACKEND_HOST ? EPD_BACKEND_HOST : EPD_BACKEND_CUDA;
    if (config->backend == CONFIG_BACKEND_AUTO && !node_backend_available(EPD_BACKEND_CUDA, &reason)) {
        if (reason.status == EPD_CUDA) /* it may be there in a moment: another start, not another backend */
            return error_set(error, EPD_CUDA, "backend auto: %.200s", reason.text);
        log_write(worker->log, LOG_INFO, "backend host because cuda cannot run here: %s", reason.text);
        *backend = EPD_BACKEND_HOST;
    }
    if (node_backend_available(*backend, &reason))
        return EPD_OK;
    return error_set(error, reason.status == EPD_CUDA ? EPD_CUDA : EPD_UNSUPPORTED,
                     "backend %s cannot run here: %.180s", backend_name(*backend), reason.text);
}

static void on_device_timer(uv_timer_t *timer)
{
    struct worker *worker = timer->data;
    device_watch_limits(worker->device_watch, clock_ms_to_ns(worker->config.warn_ms),
                        clock_ms_to_ns(worker->config.loop_deadline_ms));
    device_watch_look(worker->device_watch);
}

static void on_device_lost(void *arg, const struct epd_error *error)
{
    worker_fail(arg, error);
}

static void on_device_slow(void *arg, uint32_t device_idx, uint64_t waited_ns, const char *doing)
{
    struct worker *worker = arg;
    log_write(worker->log, LOG_WARN, "device %u does not answer waited_ms %" PRIu64 " its lane stands at %s",
              device_idx, (uint64_t)(waited_ns / CLOCK_NS_PER_MS), doing);
}

/* An idle daemon on the host backend sleeps. */
static enum epd_status watch_devices(struct worker *worker, struct epd_error *error)
{
    if (node_backend(worker->node) == EPD_BACKEND_HOST)
        return EPD_OK;
    const struct device_watch_rules rules = {.slow = on_device_slow, .lost = on_device_lost, .arg = worker};
    enum epd_status status = device_watch_create(worker->node, &rules, &worker->device_watch, error);
    if (status == EPD_OK)
        (void)uv_timer_start(&worker->device_timer, on_device_timer, WORKER_DEVICE_LOOK_MS,
                             WORKER_DEVICE_LOOK_MS);
    return status;
}

static enum epd_status open_node(struct worker *worker, enum epd_backend_kind backend,
                                 struct epd_error *error)
{
    const struct config *config = &worker->config;
    struct node_config node = {
        .backend = backend,
        .heap_limit_bytes = config->heap_per_device,
        .gemm_engine = config->gemm_engine[0] ? config->gemm_engine : NULL,
        .comm_blocks = (uint32_t)config->comm_blocks,
        .graphs = config->graphs != 0,
        .notify = notify_loop,
        .notify_arg = &worker->notify,
    };
    if (node.backend == EPD_BACKEND_HOST)
        node.n_devices = config_host_devices(config);
    else
        node.devices = config->devices[0] ? config->devices : NULL;
    return node_open(&node, &worker->node, error);
}

/* libuv calls that fail only when it is misused or the kernel has no fds for the loop itself. */
static void must(int result, const char *what)
{
    if (result == 0)
        return;
    fprintf(stderr, "epd worker: %s: %s\n", what, uv_strerror(result));
    abort();
}

static void init_handles(struct worker *worker)
{
    must(uv_async_init(&worker->loop, &worker->notify, on_jobs), "async");
    must(uv_signal_init(&worker->loop, &worker->sigterm), "signal");
    must(uv_timer_init(&worker->loop, &worker->sweep), "timer");
    must(uv_timer_init(&worker->loop, &worker->device_timer), "timer");
    must(uv_prepare_init(&worker->loop, &worker->before_sleep), "prepare");
    must(uv_poll_init(&worker->loop, &worker->channel, worker->start.channel_fd), "channel");
    worker->notify.data = worker->sigterm.data = worker->sweep.data = worker->device_timer.data = worker;
    worker->before_sleep.data = worker->channel.data = worker;
    must(uv_signal_start(&worker->sigterm, on_term, SIGTERM), "signal");
    must(uv_prepare_start(&worker->before_sleep, on_before_sleep), "prepare");
    must(uv_poll_start(&worker->channel, UV_READABLE, on_channel), "channel");
}

static enum epd_status init_parts(struct worker *worker, struct epd_error *error)
{
    worker->started_ns = clock_ns();
    worker->epoch = worker->start.generation * REGISTRY_IDS_PER_WORKER + 1;
    registry_init(&worker->registry, worker->start.generation);
    quota_init(&worker->accounts);
    list_init(&worker->sessions);
    list_init(&worker->closing);
    list_init(&worker->groups);
    list_init(&worker->blocked);
    dump_init(&worker->dumps);
    list_init(&worker->idle_flights);
    raise_fd_limit(worker);
    if (getrandom(worker->boot_id, sizeof(worker->boot_id), 0) != (ssize_t)sizeof(worker->boot_id))
        return error_set(error, EPD_SYSTEM, "boot id: %s", strerror(errno));
    enum epd_status status = failpoint_parse(&worker->failpoints, getenv("EPD_FAILPOINTS"), error);
    if (status == EPD_OK)
        status = arena_init(&worker->arena, EPD_MAX_ARENA_BYTES);
    if (status != EPD_OK && !error->status)
        return error_set(error, status, "no address space for the decode arena");
    if (status == EPD_OK)
        status = recorder_open(&worker->recorder, worker->start.recorder_fd, error);
    if (status != EPD_OK)
        return status;
    recorder_clear(&worker->recorder);
    return failpoint_hit(&worker->failpoints, "worker_start", error);
}

static enum epd_status start(struct worker *worker, struct epd_error *error)
{
    enum epd_backend_kind backend = EPD_BACKEND_HOST;
    enum epd_status status = take_config(worker, error);
    if (status == EPD_OK)
        status = init_parts(worker, error);
    if (status != EPD_OK)
        return status;
    must(uv_loop_init(&worker->loop), "loop");
    init_handles(worker);
    status = resolve_backend(worker, &backend, error);
    if (status == EPD_OK)
        status = fabric_create(worker, backend, &worker->fabric, error); /* before any thread runs */
    if (status == EPD_OK)
        status = failpoint_hit(&worker->failpoints, "worker_open", error);
    if (status == EPD_OK)
        status = open_node(worker, backend, error);
    if (status == EPD_OK)
        status = watch_devices(worker, error);
    if (status == EPD_OK && worker->fabric)
        status = fabric_start(worker->fabric, error);
    return status;
}

/* ---- end ---- */

static void close_handle(uv_handle_t *handle, void *arg)
{
    (void)arg;
    if (!uv_is_closing(handle))
        uv_close(handle, NULL);
}

static void finish(struct worker *worker)
{
    node_close(worker->node);
    uv_walk(&worker->loop, close_handle, NULL);
    (void)uv_run(&worker->loop, UV_RUN_DEFAULT);
    must(uv_loop_close(&worker->loop), "loop close");
    device_watch_destroy(worker->device_watch);
    fabric_destroy(worker->fabric);
    flight_fini(worker);
    registry_fini(&worker->registry);
    arena_fini(&worker->arena);
    recorder_close(&worker->recorder);
    (void)close(worker->start.channel_fd);
    (void)close(worker->start.recorder_fd);
    free(worker);
}

static void tell_ready(struct worker *worker)
{
    struct epd_error error = {0};
    if (channel_send_ready(worker->start.channel_fd, &error) != EPD_OK)
        worker_fail(worker, &error);
}

void worker_fabric_complete(struct worker *worker)
{
    tell_ready(worker);
}

static void listen_to_all(struct worker *worker)
{
    struct epd_error error = {0};
    listener_start(&worker->rank_listener, worker, SESSION_RANK, worker->start.rank_fd);
    listener_start(&worker->control_listener, worker, SESSION_CONTROL, worker->start.control_fd);
    if (channel_send_listening(worker->start.channel_fd, &error) != EPD_OK)
        worker_fail(worker, &error);
}

static int serve(struct worker *worker)
{
    listen_to_all(worker);
    if (!worker->fabric)
        tell_ready(worker);
    log_write(worker->log, LOG_INFO, "worker ready backend %s devices %u generation %" PRIu64,
              backend_name(node_backend(worker->node)), node_n_devices(worker->node),
              worker->start.generation);
    (void)uv_run(&worker->loop, UV_RUN_DEFAULT);
    const int code = (int)worker->exit_code;
    /* With a lost device or stuck lanes an orderly end may never come; the process's end frees everything
     * too. */
    const int orderly = code != WORKER_EXIT_FATAL && all_gone(worker);
    if (!dump_settle(worker, WORKER_DUMP_MS) || !orderly) {
        log_write(worker->log, LOG_WARN, "worker ends at once code %d sessions %zu dumps_unwritten %u", code,
                  registry_count(&worker->registry, REGISTRY_SESSION), worker->dumps.n_running);
        _exit(code);
    }
    log_write(worker->log, LOG_INFO, "worker ends code %d", code);
    struct epd_error ignored = {0};
    (void)!channel_send_ending(worker->start.channel_fd, &ignored);
    finish(worker);
    return code;
}

int worker_run(const struct worker_start *given, struct log *log)
{
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    (void)signal(SIGPIPE, SIG_IGN);
    (void)signal(SIGINT, SIG_IGN); /* a terminal's Ctrl-C is the supervisor's business */
    (void)signal(SIGHUP, SIG_IGN);
    struct worker *worker = calloc(1, sizeof(*worker));
    if (!worker) {
        log_write(log, LOG_ERROR, "worker cannot start: no memory");
        return WORKER_EXIT_FATAL;
    }
    worker->log = log;
    worker->start = *given;
    struct epd_error error = {0};
    enum epd_status status = start(worker, &error);
    if (status == EPD_OK)
        return serve(worker);
    log_write(log, LOG_ERROR, "worker cannot start: %s", error.text);
    _exit(status == EPD_INVALID_ARGUMENT || status == EPD_UNSUPPORTED ? WORKER_EXIT_CONFIG
                                                                      : WORKER_EXIT_FATAL);
}
