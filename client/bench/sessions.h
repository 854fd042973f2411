/* What an idle session costs the daemon: memory by opening many, processor time by waiting with them open. */
#ifndef EPD_BENCH_SESSIONS_H
#define EPD_BENCH_SESSIONS_H

#include <epd.h>

struct sessions_result {
    uint32_t n_sessions;
    double anon_bytes_per_session;   /* resident, of the worker */
    double shared_bytes_per_session; /* session page, whole, touched or not */
    double fds_per_session;
    double idle_empty_share; /* processor time per time, worker and supervisor, without sessions */
    double idle_full_share;  /* with all of them open */
};

/* Opens n_sessions in this process. Errors have been printed. */
enum epd_status sessions_run(const char *socket_path, uint32_t n_sessions, struct sessions_result *result);

#endif
