/* What differs between backends on the client's side: how memory is mapped, and how a launch is handed over
 * in the order of the client's own work. One table per backend, every function mandatory; what a backend
 * cannot do returns EPD_UNSUPPORTED with a sentence. Stateless; the plan and the buffer carry the state. */
#ifndef EPD_CLIENT_STREAM_H
#define EPD_CLIENT_STREAM_H

#include "proto/message.h"

struct epd_copy;
struct epd_memory_range;
struct epd_plan;

struct stream_ops {
    /* Maps a buffer of the symmetric heap from the fd that the daemon sent, which stays the caller's. */
    enum epd_status (*map)(int fd, uint64_t bytes, void **data, struct epd_error *error);
    void (*unmap)(void *data, uint64_t bytes);
    /* Puts the memory of fd in the place of a mapping of a daemon that is gone: same address, and what it
     * held copied. */
    enum epd_status (*remap)(int fd, uint64_t bytes, void *data, struct epd_error *error);

    /* Makes a memory range of the client a handle: fills kind, offset, ipc_handle and device_uuid, and *fd
     * (-1 or the caller's to close after sending). */
    enum epd_status (*describe)(void *data, uint64_t bytes, struct message_buffer_register *request, int *fd,
                                struct epd_error *error);

    /* The allocation that an address lies in; size is the caller's. */
    enum epd_status (*range)(const void *data, struct epd_memory_range *range, struct epd_error *error);

    /* Makes the plan's flags (plan->flags) usable in the client's streams, and ends that. */
    enum epd_status (*bind)(struct epd_plan *plan, struct epd_error *error);
    void (*unbind)(struct epd_plan *plan);
    /* Launches that the daemon has not ended, as the page counts them. */
    uint64_t (*outstanding)(struct epd_plan *plan);
    int launches_overlap; /* a plan may be launched again before its last launch was waited for */

    /* Before the launch message: marks the plan in flight. EPD_BUSY if the plan can take no further launch, EPD_CUDA or
     * EPD_INVALID_ARGUMENT if the stream can take none. */
    enum epd_status (*begin)(struct epd_plan *plan, void *stream, struct epd_error *error);
    /* The message could not be sent: takes begin back. */
    void (*cancel)(struct epd_plan *plan, void *stream);
    /* After the message: sets ready in the order of the stream, where that is not done yet, and makes it wait for done. */
    enum epd_status (*commit)(struct epd_plan *plan, void *stream, struct epd_error *error);
    /* Waits on the host until the plan's launches have ended or were released. */
    enum epd_status (*wait)(struct epd_plan *plan, uint64_t deadline_ns, struct epd_error *error);
    /* The connection is lost: ends the waits on the plan's done flag, on the host and, one at each call, in streams.
     * Returns how many launches are left: to be called again for these when streams have gone on, and for every plan in
     * turn, as a stream may come to another plan's wait first. Watcher thread. */
    uint64_t (*release)(struct epd_plan *plan);
    /* Records a launch's flag operations into the graph that the stream is capturing. */
    enum epd_status (*capture)(struct epd_plan *plan, void *stream, struct epd_error *error);
    /* In the order of the stream, but in none among themselves. Of a plan that is bound. */
    enum epd_status (*copy)(const struct epd_plan *plan, const struct epd_copy *copies, uint32_t n_copies,
                            void *stream, struct epd_error *error);
    /* Before the message that announces n_launches replays. */
    enum epd_status (*arm)(struct epd_plan *plan, uint32_t n_launches, struct epd_error *error);
};

/* The table for the daemon's backend; EPD_UNSUPPORTED if this library was built without it. */
EPD_MUST_CHECK enum epd_status stream_ops_for(enum epd_backend_kind kind, const struct stream_ops **ops,
                                              struct epd_error *error);

extern const struct stream_ops stream_host;
#ifdef EPD_HAVE_CUDA
extern const struct stream_ops stream_cuda;
#endif

#endif
