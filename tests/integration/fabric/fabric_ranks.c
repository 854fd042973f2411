#include "tests/integration/fabric/fabric_ranks.h"

#include <check.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>

#include "client/epdctl/field.h"
#include "client/epdctl/link.h"
#include "tests/reference/op_cases.h"

const char *const fabric_quick[] = {"--node-dead", FABRIC_NODE_DEAD, "--join", "3s", "--plan", "3s", NULL};

long fabric_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

void fabric_sleep_ms(long ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

struct epd_plan *fabric_forward_plan(struct layer *layer, struct layer_tensor *f)
{
    static const enum epd_role roles[] = {EPD_ROLE_X,  EPD_ROLE_TOPK_IDX, EPD_ROLE_TOPK_WEIGHTS,
                                          EPD_ROLE_W1, EPD_ROLE_B1,       EPD_ROLE_W2,
                                          EPD_ROLE_B2};
    for (int i = FORWARD_X; i <= FORWARD_B2; i++)
        f[i] = layer_input(layer, roles[i]);
    f[FORWARD_OUT] = layer_output(layer, EPD_ROLE_OUT);
    f[FORWARD_SPLITS] = layer_output(layer, EPD_ROLE_M_SPLITS);
    const struct epd_plan_options options = {.op = EPD_OP_MOE_FORWARD};
    return layer_plan(layer, options, f, FORWARD_COUNT);
}

struct epd_plan *fabric_barrier_plan(struct layer *layer)
{
    struct epd_plan *plan = NULL;
    const struct epd_plan_options options = {.size = sizeof(options), .op = EPD_OP_BARRIER};
    RANK_CHECK(epd_plan_create(layer->group, &options, &plan) == EPD_OK);
    return plan;
}

void fabric_healthy_rank(const struct rank *rank)
{
    struct layer layer;
    struct layer_tensor f[FORWARD_COUNT];
    layer_open(&layer, rank, rank->arg ? rank->arg : op_case_named(FABRIC_CASE));
    struct epd_plan *plan = fabric_forward_plan(&layer, f);
    for (int i = 0; i < 20; i++)
        RANK_CHECK(layer_step(plan) == EPD_OK);
    epd_plan_destroy(plan);
    layer_close(&layer);
}

/* A lane tells its rank of a lost node before the daemon's loop hears of it. It leaves at once: the others are to hear of the
 * node all the same. */
void fabric_until_lost_rank(const struct rank *rank)
{
    struct layer layer;
    struct layer_tensor f[FORWARD_COUNT];
    layer_open(&layer, rank, op_case_named(FABRIC_CASE));
    struct epd_plan *plan = fabric_forward_plan(&layer, f);
    enum epd_status status = EPD_OK;
    long began_ms = 0;
    while (status == EPD_OK) {
        began_ms = fabric_now_ms();
        status = layer_step(plan);
    }
    RANK_CHECK(fabric_now_ms() - began_ms < FABRIC_TOLD_WITHIN_MS);
    RANK_CHECK(status == EPD_PEER_LOST);
    RANK_CHECK(strstr(epd_error_text(), rank->arg) != NULL);
    layer_close(&layer);
}

void fabric_ranks_end(const struct fabric_process *fabric, struct rank_team *team, unsigned n_kept)
{
    unsigned n_failed = 0;
    for (unsigned r = 0; r < n_kept; r++) {
        int status = 0;
        ck_assert_int_eq(waitpid(team->pids[r], &status, 0), team->pids[r]);
        n_failed += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
    }
    for (unsigned r = n_kept; r < team->world_size; r++) {
        kill(team->pids[r], SIGKILL);
        waitpid(team->pids[r], NULL, 0);
    }
    if (n_failed)
        fabric_print_logs(fabric);
    ck_assert_uint_eq(n_failed, 0);
}

unsigned fabric_world_size(void)
{
    return op_case_named(FABRIC_CASE)->world_size;
}

void fabric_ahead_rank(const struct rank *rank)
{
    struct layer layer;
    struct layer_tensor f[FORWARD_COUNT];
    layer_open(&layer, rank, op_case_named(FABRIC_CASE));
    struct epd_plan *plans[40];
    plans[0] = fabric_forward_plan(&layer, f);
    for (int i = 1; i < 40; i++)
        plans[i] = fabric_barrier_plan(&layer);
    for (int round = 0; round < 20; round++) {
        for (int i = 0; i < 40; i++)
            RANK_CHECK(epd_plan_launch(plans[i], NULL) == EPD_OK);
        for (int i = 0; i < 40; i++)
            RANK_CHECK(epd_plan_wait(plans[i], 0) == EPD_OK);
    }
    layer_close(&layer);
}

json_t *fabric_ask_document(const struct fabric_process *fabric, unsigned node, enum control_verb verb)
{
    struct link link;
    struct epd_error error = {0};
    json_t *document = NULL;
    ck_assert_msg(link_open(&link, fabric->nodes[node].control_path, 5000, &error) == EPD_OK &&
                      link_request(&link, &(struct message_control){.verb = verb}, &document, &error) ==
                          EPD_OK,
                  "%s", error.text);
    link_close(&link);
    return document;
}

void fabric_await_group(const struct fabric_process *fabric, unsigned node, const char *group,
                        const char *state)
{
    const int runs = strcmp(state, "open") == 0;
    for (const long began_ms = fabric_now_ms();; fabric_sleep_ms(5)) {
        json_t *one, *document = fabric_ask_document(fabric, node, CONTROL_FABRIC);
        size_t idx;
        int there = 0;
        json_array_foreach (field_array(document, "groups"), idx, one)
            there |= strcmp(field_text(one, "name", ""), group) == 0 &&
                     strcmp(field_text(one, "state", ""), state) == 0 &&
                     (!runs || field_number(one, "steps") >= 5);
        json_decref(document);
        if (there)
            return;
        if (fabric_now_ms() - began_ms > 30000) {
            fabric_print_logs(fabric);
            ck_abort_msg("group %s on node %u is not %s", group, node, state);
        }
    }
}
