/* The one table of results: id, stable wire number, text. Part of the ground floor: no dependencies, any thread.
 * Numbers travel in replies and status rings and are never reused. client/epd.h repeats the ids for users;
 * tests/unit/test_public_words.c holds the two together. */
#ifndef EPD_PROTO_STATUS_H
#define EPD_PROTO_STATUS_H

#include <stdint.h>

#define EPD_STATUS_TABLE(X)                                                                                  \
    X(EPD_OK, 0, "ok")                                                                                       \
    X(EPD_INVALID_ARGUMENT, 1, "invalid argument")                                                           \
    X(EPD_INVALID_SHAPE, 2, "wrong shape")                                                                   \
    X(EPD_INVALID_DTYPE, 3, "wrong dtype")                                                                   \
    X(EPD_INVALID_DEVICE, 4, "wrong device")                                                                 \
    X(EPD_INVALID_ALIGNMENT, 5, "wrong alignment")                                                           \
    X(EPD_OUT_OF_RANGE, 6, "range outside its allocation")                                                   \
    X(EPD_UNKNOWN_ID, 7, "unknown id")                                                                       \
    X(EPD_FOREIGN_ID, 8, "id belongs to another session")                                                    \
    X(EPD_STALE_EPOCH, 9, "id is of an older epoch")                                                         \
    X(EPD_IN_USE, 10, "still in use")                                                                        \
    X(EPD_BUSY, 11, "already in flight")                                                                     \
    X(EPD_QUOTA, 12, "quota exceeded")                                                                       \
    X(EPD_NO_MEMORY, 13, "out of memory")                                                                    \
    X(EPD_UNSUPPORTED, 14, "not supported here")                                                             \
    X(EPD_GROUP_MISMATCH, 15, "ranks disagree about the group")                                              \
    X(EPD_PLAN_MISMATCH, 16, "ranks disagree about the plan")                                                \
    X(EPD_SEQ_MISMATCH, 17, "ranks disagree about the step")                                                 \
    X(EPD_TIMEOUT, 18, "deadline passed")                                                                    \
    X(EPD_PEER_LOST, 19, "a rank of the group is gone")                                                      \
    X(EPD_EVICTED, 20, "session was evicted")                                                                \
    X(EPD_RESTARTED, 21, "the daemon was restarted")                                                         \
    X(EPD_DRAINING, 22, "the daemon is draining")                                                            \
    X(EPD_DISCONNECTED, 23, "connection to the daemon lost")                                                 \
    X(EPD_PROTOCOL, 24, "protocol violation")                                                                \
    X(EPD_VERSION_MISMATCH, 25, "protocol versions do not meet")                                             \
    X(EPD_PERMISSION, 26, "not permitted")                                                                   \
    X(EPD_CAPACITY_OVERFLOW, 27, "more rows routed to a rank than its capacity")                             \
    X(EPD_BAD_ROUTING, 28, "expert index out of range or repeated in a token")                               \
    X(EPD_BAD_SPLITS, 29, "m_splits negative or larger than the rows given")                                 \
    X(EPD_SYSTEM, 30, "operating system call failed")                                                        \
    X(EPD_CUDA, 31, "CUDA call failed")                                                                      \
    X(EPD_NCCL, 32, "NCCL call failed")                                                                      \
    X(EPD_INTERNAL, 33, "internal invariant broken")

enum epd_status {
#define EPD_STATUS_ENUM(id, number, text) id = number,
    EPD_STATUS_TABLE(EPD_STATUS_ENUM)
#undef EPD_STATUS_ENUM
};

#define EPD_MUST_CHECK __attribute__((warn_unused_result))

/* Longest error text, terminating zero included. */
#define EPD_ERROR_TEXT_BYTES 256

/* An error as it is first decided: status plus a sentence that names what was given and what is allowed.
 * Filled by the caller of a fallible function on its own stack and passed down; never NULL inside the daemon. */
struct epd_error {
    enum epd_status status;
    char text[EPD_ERROR_TEXT_BYTES];
};

/* "EPD_TIMEOUT"; "EPD_?" for a number that is not in the table. Static storage. */
const char *status_name(enum epd_status status);
/* "deadline passed". Static storage. */
const char *status_text(enum epd_status status);
/* 1 if the wire number is in the table. */
int status_known(uint32_t number);
/* Writes the formatted text (cut at EPD_ERROR_TEXT_BYTES, then it ends in "..."; control characters made blanks) and the status into *error and returns the status, so that
 * a check reads `return error_set(error, EPD_INVALID_SHAPE, "grouped_gemm out: rows %lld, want %lld", ...)`. */
enum epd_status error_set(struct epd_error *error, enum epd_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
