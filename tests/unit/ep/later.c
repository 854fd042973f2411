#include "tests/unit/ep/later.h"

#include <string.h>

#include "ep/cuda_exchange.h"
#include "ep/node_impl.h"
#include "ep/transport.h"
#include "kernels/cuda/hop.h"
#include "tests/unit/ep/fake_nccl.h"
#include "tests/unit/ep/harness.h"

extern const struct transport transport_nccl;

struct later later;
struct backend later_backend;
static _Thread_local uint32_t at_rank; /* of the latest choice */
static _Thread_local uint64_t at_step; /* of the latest report */
static _Thread_local int unmarked;     /* something is in the queue, and no ticket behind it */

/* ---- kernels ---- */

void cuda_hop_frame_layout(const struct exchange_shape *shape, size_t row_bytes, struct cuda_hop_frame *frame)
{
    ck_assert_uint_eq(row_bytes, ROW_BYTES);
    ck_assert_uint_eq(shape->max_tokens, MAX_TOKENS);
    *frame = (struct cuda_hop_frame){.head = 0, .counts = 256, .experts = 512, .weights = 768, .rows = 1024};
    frame->bytes = frame->rows + 768;
}

enum epd_status cuda_hop_choose_launch(const struct cuda_hop_choose_args *args, struct CUstream_st *stream,
                                       struct epd_error *error)
{
    (void)stream;
    unmarked = 1;
    at_rank = args->hop.shape.rank;
    if (at_rank == 1 && atomic_exchange(&later.choose_fails, 0))
        return error_set(error, EPD_INTERNAL, "injected");
    *(struct cuda_hop_head *)(void *)args->hop.out = (struct cuda_hop_head){
        CUDA_HOP_MAGIC, args->hop.shape.n_tokens ? atomic_load(&later.sends[at_rank]) : 0};
    return EPD_OK;
}

enum epd_status cuda_hop_pack_launch(const struct cuda_hop_pack_args *args, struct CUstream_st *stream,
                                     struct epd_error *error)
{
    (void)args, (void)stream, (void)error;
    return EPD_OK;
}

enum epd_status cuda_hop_take_launch(const struct cuda_hop_take_args *args, struct CUstream_st *stream,
                                     struct epd_error *error)
{
    (void)args, (void)stream, (void)error;
    return EPD_OK;
}

enum epd_status cuda_hop_finish_launch(const struct cuda_hop_finish_args *args, struct CUstream_st *stream,
                                       struct epd_error *error)
{
    (void)args, (void)stream, (void)error;
    return EPD_OK;
}

enum epd_status cuda_hop_collect_launch(const struct cuda_hop_collect_args *args, struct CUstream_st *stream,
                                        struct epd_error *error)
{
    (void)args, (void)stream, (void)error;
    return EPD_OK;
}

void cuda_exchange_sizes(const struct exchange_shape *shape, uint64_t row_bytes, struct exchange_sizes *sizes)
{
    (void)shape, (void)row_bytes;
    *sizes = (struct exchange_sizes){.workspace_bytes = 256, .dot_bytes = 256, .keeps_slots = 1};
}

enum epd_status cuda_exchange_launch(enum exchange_op op, uint32_t stage, const struct exchange_args *args,
                                     struct CUstream_st *stream, struct epd_error *error)
{
    const uint32_t rank = args->set.first_rank + args->shape.rank;
    (void)op, (void)stage, (void)stream;
    unmarked = 1;
    if (args->set.idx == 1)
        atomic_store(&later.took[rank], args->shape.n_tokens);
    if (rank == 1 && atomic_exchange(&later.set_fails, 0))
        return error_set(error, EPD_INTERNAL, "injected");
    return EPD_OK;
}

/* ---- the other node ---- */

static void on_send(const void *data, uint64_t bytes)
{
    if (bytes == REPORT_BYTES)
        at_step = ((const struct hop_report *)data)->step;
}

static void on_receive(void *data, uint64_t bytes)
{
    if (bytes == TOLD_BYTES)
        *(struct cuda_hop_head *)data = (struct cuda_hop_head){
            atomic_load(&later.no_head) ? 0 : CUDA_HOP_MAGIC, atomic_load(&later.comes[at_rank])};
    if (bytes != REPORT_BYTES)
        return;
    struct hop_report report = {.step = at_step, .rank = -1, .step_again = at_step};
    if (atomic_load(&later.other_overflows))
        report.records[PLAN_RECORD_LAYOUT] =
            (struct kernel_error){.status = EPD_CAPACITY_OVERFLOW, .got = 99, .allowed = 40};
    memcpy(data, &report, sizeof report);
}

/* ---- the device ---- */

/* Of the wait for a ready flag, and of all that lies behind one. */
enum { READY_TICKET = 1, LATER_TICKET };

static int queue_reached(struct backend_queue *queue, uint64_t ticket, struct epd_error *error)
{
    const struct page_plan *client = atomic_load(&later.absent);
    (void)error;
    if (ticket < READY_TICKET)
        return 1;
    return atomic_load(&later.held) != queue && (!client || atomic_load(&client->ready)) &&
           fake_stream_passed(fake_nccl.queue_stream);
}

static enum epd_status queue_ticket(struct backend_queue *queue, uint64_t *ticket, struct epd_error *error)
{
    (void)queue, (void)error;
    unmarked = 0;
    *ticket = LATER_TICKET;
    return EPD_OK;
}

static enum epd_status flag_ready(struct backend_queue *queue, const struct backend_flag *flag,
                                  uint64_t *ticket, struct epd_error *error)
{
    (void)queue, (void)error;
    atomic_store(&flag->page->plans[flag->idx].ready, 0);
    *ticket = READY_TICKET;
    return EPD_OK;
}

static int device_idle(struct backend_device *device)
{
    (void)device;
    return fake_nccl.n_connecting == 0 && fake_stream_passed(fake_nccl.queue_stream);
}

static uint32_t device_n_waiting(struct backend_device *device)
{
    (void)device;
    return at_rank == 0 ? atomic_load(&later.n_to_give_back) : 0;
}

/* CUDA waits here for all that is in its streams, whatever was said of tickets. */
static uint64_t device_give_back(struct backend_device *device)
{
    (void)device;
    if (unmarked)
        atomic_fetch_add(&later.n_disturbed, 1);
    atomic_store(&later.n_to_give_back, 0);
    return 0;
}

const struct transport *__wrap_transport_find(enum epd_backend_kind backend, struct epd_error *reason);
const struct transport *__wrap_transport_find(enum epd_backend_kind backend, struct epd_error *reason)
{
    (void)backend, (void)reason;
    return &transport_nccl;
}

enum epd_status __real_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error);
enum epd_status __wrap_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error);
enum epd_status __wrap_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error)
{
    (void)backend;
    return __real_lane_start(&later_backend, config, device_idx, lane, error);
}

void later_reset(void)
{
    static const uint32_t n_stages[EXCHANGE_OP_COUNT] = {CUDA_ROUTE_DISPATCH_STAGES, CUDA_DISPATCH_STAGES,
                                                         CUDA_COMBINE_STAGES, CUDA_GATHER_STAGES,
                                                         CUDA_WEIGHT_GRAD_STAGES};
    later_backend = backend_host;
    later_backend.works_later = 1;
    later_backend.queue_reached = queue_reached;
    later_backend.queue_ticket = queue_ticket;
    later_backend.flag_ready = flag_ready;
    later_backend.device_idle = device_idle;
    later_backend.device_n_waiting = device_n_waiting;
    later_backend.device_give_back = device_give_back;
    later_backend.exchange_sizes = cuda_exchange_sizes;
    memcpy(later_backend.n_stages, n_stages, sizeof n_stages);
    fake_nccl_reset();
    fake_nccl.on_send = on_send;
    fake_nccl.on_receive = on_receive;
    fake_nccl.queue_stream = fake_stream_create();
    atomic_store(&later.held, NULL);
    atomic_store(&later.absent, NULL);
    atomic_store(&later.choose_fails, 0);
    atomic_store(&later.set_fails, 0);
    atomic_store(&later.no_head, 0);
    atomic_store(&later.other_overflows, 0);
    atomic_store(&later.n_to_give_back, 0);
    atomic_store(&later.n_disturbed, 0);
}
