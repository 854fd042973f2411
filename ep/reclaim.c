#include "ep/reclaim.h"

#include "ep/clock.h"

/* If the device has not been idle for so long the lane takes no job, for so long at most: some steps. Each time that it was
 * in vain both double, up to these. So nobody is held up for more than a tenth of the time, and for more than one per cent
 * of it in the end. */
#define RECLAIM_PATIENCE_NS     100000000ull
#define RECLAIM_HOLD_NS         10000000ull
#define RECLAIM_MAX_PATIENCE_NS 10000000000ull
#define RECLAIM_MAX_HOLD_NS     100000000ull

void reclaim_init(struct reclaim *reclaim, const struct backend *backend, struct backend_device *device)
{
    *reclaim = (struct reclaim){.backend = backend, .device = device};
}

static void plan_hold(struct reclaim *reclaim, uint64_t now_ns)
{
    reclaim->hold_from_ns = now_ns + reclaim->patience_ns;
    reclaim->hold_until_ns = reclaim->hold_from_ns + reclaim->hold_ns;
}

static void begin(struct reclaim *reclaim)
{
    reclaim->waits = 1;
    reclaim->patience_ns = RECLAIM_PATIENCE_NS;
    reclaim->hold_ns = RECLAIM_HOLD_NS;
    plan_hold(reclaim, clock_now_ns());
}

static uint64_t doubled(uint64_t value, uint64_t most)
{
    return value < most / 2 ? 2 * value : most;
}

static void be_more_patient(struct reclaim *reclaim, uint64_t now_ns)
{
    reclaim->patience_ns = doubled(reclaim->patience_ns, RECLAIM_MAX_PATIENCE_NS);
    reclaim->hold_ns = doubled(reclaim->hold_ns, RECLAIM_MAX_HOLD_NS);
    plan_hold(reclaim, now_ns);
}

int reclaim_look(struct reclaim *reclaim)
{
    if (!reclaim->backend->device_n_waiting(reclaim->device)) {
        reclaim->waits = 0;
        return 0;
    }
    if (!reclaim->waits)
        begin(reclaim);
    if (reclaim->backend->device_idle(reclaim->device))
        return 1;
    const uint64_t now_ns = clock_now_ns();
    if (now_ns > reclaim->hold_until_ns)
        be_more_patient(reclaim, now_ns);
    return 0;
}

uint64_t reclaim_end(struct reclaim *reclaim)
{
    reclaim->waits = 0;
    return reclaim->backend->device_give_back(reclaim->device);
}

int reclaim_holds(const struct reclaim *reclaim)
{
    return reclaim->waits && clock_now_ns() >= reclaim->hold_from_ns;
}
