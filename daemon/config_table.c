#include "daemon/config_table.h"

#include <stddef.h>

#include "daemon/config.h"
#include "proto/limits.h"
#include "proto/page.h"

#define AT(field) offsetof(struct config, field)

static const char *const backend_words[] = {"auto", "host", "cuda", NULL};
static const char *const level_words[] = {"error", "warn", "info", "debug", NULL};

#define KIB    1024ull
#define MIB    (1024 * KIB)
#define DAY_MS (24ull * 3600 * 1000)

/* section, key, type, offset, default, min, max, words, reloadable, help */
static const struct config_key keys[] = {
    {"daemon", "backend", CONFIG_WORD, AT(backend), "auto", 0, 0, backend_words, 0,
     "auto: cuda where it can run, else host"},
    {"daemon", "devices", CONFIG_TEXT, AT(devices), "", 0, 0, NULL, 0,
     "host: number of emulated devices (empty: 4); cuda: comma list of indices or UUIDs (empty: all)"},
    {"daemon", "log_level", CONFIG_WORD, AT(log_level), "info", 0, 0, level_words, 1,
     "least important line written"},
    {"daemon", "dump_directory", CONFIG_TEXT, AT(dump_directory), "", 0, 0, NULL, 1,
     "where flight recorder dumps go (empty: beside the control socket)"},

    {"sockets", "socket", CONFIG_TEXT, AT(socket), "", 0, 0, NULL, 0,
     "socket of the ranks (empty: $XDG_RUNTIME_DIR/epd/epd.sock or /run/epd/epd.sock)"},
    {"sockets", "socket_mode", CONFIG_MODE, AT(socket_mode), "0660", 0, 0777, NULL, 0, "its file mode"},
    {"sockets", "socket_group", CONFIG_TEXT, AT(socket_group), "", 0, 0, NULL, 0,
     "its group (empty: unchanged)"},
    {"sockets", "control_socket", CONFIG_TEXT, AT(control_socket), "", 0, 0, NULL, 0,
     "socket of people and scrapers (empty: epd-control.sock beside the other)"},
    {"sockets", "control_mode", CONFIG_MODE, AT(control_mode), "0600", 0, 0777, NULL, 0, "its file mode"},
    {"sockets", "control_group", CONFIG_TEXT, AT(control_group), "", 0, 0, NULL, 0,
     "its group (empty: unchanged)"},
    {"sockets", "allow_uids", CONFIG_TEXT, AT(allow_uids), "", 0, 0, NULL, 1,
     "comma list of uids that may be ranks (empty: all whom the mode lets in)"},

    {"limits", "sessions", CONFIG_COUNT, AT(sessions), "4096", 1, 1000000, NULL, 1, "open sessions in all"},
    {"limits", "sessions_per_uid", CONFIG_COUNT, AT(sessions_per_uid), "4096", 1, 1000000, NULL, 1,
     "open sessions of one uid"},
    {"limits", "groups_per_session", CONFIG_COUNT, AT(groups_per_session), "64", 1, 4096, NULL, 1,
     "groups one session is in"},
    {"limits", "queues_per_session", CONFIG_COUNT, AT(queues_per_session), "8", 0, 4096, NULL, 1,
     "queues of one device that groups of one session take: a group one, across nodes on CUDA four; a GPU "
     "has 28 "
     "(0: no limit)"},
    {"limits", "queues_per_uid", CONFIG_COUNT, AT(queues_per_uid), "20", 0, 4096, NULL, 1,
     "queues of one device that groups of one uid take, those that its ranks share counted once (0: no "
     "limit)"},
    {"limits", "buffers_per_session", CONFIG_COUNT, AT(buffers_per_session), "1024", 1, 1000000, NULL, 1,
     "buffers of one session"},
    {"limits", "plans_per_session", CONFIG_COUNT, AT(plans_per_session), "512", 1, EPD_PAGE_MAX_PLANS, NULL,
     1, "plans of one session"},
    {"limits", "launches_per_rank", CONFIG_COUNT, AT(launches_per_rank), "1024", 1, 65536, NULL, 1,
     "launches of one rank that wait for other ranks; beyond it the daemon stops reading from the client"},
    {"limits", "heap_per_session", CONFIG_BYTES, AT(heap_per_session), "0", 0, UINT64_MAX, NULL, 1,
     "bytes of buffers allocated by one session and of what its plans hold on devices (0: no limit)"},
    {"limits", "heap_per_uid", CONFIG_BYTES, AT(heap_per_uid), "0", 0, UINT64_MAX, NULL, 1,
     "bytes of buffers allocated by one uid and of what its plans hold on devices (0: no limit)"},
    {"limits", "heap_per_device", CONFIG_BYTES, AT(heap_per_device), "0", 0, UINT64_MAX, NULL, 0,
     "bytes of all owned memory on one device (0: no limit)"},
    {"limits", "imported_per_session", CONFIG_BYTES, AT(imported_per_session), "0", 0, UINT64_MAX, NULL, 1,
     "bytes of client memory registered by one session (0: no limit)"},
    {"limits", "saved_per_session", CONFIG_BYTES, AT(saved_per_session), "0", 0, UINT64_MAX, NULL, 1,
     "bytes of saved contexts of one session (0: no limit)"},
    {"limits", "output_per_session", CONFIG_BYTES, AT(output_per_session), "256K", 64 * KIB, 64 * MIB, NULL,
     1, "bytes waiting for a client that does not read, before it is closed"},

    {"timers", "warn", CONFIG_DURATION, AT(warn_ms), "5s", 1, DAY_MS, NULL, 1,
     "a step that waits this long for a rank is logged"},
    {"timers", "stuck", CONFIG_DURATION, AT(stuck_ms), "20s", 1, DAY_MS, NULL, 1,
     "a step that waits this long for a rank ends EPD_TIMEOUT (a group may ask for its own)"},
    {"timers", "dead", CONFIG_DURATION, AT(dead_ms), "60s", 1, DAY_MS, NULL, 1,
     "a rank that others have missed this long is evicted"},
    {"timers", "join", CONFIG_DURATION, AT(join_ms), "120s", 1, DAY_MS, NULL, 1,
     "a group that is not complete after this ends EPD_TIMEOUT"},
    {"timers", "plan", CONFIG_DURATION, AT(plan_ms), "60s", 1, DAY_MS, NULL, 1,
     "a collective plan that a rank has not created after this ends EPD_TIMEOUT"},
    {"timers", "hello", CONFIG_DURATION, AT(hello_ms), "5s", 1, DAY_MS, NULL, 1,
     "a connection that has not said Hello after this is closed"},
    {"timers", "drain", CONFIG_DURATION, AT(drain_ms), "30s", 1, DAY_MS, NULL, 1,
     "the longest that a draining daemon waits for launches in flight"},

    {"worker", "start_deadline", CONFIG_DURATION, AT(start_deadline_ms), "120s", 1, DAY_MS, NULL, 1,
     "a worker that does not serve this long after its start is killed and started again"},
    {"worker", "loop_deadline", CONFIG_DURATION, AT(loop_deadline_ms), "30s", 0, DAY_MS, NULL, 1,
     "a worker whose event loop, or thread of a GPU, does not come round for this long is ended and started "
     "again (0s: never)"},
    {"worker", "restart_first", CONFIG_DURATION, AT(restart_first_ms), "100ms", 1, DAY_MS, NULL, 0,
     "wait before the first restart; doubles with each failure"},
    {"worker", "restart_max", CONFIG_DURATION, AT(restart_max_ms), "10s", 1, DAY_MS, NULL, 0, "longest wait"},
    {"worker", "restart_limit", CONFIG_COUNT, AT(restart_limit), "10", 0, 1000000, NULL, 0,
     "failures in a row after which epd gives up (0: never)"},
    {"worker", "restart_healthy", CONFIG_DURATION, AT(restart_healthy_ms), "30s", 1, DAY_MS, NULL, 0,
     "a worker that lived this long ends the row of failures"},

    {"cuda", "gemm_engine", CONFIG_TEXT, AT(gemm_engine), "", 0, 0, NULL, 0,
     "grouped GEMM engine (empty: the best)"},
    {"cuda", "comm_blocks", CONFIG_COUNT, AT(comm_blocks), "0", 0, 1024, NULL, 0,
     "thread blocks for communication (0: the kernels' default)"},
    {"cuda", "graphs", CONFIG_COUNT, AT(graphs), "0", 0, 1, NULL, 0,
     "1: moe_forward and moe_backward plans are replayed as CUDA graphs while their number of tokens stays "
     "the same"},

    {"fabric", "nodes", CONFIG_COUNT, AT(nodes), "0", 0, EPD_MAX_NODES, NULL, 0,
     "nodes whose daemons are joined (0: what the launcher's environment says if there is a secret_file, "
     "else 1)"},
    {"fabric", "node_rank", CONFIG_TEXT, AT(node_rank), "", 0, 0, NULL, 0,
     "number of this node, from 0 (empty: what the launcher's environment says)"},
    {"fabric", "rendezvous", CONFIG_TEXT, AT(rendezvous), "", 0, 0, NULL, 0,
     "host:port or [IPv6]:port at which node 0 listens (empty: MASTER_ADDR or the first Slurm host, port "
     "7741)"},
    {"fabric", "secret_file", CONFIG_TEXT, AT(secret_file), "", 0, 0, NULL, 0,
     "file of 16 random bytes or more, no pass phrase; the same on all nodes and readable by nobody else"},
    {"fabric", "node_dead", CONFIG_DURATION, AT(node_dead_ms), "10s", 100, DAY_MS, NULL, 1,
     "a node that is not heard of for this long is lost; groups that span it end"},
    {"fabric", "network", CONFIG_TEXT, AT(network), "tcp", 0, 0, NULL, 0,
     "network between nodes: host backend: UCX transports; CUDA: tcp or NCCL's name of a network, such as IB "
     "(empty: the library chooses)"},
    {"fabric", "network_devices", CONFIG_TEXT, AT(network_devices), "", 0, 0, NULL, 0,
     "network devices that it may use (empty: all)"},
};

#define N_KEYS (sizeof(keys) / sizeof(keys[0]))

const struct config_key *config_keys(size_t *n_keys)
{
    *n_keys = N_KEYS;
    return keys;
}
