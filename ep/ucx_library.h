/* UCX, opened at run time: a daemon of one node neither needs it nor is touched by what it does to a process when it is
 * linked in (handlers of signals, hooks in memory functions). Loaded once, before any thread runs. */
#ifndef EPD_EP_UCX_LIBRARY_H
#define EPD_EP_UCX_LIBRARY_H

#include <ucp/api/ucp.h>

#include "proto/status.h"

#define UCX_FUNCTIONS(X)                                                                                     \
    X(ucp_config_read)                                                                                       \
    X(ucp_config_modify)                                                                                     \
    X(ucp_config_release)                                                                                    \
    X(ucp_init_version)                                                                                      \
    X(ucp_cleanup)                                                                                           \
    X(ucp_worker_create)                                                                                     \
    X(ucp_worker_destroy)                                                                                    \
    X(ucp_worker_get_address)                                                                                \
    X(ucp_worker_release_address)                                                                            \
    X(ucp_worker_get_efd)                                                                                    \
    X(ucp_worker_arm)                                                                                        \
    X(ucp_worker_progress)                                                                                   \
    X(ucp_ep_create)                                                                                         \
    X(ucp_ep_close_nbx)                                                                                      \
    X(ucp_ep_flush_nbx)                                                                                      \
    X(ucp_tag_send_nbx)                                                                                      \
    X(ucp_tag_recv_nbx)                                                                                      \
    X(ucp_request_check_status)                                                                              \
    X(ucp_request_cancel)                                                                                    \
    X(ucp_request_free)

struct ucx_library {
#define UCX_FIELD(name) __typeof__(&(name)) name;
    UCX_FUNCTIONS(UCX_FIELD)
#undef UCX_FIELD
    const char *(*status_string)(ucs_status_t status);
};

/* NULL before ucx_library_load. */
const struct ucx_library *ucx_library(void);
EPD_MUST_CHECK enum epd_status ucx_library_load(struct epd_error *error);

#endif
