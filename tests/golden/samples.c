#include "tests/golden/samples.h"

#include <stdio.h>
#include <string.h>

#include "proto/page.h"

#define TEXT(array, text) snprintf((array), sizeof(array), "%s", (text))

static void fill_bytes(uint8_t *bytes, size_t n, uint8_t first)
{
    for (size_t i = 0; i < n; i++)
        bytes[i] = (uint8_t)(first + i);
}

static void fill_text(char *text, size_t room)
{
    for (size_t i = 0; i + 1 < room; i++)
        text[i] = (char)('a' + i % 26);
    text[room - 1] = 0;
}

static void begin(enum message_kind kind, struct sample *sample)
{
    memset(sample, 0, sizeof *sample);
    sample->message.kind = kind;
    sample->message.plan_create.bindings = NULL;
    if (kind == MESSAGE_PLAN_CREATE)
        sample->message.plan_create.bindings = sample->bindings;
    if (kind != MESSAGE_LAUNCH && kind != MESSAGE_CLOSED)
        sample->message.request_id = kind == MESSAGE_REPLY_ERROR ? 0 : 1;
}

static void bind(struct sample *sample, struct message_binding binding)
{
    struct message_binding *to = &sample->bindings[sample->message.plan_create.n_bindings++];

    to->role = binding.role;
    to->part_idx = binding.part_idx;
    to->n_parts = binding.n_parts;
    to->buffer_id = binding.buffer_id;
    to->offset = binding.offset;
    to->dtype = binding.dtype;
    to->n_dims = binding.n_dims;
    memcpy(to->shape, binding.shape, sizeof to->shape);
}

static void typical_group_join(struct message_group_join *join)
{
    TEXT(join->name, "layer-\xc3\xa9-0");
    join->world_size = 4;
    join->rank = 3;
    join->has_device = 1;
    fill_bytes(join->device_uuid, sizeof join->device_uuid, 0x10);
    join->config = (struct message_group_config){.n_experts = 256,
                                                 .top_k = 8,
                                                 .hidden = 7168,
                                                 .ffn = 2048,
                                                 .max_tokens = 4096,
                                                 .capacity_rows = 131072,
                                                 .alignment = 128,
                                                 .dtype = EPD_BF16,
                                                 .overflow = EPD_OVERFLOW_DROP,
                                                 .deadline_ms = 2500};
}

static void typical_plan_create(struct sample *sample)
{
    struct message_plan_create *plan = &sample->message.plan_create;

    plan->group_id = 0x100000002;
    plan->op = EPD_OP_MOE_FORWARD;
    plan->context_plan_id = 0x100000007;
    plan->layout = EPD_GEMM_NT;
    plan->activation = EPD_GEGLU;
    plan->saved = EPD_SAVED_RECOMPUTE;
    plan->accumulate = 1;
    plan->delay_wgrad = 1;
    bind(sample,
         (struct message_binding){
             .role = EPD_ROLE_X, .buffer_id = 11, .dtype = EPD_BF16, .n_dims = 2, .shape = {4096, 7168}});
    for (uint32_t i = 0; i < 3; i++)
        bind(sample, (struct message_binding){.role = EPD_ROLE_W1,
                                              .part_idx = i,
                                              .n_parts = 3,
                                              .buffer_id = 12 + i % 2,
                                              .offset = 58720256ull * i,
                                              .dtype = EPD_BF16,
                                              .n_dims = 2,
                                              .shape = {4096, 7168}});
    bind(sample, (struct message_binding){.role = EPD_ROLE_W2,
                                          .buffer_id = 14,
                                          .offset = 256,
                                          .dtype = EPD_F32,
                                          .n_dims = 3,
                                          .shape = {3, 7168, 2048}});
}

static void typical_reply_hello(struct message_reply_hello *hello)
{
    hello->major = 1;
    hello->minor = 2;
    hello->features = 0x30;
    hello->session_id = 17;
    fill_bytes(hello->boot_id, sizeof hello->boot_id, 0xa0);
    hello->epoch = 5;
    hello->backend = EPD_BACKEND_HOST;
    hello->page_bytes = sizeof(struct page);
    TEXT(hello->daemon_version, "0.1.0");
    hello->n_devices = 2;
    for (uint32_t i = 0; i < hello->n_devices; i++) {
        fill_bytes(hello->devices[i].uuid, sizeof hello->devices[i].uuid, (uint8_t)(0x40 + 0x20 * i));
        hello->devices[i].device_idx = i;
        TEXT(hello->devices[i].name, i ? "device one" : "device zero");
        hello->devices[i].memory_bytes = 1000000007ull * (i + 1);
    }
}

static void typical_reply_group(struct message_reply_group *group)
{
    group->group_id = 0x100000002;
    group->epoch = 6;
    group->device_idx = 3;
    fill_bytes(group->device_uuid, sizeof group->device_uuid, 0x20);
    group->n_local_experts = 64;
    group->first_expert = 192;
    group->capacity_rows = 131072;
    group->heap_bytes = 9876543210ull;
}

static void typical_buffer_register(struct message_buffer_register *buffer)
{
    buffer->group_id = 0x100000002;
    buffer->kind = EPD_MEMORY_CUDA_IPC;
    buffer->offset = 512;
    buffer->bytes = 1ull << 33;
    fill_bytes(buffer->ipc_handle, sizeof buffer->ipc_handle, 0x80);
    fill_bytes(buffer->device_uuid, sizeof buffer->device_uuid, 0x10);
}

void sample_typical(enum message_kind kind, struct sample *sample)
{
    struct message *message = &sample->message;

    begin(kind, sample);
    if (message->request_id)
        message->request_id = 1000 + (uint64_t)kind;
    switch (kind) {
    case MESSAGE_HELLO:
        message->hello = (struct message_hello){.major = 1, .minor = 3, .features = 0x11};
        TEXT(message->hello.client_name, "trainer rank 3");
        break;
    case MESSAGE_GROUP_JOIN:
        typical_group_join(&message->group_join);
        break;
    case MESSAGE_GROUP_LEAVE:
        message->group_leave.id = 0x100000002;
        break;
    case MESSAGE_BUFFER_ALLOC:
        message->buffer_alloc = (struct message_buffer_alloc){.group_id = 0x100000002, .bytes = 58720256};
        break;
    case MESSAGE_BUFFER_REGISTER:
        typical_buffer_register(&message->buffer_register);
        break;
    case MESSAGE_BUFFER_RELEASE:
        message->buffer_release.id = 11;
        break;
    case MESSAGE_PLAN_CREATE:
        typical_plan_create(sample);
        break;
    case MESSAGE_PLAN_DESTROY:
        message->plan_destroy.id = 0x100000008;
        break;
    case MESSAGE_LAUNCH:
        message->launch.plan_id = 0x100000008;
        message->launch.seq = 123456;
        message->launch.n_tokens = 4095;
        message->launch.shape_hash = 0xfedcba9876543210ull;
        message->launch.n_repeats = 1;
        break;
    case MESSAGE_CONTROL:
        message->control.verb = CONTROL_EVICT;
        message->control.session_id = 17;
        TEXT(message->control.reason, "node goes into repair");
        break;
    case MESSAGE_REPLY_ERROR:
        message->request_id = 1000 + (uint64_t)kind;
        message->reply_error.status = EPD_INVALID_SHAPE;
        TEXT(message->reply_error.text, "moe_forward x: columns 7167, want 7168 (hidden)");
        break;
    case MESSAGE_REPLY_HELLO:
        typical_reply_hello(&message->reply_hello);
        break;
    case MESSAGE_REPLY_GROUP:
        typical_reply_group(&message->reply_group);
        break;
    case MESSAGE_REPLY_BUFFER:
        message->reply_buffer = (struct message_reply_buffer){.buffer_id = 11, .bytes = 58720512};
        break;
    case MESSAGE_REPLY_PLAN:
        message->reply_plan.plan_id = 0x100000008;
        message->reply_plan.plan_key = 4;
        message->reply_plan.flag_idx = 2;
        message->reply_plan.shape_hash = 0xfedcba9876543210ull;
        message->reply_plan.saved_bytes = 777216;
        break;
    case MESSAGE_REPLY_DOCUMENT:
        message->reply_document.bytes = 4242;
        break;
    case MESSAGE_CLOSED:
        message->closed.status = EPD_EVICTED;
        TEXT(message->closed.reason, "node goes into repair");
        break;
    case MESSAGE_STATS:
    case MESSAGE_REPLY_OK:
    case MESSAGE_NONE:
    case MESSAGE_KIND_COUNT:
        break;
    }
}

void sample_least(enum message_kind kind, struct sample *sample)
{
    struct message *message = &sample->message;

    begin(kind, sample);
    switch (kind) {
    case MESSAGE_HELLO:
        message->hello.major = 1;
        break;
    case MESSAGE_GROUP_JOIN:
        TEXT(message->group_join.name, "g");
        message->group_join.world_size = 1;
        message->group_join.config = (struct message_group_config){.n_experts = 1,
                                                                   .top_k = 1,
                                                                   .hidden = 1,
                                                                   .max_tokens = 1,
                                                                   .alignment = 1,
                                                                   .dtype = EPD_F32,
                                                                   .overflow = EPD_OVERFLOW_ERROR};
        break;
    case MESSAGE_BUFFER_ALLOC:
        message->buffer_alloc = (struct message_buffer_alloc){.group_id = 1, .bytes = 1};
        break;
    case MESSAGE_BUFFER_REGISTER:
        message->buffer_register.group_id = 1;
        message->buffer_register.kind = EPD_MEMORY_MEMFD;
        message->buffer_register.bytes = 1;
        break;
    case MESSAGE_PLAN_CREATE:
        message->plan_create.group_id = 1;
        message->plan_create.op = EPD_OP_BARRIER;
        break;
    case MESSAGE_LAUNCH:
        message->launch.plan_id = message->launch.seq = message->launch.n_repeats = 1;
        break;
    case MESSAGE_CONTROL:
        message->control.verb = CONTROL_STATUS;
        break;
    case MESSAGE_REPLY_ERROR:
        message->reply_error.status = EPD_INVALID_ARGUMENT;
        break;
    case MESSAGE_REPLY_HELLO:
        message->reply_hello.major = 1;
        message->reply_hello.session_id = message->reply_hello.page_bytes = 1;
        message->reply_hello.backend = EPD_BACKEND_HOST;
        break;
    case MESSAGE_REPLY_GROUP:
        message->reply_group.group_id = 1;
        message->reply_group.n_local_experts = 1;
        message->reply_group.capacity_rows = 1;
        break;
    case MESSAGE_REPLY_BUFFER:
        message->reply_buffer = (struct message_reply_buffer){.buffer_id = 1, .bytes = 1};
        break;
    case MESSAGE_REPLY_PLAN:
        message->reply_plan.plan_id = 1;
        break;
    case MESSAGE_REPLY_DOCUMENT:
        message->reply_document.bytes = 1;
        break;
    case MESSAGE_CLOSED:
        message->closed.status = EPD_INVALID_ARGUMENT;
        break;
    case MESSAGE_GROUP_LEAVE:
    case MESSAGE_BUFFER_RELEASE:
    case MESSAGE_PLAN_DESTROY:
        message->group_leave.id = 1; /* the three share struct message_id */
        break;
    case MESSAGE_STATS:
    case MESSAGE_REPLY_OK:
    case MESSAGE_NONE:
    case MESSAGE_KIND_COUNT:
        break;
    }
}

static void most_group_join(struct message_group_join *join)
{
    fill_text(join->name, sizeof join->name);
    join->world_size = EPD_MAX_WORLD_SIZE;
    join->rank = EPD_MAX_WORLD_SIZE - 1;
    join->has_device = 1;
    memset(join->device_uuid, 0xff, sizeof join->device_uuid);
    join->config = (struct message_group_config){.n_experts = EPD_MAX_WORLD_SIZE * EPD_MAX_LOCAL_EXPERTS,
                                                 .top_k = EPD_MAX_TOP_K,
                                                 .hidden = EPD_MAX_HIDDEN,
                                                 .ffn = EPD_MAX_FFN,
                                                 .max_tokens = EPD_MAX_TOKENS,
                                                 .capacity_rows = INT64_MAX / (2ll * EPD_MAX_FFN * 4),
                                                 .alignment = EPD_MAX_ALIGNMENT,
                                                 .dtype = EPD_F16,
                                                 .overflow = EPD_OVERFLOW_DROP,
                                                 .deadline_ms = UINT32_MAX};
}

/* Two weight lists of 1024 parts, each part elsewhere, every id and offset as long as it can be on the wire,
 * and single tensors up to the limit of tensors. */
static void most_plan_create(struct sample *sample)
{
    struct message_plan_create *plan = &sample->message.plan_create;

    plan->group_id = UINT64_MAX;
    plan->op = EPD_OP_COUNT - 1;
    plan->context_plan_id = UINT64_MAX;
    plan->layout = EPD_GEMM_NT;
    plan->activation = EPD_RELU2;
    plan->saved = EPD_SAVED_RECOMPUTE;
    plan->accumulate = 1;
    plan->delay_wgrad = 1;
    for (uint32_t i = 0; i < 2 * EPD_MAX_LOCAL_EXPERTS; i++)
        bind(sample, (struct message_binding){.role = i < EPD_MAX_LOCAL_EXPERTS ? EPD_ROLE_W1 : EPD_ROLE_W2,
                                              .part_idx = i % EPD_MAX_LOCAL_EXPERTS,
                                              .n_parts = EPD_MAX_LOCAL_EXPERTS,
                                              .buffer_id = UINT64_MAX - i,
                                              .offset = INT64_MAX / 2 + i,
                                              .dtype = EPD_F32,
                                              .n_dims = 2,
                                              .shape = {1 << 20, 1 << 20}});
    for (uint32_t i = 0; i < EPD_MAX_TENSORS - 2; i++)
        bind(sample, (struct message_binding){.role = EPD_ROLE_COUNT - 1,
                                              .buffer_id = UINT64_MAX,
                                              .offset = 7,
                                              .dtype = EPD_I64,
                                              .n_dims = 3,
                                              .shape = {1, INT64_MAX / 8, 0}});
}

static void most_reply_hello(struct message_reply_hello *hello)
{
    hello->major = hello->minor = UINT32_MAX;
    hello->features = hello->session_id = hello->epoch = UINT64_MAX;
    memset(hello->boot_id, 0xff, sizeof hello->boot_id);
    hello->backend = EPD_BACKEND_CUDA;
    hello->page_bytes = INT64_MAX;
    fill_text(hello->daemon_version, sizeof hello->daemon_version);
    hello->n_devices = EPD_MAX_DEVICES;
    for (uint32_t i = 0; i < EPD_MAX_DEVICES; i++) {
        memset(hello->devices[i].uuid, 0xff, sizeof hello->devices[i].uuid);
        hello->devices[i].device_idx = EPD_MAX_DEVICES - 1 - i;
        fill_text(hello->devices[i].name, sizeof hello->devices[i].name);
        hello->devices[i].memory_bytes = UINT64_MAX - i;
    }
}

static void most_reply_group(struct message_reply_group *group)
{
    group->group_id = group->epoch = group->heap_bytes = UINT64_MAX;
    group->device_idx = EPD_MAX_DEVICES - 1;
    memset(group->device_uuid, 0xff, sizeof group->device_uuid);
    group->n_local_experts = EPD_MAX_LOCAL_EXPERTS;
    group->first_expert = (EPD_MAX_WORLD_SIZE - 1) * EPD_MAX_LOCAL_EXPERTS;
    group->capacity_rows = INT64_MAX;
}

static void most_buffer_register(struct message_buffer_register *buffer)
{
    buffer->group_id = UINT64_MAX;
    buffer->kind = EPD_MEMORY_CUDA_VMM;
    buffer->offset = 1;
    buffer->bytes = INT64_MAX - 1;
    buffer->allocation_bytes = INT64_MAX;
    memset(buffer->device_uuid, 0xff, sizeof buffer->device_uuid);
}

void sample_most(enum message_kind kind, struct sample *sample)
{
    struct message *message = &sample->message;

    begin(kind, sample);
    if (kind != MESSAGE_LAUNCH && kind != MESSAGE_CLOSED)
        message->request_id = UINT64_MAX;
    switch (kind) {
    case MESSAGE_HELLO:
        message->hello.major = message->hello.minor = UINT32_MAX;
        message->hello.features = UINT64_MAX;
        fill_text(message->hello.client_name, sizeof message->hello.client_name);
        break;
    case MESSAGE_GROUP_JOIN:
        most_group_join(&message->group_join);
        break;
    case MESSAGE_BUFFER_ALLOC:
        message->buffer_alloc = (struct message_buffer_alloc){.group_id = UINT64_MAX, .bytes = INT64_MAX};
        break;
    case MESSAGE_BUFFER_REGISTER:
        most_buffer_register(&message->buffer_register);
        break;
    case MESSAGE_PLAN_CREATE:
        most_plan_create(sample);
        break;
    case MESSAGE_LAUNCH:
        message->launch.plan_id = message->launch.shape_hash = UINT64_MAX;
        message->launch.n_tokens = EPD_MAX_TOKENS;
        message->launch.n_repeats = EPD_MAX_REPEATS;
        message->launch.seq = UINT64_MAX - EPD_MAX_REPEATS;
        break;
    case MESSAGE_CONTROL:
        message->control.verb = CONTROL_EVICT;
        message->control.session_id = UINT64_MAX;
        fill_text(message->control.reason, sizeof message->control.reason);
        break;
    case MESSAGE_REPLY_ERROR:
        message->reply_error.status = EPD_INTERNAL;
        fill_text(message->reply_error.text, sizeof message->reply_error.text);
        break;
    case MESSAGE_REPLY_HELLO:
        most_reply_hello(&message->reply_hello);
        break;
    case MESSAGE_REPLY_GROUP:
        most_reply_group(&message->reply_group);
        break;
    case MESSAGE_REPLY_BUFFER:
        message->reply_buffer = (struct message_reply_buffer){.buffer_id = UINT64_MAX, .bytes = INT64_MAX};
        break;
    case MESSAGE_REPLY_PLAN:
        message->reply_plan.plan_id = message->reply_plan.shape_hash = message->reply_plan.saved_bytes =
            UINT64_MAX;
        message->reply_plan.plan_key = UINT32_MAX;
        message->reply_plan.flag_idx = EPD_PAGE_MAX_PLANS - 1;
        break;
    case MESSAGE_REPLY_DOCUMENT:
        message->reply_document.bytes = INT64_MAX;
        break;
    case MESSAGE_CLOSED:
        message->closed.status = EPD_INTERNAL;
        fill_text(message->closed.reason, sizeof message->closed.reason);
        break;
    case MESSAGE_GROUP_LEAVE:
    case MESSAGE_BUFFER_RELEASE:
    case MESSAGE_PLAN_DESTROY:
        message->group_leave.id = UINT64_MAX;
        break;
    case MESSAGE_STATS:
    case MESSAGE_REPLY_OK:
    case MESSAGE_NONE:
    case MESSAGE_KIND_COUNT:
        break;
    }
}

enum codec_side sample_side(enum message_kind kind)
{
    if (kind == MESSAGE_CONTROL)
        return CODEC_FROM_CONTROL;
    return kind < MESSAGE_CONTROL ? CODEC_FROM_CLIENT : CODEC_FROM_DAEMON;
}

static size_t body_bytes(enum message_kind kind)
{
    static const struct message *const m; /* only for sizeof */
    static const size_t sizes[MESSAGE_KIND_COUNT] = {
        [MESSAGE_HELLO] = sizeof m->hello,
        [MESSAGE_GROUP_JOIN] = sizeof m->group_join,
        [MESSAGE_GROUP_LEAVE] = sizeof m->group_leave,
        [MESSAGE_BUFFER_ALLOC] = sizeof m->buffer_alloc,
        [MESSAGE_BUFFER_REGISTER] = sizeof m->buffer_register,
        [MESSAGE_BUFFER_RELEASE] = sizeof m->buffer_release,
        [MESSAGE_PLAN_CREATE] = sizeof m->plan_create,
        [MESSAGE_PLAN_DESTROY] = sizeof m->plan_destroy,
        [MESSAGE_LAUNCH] = sizeof m->launch,
        [MESSAGE_CONTROL] = sizeof m->control,
        [MESSAGE_REPLY_ERROR] = sizeof m->reply_error,
        [MESSAGE_REPLY_HELLO] = sizeof m->reply_hello,
        [MESSAGE_REPLY_GROUP] = sizeof m->reply_group,
        [MESSAGE_REPLY_BUFFER] = sizeof m->reply_buffer,
        [MESSAGE_REPLY_PLAN] = sizeof m->reply_plan,
        [MESSAGE_REPLY_DOCUMENT] = sizeof m->reply_document,
        [MESSAGE_CLOSED] = sizeof m->closed,
    };

    (void)m;
    return sizes[kind];
}

/* Both sides zero their structs before they fill them, so that padding compares too. */
int sample_equal(const struct message *a, const struct message *b)
{
    if (a->kind != b->kind || a->request_id != b->request_id)
        return 0;
    if (a->kind != MESSAGE_PLAN_CREATE)
        return memcmp(&a->hello, &b->hello, body_bytes(a->kind)) == 0;

    struct message left = *a, right = *b;
    left.plan_create.bindings = right.plan_create.bindings = NULL;
    return memcmp(&left.plan_create, &right.plan_create, sizeof left.plan_create) == 0 &&
           memcmp(a->plan_create.bindings, b->plan_create.bindings,
                  a->plan_create.n_bindings * sizeof a->plan_create.bindings[0]) == 0;
}
