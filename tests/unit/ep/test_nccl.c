/* The course of rails over NCCL, without it: how they connect, swap, fail, are aborted and end, each by its deadline, and
 * what is left then. What NCCL and CUDA do themselves is for tests/gpu/fabric. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "ep/clock.h"
#include "ep/cuda_rail.h"
#include "ep/nccl_library.h"
#include "ep/transport.h"
#include "tests/unit/ep/fake_nccl.h"
#include "tests/unit/ep/harness.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define MS           1000000ull
#define N_NODES      2
/* What goes well does so long before. */
#define LIMIT_NS (20000 * MS)
/* A thread of the rail has long done what it was told. */
#define SOON_NS (5000 * MS)

extern const struct transport transport_nccl;
static const struct transport *const nccl = &transport_nccl;

static void sleep_ms(long ms)
{
    const struct timespec time = {.tv_nsec = ms * 1000000};
    (void)nanosleep(&time, NULL);
}

/* What errors call the other node. */
#define OTHER_NUMBER 7

/* One end of a rail. */
struct seat {
    struct transport_rail *rail;
    struct transport_address addresses[N_NODES];
    struct CUstream_st *stream;
    char out[64], in[64];
};

static void seat_open(struct seat *seat, uint32_t node)
{
    struct epd_error error = {.status = EPD_OK};
    memset(seat, 0, sizeof *seat);
    ck_assert_int_eq(nccl->rail_open(NULL, node, &seat->rail, &seat->addresses[node], &error), EPD_OK);
    seat->addresses[1 - node] =
        (struct transport_address){.bytes = node ? NCCL_ID_BYTES : 1, .node = OTHER_NUMBER};
    seat->stream = fake_stream_create();
}

static enum epd_status begin_connect(struct seat *seat, uint32_t node, uint64_t limit_ns,
                                     struct epd_error *error)
{
    error->status = EPD_OK;
    return nccl->rail_connect(seat->rail, N_NODES, node, seat->addresses, limit_ns, error);
}

/* Until it is decided. */
static enum epd_status await_connected(const struct seat *seat, struct epd_error *error)
{
    const uint64_t begun_ns = clock_now_ns();
    while (!nccl->rail_connected(seat->rail, error)) {
        ck_assert_uint_lt(clock_now_ns() - begun_ns, SOON_NS);
        sleep_ms(1);
    }
    return error->status;
}

static void seat_connect(struct seat *seat, uint32_t node)
{
    struct epd_error error;
    seat_open(seat, node);
    ck_assert_int_eq(begin_connect(seat, node, LIMIT_NS, &error), EPD_OK);
    ck_assert_msg(await_connected(seat, &error) == EPD_OK, "%s", error.text);
}

static enum epd_status swap(struct seat *seat, uint32_t node, struct epd_error *error)
{
    struct transport_move moves[N_NODES] = {{0}};
    moves[1 - node] = (struct transport_move){.send = seat->out,
                                              .send_bytes = sizeof seat->out,
                                              .receive = seat->in,
                                              .receive_bytes = sizeof seat->in};
    error->status = EPD_OK;
    return nccl->rail_swap_on(seat->rail, moves, 1, seat->stream, error);
}

static enum epd_status look(const struct seat *seat, struct epd_error *error)
{
    error->status = EPD_OK;
    return nccl->rail_check(seat->rail, error);
}

/* Whether the thread of the rail has done its part. */
static int leaves_soon(const struct seat *seat)
{
    const uint64_t begun_ns = clock_now_ns();
    while (!nccl->rail_closed(seat->rail) && clock_now_ns() - begun_ns < SOON_NS)
        sleep_ms(1);
    return nccl->rail_closed(seat->rail);
}

/* What the rails do on a lane when a group goes. */
static void seat_close(struct seat *seat)
{
    nccl->rail_close(seat->rail);
    ck_assert(leaves_soon(seat));
    nccl->rails_end(&seat->rail, 1);
    fake_stream_destroy(seat->stream);
}

START_TEST(a_rail_that_connects_swaps_and_closes_leaves_nothing)
{
    struct seat seat;
    struct epd_error error;
    fake_nccl_reset();
    for (uint32_t node = 0; node < N_NODES; node++) {
        const uint64_t sent = fake_nccl.sent_bytes;
        seat_connect(&seat, node);
        ck_assert_int_eq(fake_nccl.n_connecting, 0);
        const uint64_t first = fake_nccl.sent_bytes;
        ck_assert_uint_gt(first, sent);
        for (int i = 0; i < 3; i++)
            ck_assert_int_eq(swap(&seat, node, &error), EPD_OK);
        ck_assert_uint_eq(fake_nccl.sent_bytes - first, 3 * sizeof seat.out);
        ck_assert_uint_eq(fake_nccl.received_bytes, fake_nccl.sent_bytes);
        ck_assert_int_eq(look(&seat, &error), EPD_OK);
        ck_assert_int_gt(fake_nccl.n_channels, 0);
        seat_close(&seat);
        ck_assert_int_eq(fake_nccl.n_destroys, (int)node + 1);
        ck_assert_int_eq(fake_nccl.n_aborts, 0);
        fake_nccl_expect_clean(0);
    }
}
END_TEST

START_TEST(a_swap_takes_its_parts_at_once_and_may_have_none)
{
    struct seat seat;
    struct epd_error error = {.status = EPD_OK};
    fake_nccl_reset();
    for (uint32_t node = 0; node < N_NODES; node++) {
        struct transport_move parts[3 * N_NODES] = {{0}};
        const uint32_t there = 1 - node;
        seat_connect(&seat, node);
        parts[there] = (struct transport_move){.send = seat.out, .send_bytes = 16};
        parts[N_NODES + there] = (struct transport_move){.receive = seat.in, .receive_bytes = 24};
        parts[2 * N_NODES + there] = (struct transport_move){
            .send = seat.out + 16, .send_bytes = 8, .receive = seat.in + 24, .receive_bytes = 4};
        /* Its own place is not looked at. */
        parts[node] = parts[N_NODES + node] = (struct transport_move){.send_bytes = 99, .receive_bytes = 99};
        const uint64_t sent = fake_nccl.sent_bytes, received = fake_nccl.received_bytes;
        const int n_swaps = fake_nccl.n_swaps;
        ck_assert_int_eq(nccl->rail_swap_on(seat.rail, parts, 3, seat.stream, &error), EPD_OK);
        ck_assert_uint_eq(fake_nccl.sent_bytes - sent, 24);
        ck_assert_uint_eq(fake_nccl.received_bytes - received, 28);
        ck_assert_int_eq(fake_nccl.n_swaps - n_swaps, 1);
        ck_assert_int_eq(nccl->rail_swap_on(seat.rail, parts, 0, seat.stream, &error), EPD_OK);
        memset(parts, 0, sizeof parts);
        ck_assert_int_eq(nccl->rail_swap_on(seat.rail, parts, 3, seat.stream, &error), EPD_OK);
        ck_assert_int_eq(fake_nccl.n_swaps - n_swaps, 1);
        seat_close(&seat);
        fake_nccl_expect_clean(0);
    }
}
END_TEST

START_TEST(a_rail_that_was_never_connected_leaves_nothing)
{
    struct seat seat;
    fake_nccl_reset();
    for (uint32_t node = 0; node < N_NODES; node++) {
        seat_open(&seat, node);
        ck_assert_int_eq(fake_nccl.n_ids, node == 0);
        seat_close(&seat);
        fake_nccl_expect_clean(0);
    }
}
END_TEST

START_TEST(a_node_that_does_not_come_costs_the_limit_and_no_more)
{
    struct seat seat;
    struct epd_error error;
    fake_nccl_reset();
    fake_nccl.meets = 0;
    for (uint32_t node = 0; node < N_NODES; node++) {
        seat_open(&seat, node);
        const uint64_t begun_ns = clock_now_ns();
        ck_assert_int_eq(begin_connect(&seat, node, 50 * MS, &error), EPD_OK);
        ck_assert_int_eq(fake_nccl.n_connecting, 1);
        ck_assert_int_eq(await_connected(&seat, &error), EPD_TIMEOUT);
        ck_assert_uint_ge(clock_now_ns() - begun_ns, 50 * MS);
        ck_assert_int_eq(swap(&seat, node, &error), EPD_TIMEOUT);
        seat_close(&seat);
        fake_nccl_expect_clean(0);
    }
}
END_TEST

/* Its device must not be taken for idle: what frees memory would wait for that node. */
START_TEST(a_device_has_no_quiet_while_a_first_swap_is_in_its_stream)
{
    struct seat seat;
    struct epd_error error;
    fake_nccl_reset();
    fake_nccl.answers = fake_nccl.leaves = 0;
    seat_open(&seat, 0);
    ck_assert_int_eq(begin_connect(&seat, 0, 50 * MS, &error), EPD_OK);
    ck_assert_int_eq(await_connected(&seat, &error), EPD_TIMEOUT);
    nccl->rail_close(seat.rail);
    sleep_ms(50);
    ck_assert_int_eq(fake_nccl.n_connecting, 1);
    ck_assert(!nccl->rail_closed(seat.rail));
    fake_nccl.leaves = 1;
    ck_assert(leaves_soon(&seat));
    ck_assert_int_eq(fake_nccl.n_connecting, 0);
    nccl->rails_end(&seat.rail, 1);
    fake_stream_destroy(seat.stream);
    fake_nccl_expect_clean(0);
}
END_TEST

START_TEST(whatever_fails_while_a_rail_is_made_is_told_and_leaves_nothing)
{
    static const struct {
        size_t what; /* of struct fake_nccl */
        int value;
        enum epd_status opens, connects;
    } cases[] = {
        {offsetof(struct fake_nccl, no_channels), 1, EPD_QUOTA, EPD_OK},
        {offsetof(struct fake_nccl, id_result), NCCL_SYSTEM_ERROR, EPD_NCCL, EPD_OK},
        {offsetof(struct fake_nccl, no_memory), 1, EPD_OK, EPD_NO_MEMORY},
        {offsetof(struct fake_nccl, begin_result), NCCL_SYSTEM_ERROR, EPD_OK, EPD_NCCL},
        {offsetof(struct fake_nccl, async_result), NCCL_CUDA_ERROR, EPD_OK, EPD_NCCL},
        {offsetof(struct fake_nccl, async_result), NCCL_REMOTE_ERROR, EPD_OK, EPD_PEER_LOST},
        {offsetof(struct fake_nccl, send_result), NCCL_SYSTEM_ERROR, EPD_OK, EPD_NCCL},
        {offsetof(struct fake_nccl, stream_lost), 1, EPD_OK, EPD_CUDA},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct seat seat = {0};
        struct epd_error error = {.status = EPD_OK};
        fake_nccl_reset();
        _Atomic int *knob = (_Atomic int *)(void *)((char *)&fake_nccl + cases[i].what);
        *knob = cases[i].value;
        if (cases[i].opens) {
            ck_assert_int_eq(nccl->rail_open(NULL, 0, &seat.rail, &seat.addresses[0], &error),
                             cases[i].opens);
            fake_nccl_expect_clean(0);
            continue;
        }
        seat_open(&seat, 0);
        if (begin_connect(&seat, 0, LIMIT_NS, &error) == EPD_OK)
            (void)!await_connected(&seat, &error);
        ck_assert_msg(error.status == cases[i].connects, "case %zu: %d: %s", i, (int)error.status,
                      error.text);
        *knob = 0;
        seat_close(&seat);
        fake_nccl_expect_clean(0);
    }
}
END_TEST

START_TEST(an_address_of_node_0_that_is_none_is_refused)
{
    struct seat seat;
    struct epd_error error;
    fake_nccl_reset();
    seat_open(&seat, 1);
    seat.addresses[0].bytes = 5;
    ck_assert_int_eq(begin_connect(&seat, 1, LIMIT_NS, &error), EPD_PROTOCOL);
    seat_close(&seat);
    fake_nccl_expect_clean(0);
}
END_TEST

static const struct epd_error peer_gone = {EPD_PEER_LOST, "node 1 is gone"};

START_TEST(an_abort_ends_connecting)
{
    struct seat seat;
    struct epd_error error;
    fake_nccl_reset();
    fake_nccl.meets = 0;
    seat_open(&seat, 0);
    ck_assert_int_eq(begin_connect(&seat, 0, LIMIT_NS, &error), EPD_OK);
    ck_assert(!nccl->rail_connected(seat.rail, &error));
    nccl->rail_abort(seat.rail, &peer_gone);
    ck_assert_int_eq(await_connected(&seat, &error), EPD_PEER_LOST);
    ck_assert_str_eq(error.text, peer_gone.text);
    seat_close(&seat);
    fake_nccl_expect_clean(0);
}
END_TEST

START_TEST(an_abort_makes_swaps_leave_their_streams_and_fails_later_ones)
{
    struct seat seat;
    struct epd_error error;
    fake_nccl_reset();
    seat_connect(&seat, 0);
    fake_nccl.answers = 0;
    ck_assert_int_eq(swap(&seat, 0, &error), EPD_OK);
    ck_assert(!fake_stream_passed(seat.stream));
    ck_assert_int_eq(look(&seat, &error), EPD_OK);
    nccl->rail_abort(seat.rail, &peer_gone);
    ck_assert(leaves_soon(&seat));
    ck_assert(fake_stream_passed(seat.stream));
    ck_assert_int_eq(swap(&seat, 0, &error), EPD_PEER_LOST);
    ck_assert_int_eq(look(&seat, &error), EPD_PEER_LOST);
    ck_assert_str_eq(error.text, peer_gone.text);
    seat_close(&seat);
    ck_assert_int_eq(fake_nccl.n_shrinks, 1);
    ck_assert_int_eq(fake_nccl.n_destroys, 0);
    fake_nccl_expect_clean(0);
}
END_TEST

static void *abort_later(void *arg)
{
    const struct seat *seat = arg;
    sleep_ms(30);
    nccl->rail_abort(seat->rail, &peer_gone);
    return NULL;
}

/* The lane waits inside, and a communicator that is busy can only be aborted whole. */
START_TEST(an_abort_frees_a_lane_whose_swap_does_not_get_into_its_stream)
{
    struct seat seat;
    struct epd_error error;
    pthread_t thread;
    fake_nccl_reset();
    seat_connect(&seat, 0);
    fake_nccl.takes = fake_nccl.answers = 0;
    ck_assert_int_eq(pthread_create(&thread, NULL, abort_later, &seat), 0);
    ck_assert_int_eq(swap(&seat, 0, &error), EPD_PEER_LOST);
    ck_assert_str_eq(error.text, peer_gone.text);
    (void)pthread_join(thread, NULL);
    ck_assert(leaves_soon(&seat));
    ck_assert(fake_stream_passed(seat.stream));
    seat_close(&seat);
    ck_assert_int_eq(fake_nccl.n_aborts, 1);
    ck_assert_int_eq(fake_nccl.n_shrinks, 0);
    fake_nccl_expect_clean(0);
}
END_TEST

START_TEST(a_swap_that_does_not_get_into_its_stream_ends_at_the_limit)
{
    struct seat seat;
    struct epd_error error;
    fake_nccl_reset();
    seat_open(&seat, 0);
    ck_assert_int_eq(begin_connect(&seat, 0, 1000 * MS, &error), EPD_OK);
    ck_assert_int_eq(await_connected(&seat, &error), EPD_OK);
    fake_nccl.takes = 0;
    ck_assert_int_eq(swap(&seat, 0, &error), EPD_TIMEOUT);
    seat_close(&seat);
    fake_nccl_expect_clean(0);
}
END_TEST

START_TEST(what_nccl_meets_in_a_stream_names_the_other_node)
{
    struct seat seat;
    struct epd_error error;
    fake_nccl_reset();
    seat_connect(&seat, 0);
    fake_nccl.answers = 0;
    ck_assert_int_eq(swap(&seat, 0, &error), EPD_OK);
    fake_nccl.async_result = NCCL_REMOTE_ERROR;
    ck_assert_int_eq(look(&seat, &error), EPD_PEER_LOST);
    ck_assert_msg(strstr(error.text, "node 7") != NULL, "%s", error.text);
    fake_nccl.async_result = 0;
    ck_assert(leaves_soon(&seat));
    ck_assert(fake_stream_passed(seat.stream));
    ck_assert_int_eq(swap(&seat, 0, &error), EPD_PEER_LOST);
    seat_close(&seat);
    fake_nccl_expect_clean(0);
}
END_TEST

/* Eight that cannot hand over, and go slowly: all lanes of the node stand still meanwhile. */
START_TEST(rails_of_a_lane_end_by_one_deadline)
{
    struct seat seats[8];
    struct transport_rail *rails[COUNT(seats)];
    fake_nccl_reset();
    for (size_t i = 0; i < COUNT(seats); i++) {
        seat_connect(&seats[i], 0);
        rails[i] = seats[i].rail;
    }
    fake_nccl.finishes = 0;
    fake_nccl.go_ms = 4000;
    for (size_t i = 0; i < COUNT(seats); i++)
        nccl->rail_close(rails[i]);
    for (size_t i = 0; i < COUNT(seats); i++)
        ck_assert(leaves_soon(&seats[i]));
    const uint64_t begun_ns = clock_now_ns();
    nccl->rails_end(rails, COUNT(rails));
    ck_assert_uint_lt(clock_now_ns() - begun_ns, 2 * TRANSPORT_END_MS * MS);
    ck_assert_int_eq(fake_nccl.n_aborts, COUNT(seats));
    for (size_t i = 0; i < COUNT(seats); i++)
        fake_stream_destroy(seats[i].stream);
    sleep_ms(999);
    sleep_ms(999);
    fake_nccl_expect_clean(0);
}
END_TEST

START_TEST(ids_that_nobody_came_for_are_given_back_by_the_same_deadline)
{
    struct seat seats[4];
    struct transport_rail *rails[COUNT(seats)];
    fake_nccl_reset();
    for (size_t i = 0; i < COUNT(seats); i++) {
        seat_open(&seats[i], 0);
        rails[i] = seats[i].rail;
        nccl->rail_close(rails[i]);
        ck_assert(leaves_soon(&seats[i]));
    }
    fake_nccl.go_ms = 700;
    const uint64_t begun_ns = clock_now_ns();
    nccl->rails_end(rails, COUNT(rails));
    ck_assert_uint_lt(clock_now_ns() - begun_ns, 4 * 700 * MS); /* one by one it would take longer */
    for (size_t i = 0; i < COUNT(seats); i++)
        fake_stream_destroy(seats[i].stream);
    fake_nccl_expect_clean(0);
}
END_TEST

START_TEST(a_device_begins_with_a_communicator_that_stays)
{
    struct epd_error error = {.status = EPD_OK};
    fake_nccl_reset();
    ck_assert_int_eq(nccl->device_begin(&error), EPD_OK);
    ck_assert_int_eq(fake_nccl.n_swaps, 1);
    fake_nccl_expect_clean(1);
}
END_TEST

/* The fake ends a test whose stream goes before the swap that is in it. */
START_TEST(a_device_that_cannot_begin_leaves_nothing)
{
    const size_t knobs[] = {
        offsetof(struct fake_nccl, id_result),   offsetof(struct fake_nccl, begin_result),
        offsetof(struct fake_nccl, send_result), offsetof(struct fake_nccl, async_result),
        offsetof(struct fake_nccl, no_memory),   offsetof(struct fake_nccl, no_channels),
        offsetof(struct fake_nccl, stream_lost),
    };
    for (size_t i = 0; i < COUNT(knobs); i++) {
        struct epd_error error = {.status = EPD_OK};
        fake_nccl_reset();
        fake_nccl.answers = 0;
        *(_Atomic int *)(void *)((char *)&fake_nccl + knobs[i]) = NCCL_CUDA_ERROR;
        ck_assert_int_ne(nccl->device_begin(&error), EPD_OK);
        ck_assert_int_ne(error.status, EPD_OK);
        fake_nccl_expect_clean(0);
    }
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_rail_that_connects_swaps_and_closes_leaves_nothing,
        a_swap_takes_its_parts_at_once_and_may_have_none,
        a_rail_that_was_never_connected_leaves_nothing,
        a_node_that_does_not_come_costs_the_limit_and_no_more,
        a_device_has_no_quiet_while_a_first_swap_is_in_its_stream,
        whatever_fails_while_a_rail_is_made_is_told_and_leaves_nothing,
        an_address_of_node_0_that_is_none_is_refused,
        an_abort_ends_connecting,
        an_abort_makes_swaps_leave_their_streams_and_fails_later_ones,
        an_abort_frees_a_lane_whose_swap_does_not_get_into_its_stream,
        a_swap_that_does_not_get_into_its_stream_ends_at_the_limit,
        what_nccl_meets_in_a_stream_names_the_other_node,
        rails_of_a_lane_end_by_one_deadline,
        ids_that_nobody_came_for_are_given_back_by_the_same_deadline,
        a_device_begins_with_a_communicator_that_stays,
        a_device_that_cannot_begin_leaves_nothing,
    };
    return suite_run("ep nccl", tests, COUNT(tests));
}
