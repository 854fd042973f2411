/* Everything that can be configured, in one struct, described by one table: the table drives the file (INI),
 * the flags of `epd`, --help, the `config` part of `epdctl status` and deploy/epd.conf. Value type; no thread
 * of its own.
 *
 * The supervisor reads file and flags and hands the worker the rendered result, so that a worker can restart
 * even while the file on disk is broken. */
#ifndef EPD_DAEMON_CONFIG_H
#define EPD_DAEMON_CONFIG_H

#include <stddef.h>
#include <stdint.h>

#include "daemon/config_table.h"
#include "proto/status.h"

#define CONFIG_TEXT_BYTES     256
#define CONFIG_RENDERED_BYTES 16384
#define CONFIG_MAX_UIDS       64

enum config_backend {
    CONFIG_BACKEND_AUTO = 0, /* cuda where it can run, else host */
    CONFIG_BACKEND_HOST = 1,
    CONFIG_BACKEND_CUDA = 2,
};

struct config {
    /* [daemon] */
    uint64_t backend; /* enum config_backend */
    char devices[CONFIG_TEXT_BYTES];
    uint64_t log_level; /* enum log_level */
    char dump_directory[CONFIG_TEXT_BYTES];
    /* [sockets] */
    char socket[CONFIG_TEXT_BYTES];
    uint64_t socket_mode;
    char socket_group[CONFIG_TEXT_BYTES];
    char control_socket[CONFIG_TEXT_BYTES];
    uint64_t control_mode;
    char control_group[CONFIG_TEXT_BYTES];
    char allow_uids[CONFIG_TEXT_BYTES];
    /* [limits]; 0 = no limit where the help says so */
    uint64_t sessions;
    uint64_t sessions_per_uid;
    uint64_t groups_per_session;
    uint64_t queues_per_session;
    uint64_t queues_per_uid;
    uint64_t buffers_per_session;
    uint64_t plans_per_session;
    uint64_t launches_per_rank;
    uint64_t heap_per_session;
    uint64_t heap_per_uid;
    uint64_t heap_per_device;
    uint64_t imported_per_session;
    uint64_t saved_per_session;
    uint64_t output_per_session;
    /* [timers] milliseconds */
    uint64_t warn_ms;
    uint64_t stuck_ms;
    uint64_t dead_ms;
    uint64_t join_ms;
    uint64_t plan_ms;
    uint64_t hello_ms;
    uint64_t drain_ms;
    /* [worker] */
    uint64_t start_deadline_ms;
    uint64_t loop_deadline_ms; /* 0: off */
    uint64_t restart_first_ms;
    uint64_t restart_max_ms;
    uint64_t restart_limit;
    uint64_t restart_healthy_ms;
    /* [cuda] */
    char gemm_engine[CONFIG_TEXT_BYTES];
    uint64_t comm_blocks;
    uint64_t graphs;
    /* [fabric] */
    uint64_t nodes;
    char node_rank[CONFIG_TEXT_BYTES];
    char rendezvous[CONFIG_TEXT_BYTES];
    char secret_file[CONFIG_TEXT_BYTES];
    uint64_t node_dead_ms;
    char network[CONFIG_TEXT_BYTES];
    char network_devices[CONFIG_TEXT_BYTES];
    /* Not in the table. */
    char file[CONFIG_TEXT_BYTES]; /* "" if none was read */
};

/* Every key at its default. */
void config_init(struct config *config);
/* Sets one key by its flag name ("socket-mode"); `where` opens the error text ("--socket-mode" or "file:12").
 */
EPD_MUST_CHECK enum epd_status config_set(struct config *config, const struct config_key *key,
                                          const char *value, const char *where, struct epd_error *error);
/* Reads an INI file over *config. Errors name file, line, key, what was given and what is allowed. */
EPD_MUST_CHECK enum epd_status config_read(struct config *config, const char *path, struct epd_error *error);
/* The same from text in memory; `name` stands for the file in errors. */
EPD_MUST_CHECK enum epd_status config_parse(struct config *config, const char *text, const char *name,
                                            struct epd_error *error);
/* Fills in socket paths that depend on the environment and checks what spans several keys. */
EPD_MUST_CHECK enum epd_status config_finish(struct config *config, struct epd_error *error);
/* Writes the whole configuration as INI text; EPD_INTERNAL if it does not fit. */
EPD_MUST_CHECK enum epd_status config_render(const struct config *config, char *text, size_t bytes,
                                             struct epd_error *error);
/* Reads back what config_render wrote, exactly; changes the text. EPD_PROTOCOL: it is not that. */
EPD_MUST_CHECK enum epd_status config_take_rendered(struct config *config, char *text,
                                                    struct epd_error *error);
/* One value as text, as it would stand in the file. */
void config_format(const struct config *config, const struct config_key *key, char *text, size_t bytes);
/* Copies the reloadable keys of `fresh`; returns how many changed. *n_ignored counts changed keys that need a
 * restart. */
uint32_t config_reload(struct config *config, const struct config *fresh, uint32_t *n_ignored);

/* allow_uids: 1 if the uid may open rank sessions. Empty list: everybody whom the socket's mode lets in. */
int config_allows_uid(const struct config *config, uint32_t uid);
/* The number of emulated devices of the host backend. */
uint32_t config_host_devices(const struct config *config);

#endif
