/* What one session, and all sessions of one uid, may hold. Taken before a thing is made, given back when it
 * is gone. Loop thread. */
#ifndef EPD_DAEMON_QUOTA_H
#define EPD_DAEMON_QUOTA_H

#include "daemon/config.h"
#include "daemon/list.h"
#include "proto/limits.h"
#include "proto/status.h"

#define QUOTA_TABLE(X)                                                                                       \
    X(QUOTA_SESSIONS, "sessions")                                                                            \
    X(QUOTA_GROUPS, "groups")                                                                                \
    X(QUOTA_BUFFERS, "buffers")                                                                              \
    X(QUOTA_PLANS, "plans")                                                                                  \
    X(QUOTA_HEAP_BYTES, "heap_bytes")                                                                        \
    X(QUOTA_IMPORTED_BYTES, "imported_bytes")                                                                \
    X(QUOTA_SAVED_BYTES, "saved_bytes")                                                                      \
    X(QUOTA_QUEUES, "queues")

/* Control sessions open at once; who goes when there is one more, control_place.h says. */
#define QUOTA_MAX_CONTROL 64

enum quota_kind {
#define QUOTA_ENUM(id, name) id,
    QUOTA_TABLE(QUOTA_ENUM)
#undef QUOTA_ENUM
        QUOTA_KIND_COUNT
};

/* All that one uid holds; lives as long as the uid has a session or a group. */
struct account {
    struct list in_accounts;
    uint32_t uid;
    uint64_t used[QUOTA_KIND_COUNT];
    uint32_t queues[EPD_MAX_DEVICES]; /* QUOTA_QUEUES, by device */
};

struct quota {
    struct account *account; /* borrowed: freed with the last that its uid holds; NULL: a control session */
    int control;             /* a control session's place, not given back yet */
    uint64_t used[QUOTA_KIND_COUNT];
    uint32_t queues[EPD_MAX_DEVICES];
};

struct accounts {
    struct list list;
    uint64_t n_sessions, n_control;
    uint64_t n_hits[QUOTA_KIND_COUNT]; /* how often a limit refused something */
};

void quota_init(struct accounts *accounts);
/* A new session of the uid: EPD_QUOTA names the limit (all sessions, or those of the uid). */
EPD_MUST_CHECK enum epd_status quota_open(struct accounts *accounts, const struct config *config,
                                          uint32_t uid, struct quota *quota, struct epd_error *error);
/* A new control session: counted apart, so that ranks cannot lock people out. */
EPD_MUST_CHECK enum epd_status quota_open_control(struct accounts *accounts, struct quota *quota,
                                                  struct epd_error *error);
/* Of either kind, idempotent. Everything taken must have been given back. */
void quota_close(struct accounts *accounts, struct quota *quota);
EPD_MUST_CHECK enum epd_status quota_take(struct accounts *accounts, const struct config *config,
                                          struct quota *quota, enum quota_kind kind, uint64_t amount,
                                          struct epd_error *error);
void quota_give(struct quota *quota, enum quota_kind kind, uint64_t amount);
/* What is there already, and is counted whether or not a limit allows it. */
void quota_count(struct quota *quota, enum quota_kind kind, uint64_t amount);
/* EPD_QUOTA names the limit that what is held exceeds. */
EPD_MUST_CHECK enum epd_status quota_check(struct accounts *accounts, const struct config *config,
                                           const struct quota *quota, enum quota_kind kind,
                                           struct epd_error *error);
/* The session gives it up, the uid holds it still; and then the uid. */
void quota_leave(struct quota *quota, enum quota_kind kind, uint64_t amount);
void quota_give_left(struct account *account, enum quota_kind kind, uint64_t amount);
/* Queues of a device (ep/node.h), of which a GPU has few; limited device by device. A session takes n_own for its rank of a
 * group; n_shared of them are new to the uid: what ranks of one group share counts once there, and until the group is gone.
 * The error names the device, who holds how many, and the key of the limit. */
EPD_MUST_CHECK enum epd_status quota_take_queues(struct accounts *accounts, const struct config *config,
                                                 struct quota *quota, uint32_t device_idx, uint32_t n_own,
                                                 uint32_t n_shared, struct epd_error *error);
void quota_give_queues(struct quota *quota, uint32_t device_idx, uint32_t n_own);
/* The uid's; the account is gone afterwards if that was the last it held. */
void quota_give_shared_queues(struct account *account, uint32_t device_idx, uint32_t n_shared);
/* Of all uids on the device. */
uint64_t quota_device_queues(const struct accounts *accounts, uint32_t device_idx);
/* What the session may still take; UINT64_MAX without a limit. */
uint64_t quota_left(const struct config *config, const struct quota *quota, enum quota_kind kind);
const char *quota_name(enum quota_kind kind);

#endif
