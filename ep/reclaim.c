#include "ep/reclaim.h"

#include "ep/quiet.h"

/* Lane thread. */
static void give_back(void *arg, struct lane *lane)
{
    (void)arg;
    lane_give_back(lane);
}

static void on_given_back(void *arg)
{
    ((struct node *)arg)->gives_back = 0;
}

static int is_wanted(const struct node *node)
{
    for (uint32_t i = 0; i < node->n_devices; i++)
        if (lane_wants_quiet(node->lanes[i]))
            return 1;
    return 0;
}

void reclaim_look(struct node *node)
{
    struct epd_error ignored = {.status = EPD_OK};
    struct quiet *quiet;
    if (node->gives_back || !is_wanted(node))
        return;
    if (quiet_create(node, give_back, on_given_back, node, &quiet, &ignored))
        return; /* no memory: the next look asks again */
    node->gives_back = 1;
    quiet_post(quiet);
}
