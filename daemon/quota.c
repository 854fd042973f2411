#include "daemon/quota.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

static const char *const names[] = {
#define QUOTA_NAME(id, name) name,
    QUOTA_TABLE(QUOTA_NAME)
#undef QUOTA_NAME
};

const char *quota_name(enum quota_kind kind)
{
    assert(kind < QUOTA_KIND_COUNT);
    return names[kind];
}

void quota_init(struct accounts *accounts)
{
    *accounts = (struct accounts){0};
    list_init(&accounts->list);
}

/* 0 = no limit. */
static uint64_t session_limit(const struct config *config, enum quota_kind kind)
{
    switch (kind) {
    case QUOTA_GROUPS:
        return config->groups_per_session;
    case QUOTA_BUFFERS:
        return config->buffers_per_session;
    case QUOTA_PLANS:
        return config->plans_per_session;
    case QUOTA_HEAP_BYTES:
        return config->heap_per_session;
    case QUOTA_IMPORTED_BYTES:
        return config->imported_per_session;
    case QUOTA_SAVED_BYTES:
        return config->saved_per_session;
    default:
        return 0;
    }
}

static uint64_t uid_limit(const struct config *config, enum quota_kind kind)
{
    if (kind == QUOTA_SESSIONS)
        return config->sessions_per_uid;
    return kind == QUOTA_HEAP_BYTES ? config->heap_per_uid : 0;
}

/* Without a limit a sum still has to be a number: what clients ask for adds up before any of it is made. What is there is
 * counted beside it without being asked for, and is less than the rest of the numbers. */
#define MAX_SUM (UINT64_MAX - (1ull << 60))

static uint64_t bound(uint64_t limit)
{
    return limit && limit < MAX_SUM ? limit : MAX_SUM;
}

static int fits(uint64_t used, uint64_t amount, uint64_t limit)
{
    return used <= bound(limit) && amount <= bound(limit) - used;
}

static struct account *find_account(struct accounts *accounts, uint32_t uid)
{
    list_each(node, after, &accounts->list)
    {
        struct account *account = list_owner(node, struct account, in_accounts);
        if (account->uid == uid)
            return account;
    }
    struct account *account = calloc(1, sizeof(*account));
    if (!account)
        return NULL;
    account->uid = uid;
    list_append(&accounts->list, &account->in_accounts);
    return account;
}

static void drop_if_empty(struct account *account)
{
    if (account->used[QUOTA_SESSIONS] || account->used[QUOTA_QUEUES])
        return;
    list_remove(&account->in_accounts);
    free(account);
}

enum epd_status quota_open(struct accounts *accounts, const struct config *config, uint32_t uid,
                           struct quota *quota, struct epd_error *error)
{
    if (!fits(accounts->n_sessions, 1, config->sessions)) {
        accounts->n_hits[QUOTA_SESSIONS]++;
        return error_set(error, EPD_QUOTA, "sessions: %" PRIu64 " open, at most %" PRIu64,
                         accounts->n_sessions, config->sessions);
    }
    struct account *account = find_account(accounts, uid);
    if (!account)
        return error_set(error, EPD_NO_MEMORY, "session: no memory for its account");
    *quota = (struct quota){.account = account};
    enum epd_status status = quota_take(accounts, config, quota, QUOTA_SESSIONS, 1, error);
    if (status != EPD_OK) {
        drop_if_empty(account);
        return status;
    }
    accounts->n_sessions++;
    return EPD_OK;
}

enum epd_status quota_open_control(struct accounts *accounts, struct quota *quota, struct epd_error *error)
{
    *quota = (struct quota){0};
    if (accounts->n_control >= QUOTA_MAX_CONTROL)
        return error_set(error, EPD_QUOTA, "control sessions: %d open, at most that many", QUOTA_MAX_CONTROL);
    accounts->n_control++;
    quota->control = 1;
    return EPD_OK;
}

void quota_close(struct accounts *accounts, struct quota *quota)
{
    if (quota->control)
        accounts->n_control--;
    quota->control = 0;
    if (!quota->account)
        return;
    quota_give(quota, QUOTA_SESSIONS, 1);
    for (int kind = 0; kind < QUOTA_KIND_COUNT; kind++)
        assert(quota->used[kind] == 0);
    accounts->n_sessions--;
    drop_if_empty(quota->account);
    quota->account = NULL;
}

/* whose: "this session". */
static enum epd_status over_limit(struct epd_error *error, const char *whose, enum quota_kind kind,
                                  uint64_t held, uint64_t amount, uint64_t limit)
{
    if (!amount)
        return error_set(error, EPD_QUOTA, "%s of %s: %" PRIu64 " held, at most %" PRIu64, names[kind], whose,
                         held, bound(limit));
    return error_set(error, EPD_QUOTA,
                     "%s of %s: %" PRIu64 " held, %" PRIu64 " more wanted, at most %" PRIu64, names[kind],
                     whose, held, amount, bound(limit));
}

/* Whether so much more would do. */
static enum epd_status check_room(struct accounts *accounts, const struct config *config,
                                  const struct quota *quota, enum quota_kind kind, uint64_t amount,
                                  struct epd_error *error)
{
    const struct account *account = quota->account;
    assert(kind < QUOTA_KIND_COUNT);
    const uint64_t own = session_limit(config, kind), shared = uid_limit(config, kind);
    if (!fits(quota->used[kind], amount, own)) {
        accounts->n_hits[kind]++;
        return over_limit(error, "this session", kind, quota->used[kind], amount, own);
    }
    if (!fits(account->used[kind], amount, shared)) {
        accounts->n_hits[kind]++;
        char uid[24];
        (void)snprintf(uid, sizeof(uid), "uid %u", account->uid);
        return over_limit(error, uid, kind, account->used[kind], amount, shared);
    }
    return EPD_OK;
}

enum epd_status quota_take(struct accounts *accounts, const struct config *config, struct quota *quota,
                           enum quota_kind kind, uint64_t amount, struct epd_error *error)
{
    if (check_room(accounts, config, quota, kind, amount, error) != EPD_OK)
        return error->status;
    quota_count(quota, kind, amount);
    return EPD_OK;
}

enum epd_status quota_check(struct accounts *accounts, const struct config *config, const struct quota *quota,
                            enum quota_kind kind, struct epd_error *error)
{
    return check_room(accounts, config, quota, kind, 0, error);
}

void quota_count(struct quota *quota, enum quota_kind kind, uint64_t amount)
{
    quota->used[kind] += amount;
    quota->account->used[kind] += amount;
}

void quota_leave(struct quota *quota, enum quota_kind kind, uint64_t amount)
{
    assert(quota->used[kind] >= amount);
    quota->used[kind] -= amount;
}

void quota_give_left(struct account *account, enum quota_kind kind, uint64_t amount)
{
    assert(account->used[kind] >= amount);
    account->used[kind] -= amount;
}

void quota_give(struct quota *quota, enum quota_kind kind, uint64_t amount)
{
    assert(kind < QUOTA_KIND_COUNT);
    assert(quota->used[kind] >= amount && quota->account->used[kind] >= amount);
    quota->used[kind] -= amount;
    quota->account->used[kind] -= amount;
}

/* ---- queues ---- */

enum epd_status quota_take_queues(struct accounts *accounts, const struct config *config, struct quota *quota,
                                  uint32_t device_idx, uint32_t n_own, uint32_t n_shared,
                                  struct epd_error *error)
{
    struct account *account = quota->account;
    assert(device_idx < EPD_MAX_DEVICES && n_shared <= n_own);
    const uint32_t own = quota->queues[device_idx], shared = account->queues[device_idx];
    if (!fits(own, n_own, config->queues_per_session)) {
        accounts->n_hits[QUOTA_QUEUES]++;
        return error_set(
            error, EPD_QUOTA,
            "queues of device %u: groups of this session hold %u, %u more wanted, at most %" PRIu64
            " (queues_per_session)",
            device_idx, own, n_own, config->queues_per_session);
    }
    if (!fits(shared, n_shared, config->queues_per_uid)) {
        accounts->n_hits[QUOTA_QUEUES]++;
        return error_set(error, EPD_QUOTA,
                         "queues of device %u: groups of uid %u hold %u, %u more wanted, at most %" PRIu64
                         " (queues_per_uid)",
                         device_idx, account->uid, shared, n_shared, config->queues_per_uid);
    }
    quota->queues[device_idx] += n_own;
    quota->used[QUOTA_QUEUES] += n_own;
    account->queues[device_idx] += n_shared;
    account->used[QUOTA_QUEUES] += n_shared;
    return EPD_OK;
}

void quota_give_queues(struct quota *quota, uint32_t device_idx, uint32_t n_own)
{
    assert(device_idx < EPD_MAX_DEVICES && quota->queues[device_idx] >= n_own);
    quota->queues[device_idx] -= n_own;
    quota->used[QUOTA_QUEUES] -= n_own;
}

void quota_give_shared_queues(struct account *account, uint32_t device_idx, uint32_t n_shared)
{
    assert(device_idx < EPD_MAX_DEVICES && account->queues[device_idx] >= n_shared);
    account->queues[device_idx] -= n_shared;
    account->used[QUOTA_QUEUES] -= n_shared;
    drop_if_empty(account);
}

uint64_t quota_device_queues(const struct accounts *accounts, uint32_t device_idx)
{
    uint64_t n = 0;
    list_each(node, after, &accounts->list) n +=
        list_owner(node, const struct account, in_accounts)->queues[device_idx];
    return n;
}

uint64_t quota_left(const struct config *config, const struct quota *quota, enum quota_kind kind)
{
    const uint64_t limit = session_limit(config, kind);
    if (!limit)
        return UINT64_MAX;
    return quota->used[kind] < limit ? limit - quota->used[kind] : 0;
}
