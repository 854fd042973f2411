/* What codec refuses, and the sentence it refuses it with. Each case spoils one field of a good message. */
#include <string.h>

#include "proto/codec_wire.h"
#include "tests/golden/samples.h"
#include "tests/unit/proto/suite.h"

struct bench {
    struct sample sample;
    unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
};

static struct message *fresh(struct bench *bench, enum message_kind kind)
{
    sample_typical(kind, &bench->sample);
    return &bench->sample.message;
}

/* The sender's codec refuses to send it. */
static void expect_not_encoded(struct bench *bench, const char *want)
{
    struct epd_error error = {0};
    size_t bytes = 77;

    ck_assert_int_eq(codec_encode(&bench->sample.message, bench->datagram, &bytes, &error),
                     EPD_INVALID_ARGUMENT);
    ck_assert_int_eq(error.status, EPD_INVALID_ARGUMENT);
    ck_assert_str_eq(error.text, want);
    ck_assert_uint_eq(bytes, 77);
}

static void expect_not_decoded(enum codec_side side, const void *datagram, size_t bytes, uint64_t request_id,
                               const char *want)
{
    struct epd_error error = {0};
    struct message message;
    struct arena arena;

    ck_assert_int_eq(arena_init(&arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    ck_assert_int_eq(codec_decode(side, datagram, bytes, &arena, &message, &error), EPD_PROTOCOL);
    ck_assert_int_eq(error.status, EPD_PROTOCOL);
    ck_assert_str_eq(error.text, want);
    ck_assert_int_eq(message.kind, MESSAGE_NONE);
    ck_assert_uint_eq(message.request_id, request_id);
    arena_fini(&arena);
}

/* Neither sent by an honest peer nor taken from another. */
static void expect_refused(struct bench *bench, const char *want)
{
    const struct message *message = &bench->sample.message;
    struct epd_error error;
    size_t bytes;

    expect_not_encoded(bench, want);
    ck_assert_int_eq(wire_encode(message, bench->datagram, &bytes, &error), EPD_OK);
    expect_not_decoded(sample_side(message->kind), bench->datagram, bytes, message->request_id, want);
}

/* spoil is an assignment to the good message m. */
#define REFUSED(kind, spoil, want)                                                                           \
    do {                                                                                                     \
        struct message *m = fresh(&bench, kind);                                                             \
        spoil;                                                                                               \
        expect_refused(&bench, want);                                                                        \
    } while (0)

START_TEST(request_ids_are_where_they_belong)
{
    static struct bench bench;

    REFUSED(MESSAGE_HELLO, m->request_id = 0, "hello request_id: given 0, want an id");
    REFUSED(MESSAGE_STATS, m->request_id = 0, "stats request_id: given 0, want an id");
    REFUSED(MESSAGE_REPLY_OK, m->request_id = 0, "reply_ok request_id: given 0, want an id");
    REFUSED(MESSAGE_LAUNCH, m->request_id = 5, "launch request_id: given 5, want 0");
    REFUSED(MESSAGE_CLOSED, m->request_id = 5, "closed request_id: given 5, want 0");
}
END_TEST

START_TEST(hello_is_checked)
{
    static struct bench bench;

    REFUSED(MESSAGE_HELLO, m->hello.major = 0, "hello major: given 0, want 1..4294967295");
    REFUSED(MESSAGE_HELLO, m->hello.client_name[2] = '\n',
            "hello client_name: byte 0x0a at 2, want text without control characters");
    REFUSED(MESSAGE_HELLO, m->hello.client_name[0] = 0x7f,
            "hello client_name: byte 0x7f at 0, want text without control characters");
    memset(fresh(&bench, MESSAGE_HELLO)->hello.client_name, 'x', EPD_MAX_NAME_BYTES);
    expect_not_encoded(&bench, "hello client_name: 64 bytes without an end, want at most 63");
}
END_TEST

START_TEST(group_join_is_checked)
{
    static struct bench bench;

    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.name[0] = 0, "group_join name: empty, want 1..63 bytes");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.world_size = 0, "group_join world_size: given 0, want 1..64");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.world_size = 65, "group_join world_size: given 65, want 1..64");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.rank = 4, "group_join rank: given 4, want 0..3");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.n_experts = 0,
            "group_join n_experts: given 0, want a multiple of world_size 4");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.n_experts = 255,
            "group_join n_experts: given 255, want a multiple of world_size 4");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.n_experts = 4100,
            "group_join n_experts: given 4100, want at most 1024 for each of 4 ranks");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.top_k = 0, "group_join top_k: given 0, want 1..32");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.top_k = 33, "group_join top_k: given 33, want 1..32");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.n_experts = 4, "group_join top_k: given 8, want 1..4");
}
END_TEST

START_TEST(group_sizes_are_checked)
{
    static struct bench bench;

    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.hidden = 0,
            "group_join hidden: given 0, want 1..1048576");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.hidden = 1048577,
            "group_join hidden: given 1048577, want 1..1048576");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.ffn = 1048577,
            "group_join ffn: given 1048577, want 0..1048576");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.max_tokens = 0,
            "group_join max_tokens: given 0, want 1..16777216");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.max_tokens = 16777217,
            "group_join max_tokens: given 16777217, want 1..16777216");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.capacity_rows = -1,
            "group_join capacity_rows: given -1, want 0..321685687669321");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.capacity_rows = 321685687669322,
            "group_join capacity_rows: given 321685687669322, want 0..321685687669321");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.alignment = 0,
            "group_join alignment: given 0, want a power of two up to 4096");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.alignment = 96,
            "group_join alignment: given 96, want a power of two up to 4096");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.alignment = 8192,
            "group_join alignment: given 8192, want a power of two up to 4096");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.dtype = 0,
            "group_join dtype: given 0 (?), want f32, bf16 or f16");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.dtype = EPD_I32,
            "group_join dtype: given 4 (i32), want f32, bf16 or f16");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.overflow = 0, "group_join overflow: given 0, want 1..2");
    REFUSED(MESSAGE_GROUP_JOIN, m->group_join.config.overflow = 3, "group_join overflow: given 3, want 1..2");
}
END_TEST

START_TEST(ids_are_not_zero)
{
    static struct bench bench;

    REFUSED(MESSAGE_GROUP_LEAVE, m->group_leave.id = 0, "group_leave id: given 0, want an id");
    REFUSED(MESSAGE_BUFFER_RELEASE, m->buffer_release.id = 0, "buffer_release id: given 0, want an id");
    REFUSED(MESSAGE_PLAN_DESTROY, m->plan_destroy.id = 0, "plan_destroy id: given 0, want an id");
    REFUSED(MESSAGE_BUFFER_ALLOC, m->buffer_alloc.group_id = 0, "buffer_alloc group_id: given 0, want an id");
    REFUSED(MESSAGE_BUFFER_REGISTER, m->buffer_register.group_id = 0,
            "buffer_register group_id: given 0, want an id");
    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.group_id = 0, "plan_create group_id: given 0, want an id");
    REFUSED(MESSAGE_LAUNCH, m->launch.plan_id = 0, "launch plan_id: given 0, want an id");
    REFUSED(MESSAGE_REPLY_HELLO, m->reply_hello.session_id = 0,
            "reply_hello session_id: given 0, want an id");
    REFUSED(MESSAGE_REPLY_GROUP, m->reply_group.group_id = 0, "reply_group group_id: given 0, want an id");
    REFUSED(MESSAGE_REPLY_BUFFER, m->reply_buffer.buffer_id = 0,
            "reply_buffer buffer_id: given 0, want an id");
    REFUSED(MESSAGE_REPLY_PLAN, m->reply_plan.plan_id = 0, "reply_plan plan_id: given 0, want an id");
}
END_TEST

START_TEST(buffers_are_checked)
{
    static struct bench bench;

    REFUSED(MESSAGE_BUFFER_ALLOC, m->buffer_alloc.bytes = 0,
            "buffer_alloc bytes: given 0, want 1..9223372036854775807");
    REFUSED(MESSAGE_BUFFER_ALLOC, m->buffer_alloc.bytes = 1ull << 63,
            "buffer_alloc bytes: given 9223372036854775808, want 1..9223372036854775807");
    REFUSED(MESSAGE_BUFFER_REGISTER, m->buffer_register.bytes = 0,
            "buffer_register bytes: given 0, want 1..9223372036854775807");
    REFUSED(MESSAGE_BUFFER_REGISTER, m->buffer_register.offset = UINT64_MAX - 7,
            "buffer_register offset: given 18446744073709551608, want 0..9223372028264841215");
    REFUSED(MESSAGE_BUFFER_REGISTER, m->buffer_register.allocation_bytes = 8589935103,
            "buffer_register allocation_bytes: given 8589935103, want 8589935104..8589935104");
    sample_least(MESSAGE_BUFFER_REGISTER, &bench.sample);
    bench.sample.message.buffer_register.kind = EPD_MEMORY_HEAP;
    bench.sample.message.buffer_register.device_uuid[0] = 1;
    expect_refused(&bench, "buffer_register kind: given 1, want 2..4");
    bench.sample.message.buffer_register.kind = 5;
    expect_refused(&bench, "buffer_register kind: given 5, want 2..4");
    bench.sample.message.buffer_register.kind = (enum epd_memory_kind) - 2;
    expect_refused(&bench, "buffer_register kind: given 4294967294, want 2..4");
}
END_TEST

START_TEST(plans_are_checked)
{
    static struct bench bench;

    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.op = 0, "plan_create op: given 0, want 1..11");
    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.op = 12, "plan_create op: given 12, want 1..11");
    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.layout = 4, "plan_create layout: given 4, want 0..3");
    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.activation = 4, "plan_create activation: given 4, want 0..3");
    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.saved = 3, "plan_create saved: given 3, want 0..2");
    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.crossing = 3, "plan_create crossing: given 3, want 0..2");
    fresh(&bench, MESSAGE_PLAN_CREATE)->plan_create.n_bindings = EPD_MAX_BINDINGS + 1;
    expect_not_encoded(&bench, "plan_create bindings: given 2201, want 0..2200");
}
END_TEST

START_TEST(bindings_are_checked)
{
    static struct bench bench;

    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.bindings[4].role = 0,
            "plan_create binding role: given 0, want 1..32");
    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.bindings[4].role = 33,
            "plan_create binding role: given 33, want 1..32");
    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.bindings[0].dtype = 6,
            "plan_create binding dtype: given 6, want 1..5");
    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.bindings[2].buffer_id = 0,
            "plan_create binding buffer_id: given 0, want an id");
    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.bindings[1].n_parts = 1025,
            "plan_create binding 1 (w1) n_parts: given 1025, want 0..1024");
    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.bindings[3].part_idx = 3,
            "plan_create binding 3 (w1) part_idx: given 3 of 3 parts");
    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.bindings[0].part_idx = 1,
            "plan_create binding 0 (x) part_idx: given 1 of 0 parts");
    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.bindings[4].shape[2] = -1,
            "plan_create binding 4 (w2) shape[2]: given -1, want 0 or more");
    REFUSED(MESSAGE_PLAN_CREATE, m->plan_create.bindings[0].shape[1] = 1ll << 60,
            "plan_create binding 0 (x) shape: shape[1] = 1152921504606846976 makes more than 2^63 bytes");
    REFUSED(
        MESSAGE_PLAN_CREATE, m->plan_create.bindings[0].offset = UINT64_MAX,
        "plan_create binding 0 (x) offset: given 18446744073709551615 for 58720256 bytes, want an end below "
        "2^63");
    REFUSED(
        MESSAGE_PLAN_CREATE, m->plan_create.bindings[0].offset = INT64_MAX,
        "plan_create binding 0 (x) offset: given 9223372036854775807 for 58720256 bytes, want an end below "
        "2^63");
    fresh(&bench, MESSAGE_PLAN_CREATE)->plan_create.bindings[0].n_dims = 4;
    expect_not_encoded(&bench, "plan_create binding n_dims: given 4, want 1..3");
}
END_TEST

START_TEST(an_empty_dimension_does_not_hide_an_overflow)
{
    static struct bench bench;
    struct message *m = fresh(&bench, MESSAGE_PLAN_CREATE);

    m->plan_create.bindings[4].shape[0] = 0;
    m->plan_create.bindings[4].shape[1] = 1ll << 40;
    m->plan_create.bindings[4].shape[2] = 1ll << 40;
    expect_refused(&bench,
                   "plan_create binding 4 (w2) shape: shape[2] = 1099511627776 makes more than 2^63 bytes");
}
END_TEST

START_TEST(more_tensors_than_a_datagram_may_hold_are_refused)
{
    static struct bench bench;
    struct message *m = fresh(&bench, MESSAGE_PLAN_CREATE);
    struct epd_error error;
    size_t bytes;

    for (uint32_t i = 1; i < EPD_MAX_TENSORS + 1; i++)
        m->plan_create.bindings[i] = m->plan_create.bindings[0];
    m->plan_create.n_bindings = EPD_MAX_TENSORS;
    ck_assert_int_eq(codec_encode(m, bench.datagram, &bytes, &error), EPD_OK);
    m->plan_create.n_bindings = EPD_MAX_TENSORS + 1;
    ck_assert_int_eq(codec_encode(m, bench.datagram, &bytes, &error), EPD_PROTOCOL);
    ck_assert_str_eq(error.text, "plan_create bindings: more than 128 tensors and runs of parts");
}
END_TEST

START_TEST(launches_are_checked)
{
    static struct bench bench;

    REFUSED(MESSAGE_LAUNCH, m->launch.seq = 0, "launch seq: given 0, want 1..18446744073709551614");
    REFUSED(MESSAGE_LAUNCH, m->launch.seq = UINT64_MAX,
            "launch seq: given 18446744073709551615, want 1..18446744073709551614");
    REFUSED(MESSAGE_LAUNCH, m->launch.n_tokens = 16777217,
            "launch n_tokens: given 16777217, want 0..16777216");
    REFUSED(MESSAGE_LAUNCH, m->launch.n_repeats = 0, "launch n_repeats: given 0, want 1..65536");
    REFUSED(MESSAGE_LAUNCH, m->launch.n_repeats = 65537, "launch n_repeats: given 65537, want 1..65536");
}
END_TEST

START_TEST(control_requests_are_checked)
{
    static struct bench bench;

    REFUSED(MESSAGE_CONTROL, m->control.verb = 0, "control verb: given 0, want 1..10");
    REFUSED(MESSAGE_CONTROL, m->control.verb = 11, "control verb: given 11, want 1..10");
    REFUSED(MESSAGE_CONTROL, m->control.session_id = 0, "control session_id: given 0, want an id");
    REFUSED(MESSAGE_CONTROL, m->control.verb = CONTROL_STATS,
            "control session_id 17 and reason: given, but only evict takes them");
}
END_TEST

START_TEST(replies_are_checked)
{
    static struct bench bench;

    REFUSED(MESSAGE_REPLY_ERROR, m->reply_error.status = EPD_OK,
            "reply_error status: given 0, want the number of a failure");
    REFUSED(MESSAGE_REPLY_ERROR, m->reply_error.status = 34,
            "reply_error status: given 34, want the number of a failure");
    REFUSED(MESSAGE_CLOSED, m->closed.status = 0, "closed status: given 0, want the number of a failure");
    REFUSED(MESSAGE_REPLY_HELLO, m->reply_hello.major = 0, "reply_hello major: given 0, want 1..4294967295");
    REFUSED(MESSAGE_REPLY_HELLO, m->reply_hello.backend = 3, "reply_hello backend: given 3, want 1..2");
    REFUSED(MESSAGE_REPLY_HELLO, m->reply_hello.page_bytes = 0,
            "reply_hello page_bytes: given 0, want 1..9223372036854775807");
    REFUSED(MESSAGE_REPLY_HELLO, m->reply_hello.devices[1].device_idx = 16,
            "reply_hello device_idx: given 16, want 0..15");
    REFUSED(MESSAGE_REPLY_GROUP, m->reply_group.device_idx = 16,
            "reply_group device_idx: given 16, want 0..15");
    REFUSED(MESSAGE_REPLY_GROUP, m->reply_group.n_local_experts = 0,
            "reply_group n_local_experts: given 0, want 1..1024");
    REFUSED(MESSAGE_REPLY_GROUP, m->reply_group.first_expert = 64513,
            "reply_group first_expert: given 64513, want 0..64512");
    REFUSED(MESSAGE_REPLY_GROUP, m->reply_group.capacity_rows = -1,
            "reply_group capacity_rows: given 18446744073709551615, want 1..9223372036854775807");
    REFUSED(MESSAGE_REPLY_BUFFER, m->reply_buffer.bytes = 0,
            "reply_buffer bytes: given 0, want 1..9223372036854775807");
    REFUSED(MESSAGE_REPLY_PLAN, m->reply_plan.flag_idx = 512, "reply_plan flag_idx: given 512, want 0..511");
    REFUSED(MESSAGE_REPLY_DOCUMENT, m->reply_document.bytes = 0,
            "reply_document bytes: given 0, want 1..9223372036854775807");
}
END_TEST

/* Packs what no struct message can say. */
static size_t pack(struct bench *bench, Epd__V1__Datagram *datagram)
{
    datagram->request_id = 42;
    ck_assert_uint_le(epd__v1__datagram__get_packed_size(datagram), sizeof bench->datagram);
    return epd__v1__datagram__pack(datagram, bench->datagram);
}

static void expect_datagram_refused(struct bench *bench, enum codec_side side, Epd__V1__Datagram *datagram,
                                    const char *want)
{
    expect_not_decoded(side, bench->datagram, pack(bench, datagram), 42, want);
}

START_TEST(bytes_and_texts_have_their_lengths)
{
    static struct bench bench;
    static uint8_t letters[300];
    Epd__V1__Datagram datagram = EPD__V1__DATAGRAM__INIT;
    Epd__V1__Hello hello = EPD__V1__HELLO__INIT;

    memset(letters, 'x', sizeof letters);
    datagram.body_case = EPD__V1__DATAGRAM__BODY_HELLO;
    datagram.hello = &hello;
    hello.major = 1;
    hello.client_name = (ProtobufCBinaryData){.len = 64, .data = letters};
    expect_datagram_refused(&bench, CODEC_FROM_CLIENT, &datagram,
                            "hello client_name: 64 bytes, want at most 63");
    hello.client_name = (ProtobufCBinaryData){.len = 3, .data = (uint8_t *)"a\0b"};
    expect_datagram_refused(&bench, CODEC_FROM_CLIENT, &datagram,
                            "hello client_name: zero byte at 1, want text without it");

    Epd__V1__GroupReply group = EPD__V1__GROUP_REPLY__INIT;
    datagram.body_case = EPD__V1__DATAGRAM__BODY_GROUP_REPLY;
    datagram.group_reply = &group;
    group.device_uuid = (ProtobufCBinaryData){.len = 15, .data = letters};
    expect_datagram_refused(&bench, CODEC_FROM_DAEMON, &datagram,
                            "reply_group device_uuid: 15 bytes, want 16");
    group.device_uuid.len = 17;
    expect_datagram_refused(&bench, CODEC_FROM_DAEMON, &datagram,
                            "reply_group device_uuid: 17 bytes, want 16");

    Epd__V1__Error failure = EPD__V1__ERROR__INIT;
    datagram.body_case = EPD__V1__DATAGRAM__BODY_ERROR;
    datagram.error = &failure;
    failure.text = (ProtobufCBinaryData){.len = 256, .data = letters};
    expect_datagram_refused(&bench, CODEC_FROM_DAEMON, &datagram,
                            "reply_error text: 256 bytes, want at most 255");

    Epd__V1__Closed closed = EPD__V1__CLOSED__INIT;
    datagram.body_case = EPD__V1__DATAGRAM__BODY_CLOSED;
    datagram.closed = &closed;
    closed.reason = (ProtobufCBinaryData){.len = 300, .data = letters};
    expect_datagram_refused(&bench, CODEC_FROM_DAEMON, &datagram,
                            "closed reason: 300 bytes, want at most 255");
}
END_TEST

START_TEST(group_join_without_its_parts_is_refused)
{
    static struct bench bench;
    Epd__V1__Datagram datagram = EPD__V1__DATAGRAM__INIT;
    Epd__V1__GroupJoin join = EPD__V1__GROUP_JOIN__INIT;

    datagram.body_case = EPD__V1__DATAGRAM__BODY_GROUP_JOIN;
    datagram.group_join = &join;
    join.name = (ProtobufCBinaryData){.len = 1, .data = (uint8_t *)"g"};
    join.world_size = 1;
    expect_datagram_refused(&bench, CODEC_FROM_CLIENT, &datagram, "group_join config: missing");
    join.device_uuid = (ProtobufCBinaryData){.len = 1, .data = (uint8_t *)"u"};
    expect_datagram_refused(&bench, CODEC_FROM_CLIENT, &datagram, "group_join device_uuid: 1 bytes, want 16");
}
END_TEST

START_TEST(handles_fit_their_kind_of_memory)
{
    static struct bench bench;
    static uint8_t letters[64];
    Epd__V1__Datagram datagram = EPD__V1__DATAGRAM__INIT;
    Epd__V1__BufferRegister buffer = EPD__V1__BUFFER_REGISTER__INIT;

    datagram.body_case = EPD__V1__DATAGRAM__BODY_BUFFER_REGISTER;
    datagram.buffer_register = &buffer;
    buffer.kind = EPD__V1__MEMORY_KIND__EPD_MEMORY_CUDA_IPC;
    expect_datagram_refused(&bench, CODEC_FROM_CLIENT, &datagram,
                            "buffer_register ipc_handle: 0 bytes, want 64 with this kind");
    buffer.ipc_handle = (ProtobufCBinaryData){.len = 64, .data = letters};
    expect_datagram_refused(&bench, CODEC_FROM_CLIENT, &datagram,
                            "buffer_register device_uuid: 0 bytes, want 16");
    buffer.kind = EPD__V1__MEMORY_KIND__EPD_MEMORY_MEMFD;
    expect_datagram_refused(&bench, CODEC_FROM_CLIENT, &datagram,
                            "buffer_register ipc_handle: 64 bytes, want 0 with this kind");
    buffer.ipc_handle.len = 0;
    buffer.device_uuid = (ProtobufCBinaryData){.len = 4, .data = letters};
    expect_datagram_refused(&bench, CODEC_FROM_CLIENT, &datagram,
                            "buffer_register device_uuid: 4 bytes, want 16");
}
END_TEST

START_TEST(tensor_lists_fit_each_other)
{
    static struct bench bench;
    Epd__V1__Datagram datagram = EPD__V1__DATAGRAM__INIT;
    Epd__V1__PlanCreate plan = EPD__V1__PLAN_CREATE__INIT;
    Epd__V1__Tensor tensor = EPD__V1__TENSOR__INIT, *tensors[EPD_MAX_TENSORS + 1];
    static uint64_t numbers[EPD_MAX_BINDINGS + 1];
    int64_t shape[4] = {1, 1, 1, 1};

    datagram.body_case = EPD__V1__DATAGRAM__BODY_PLAN_CREATE;
    datagram.plan_create = &plan;
    for (size_t i = 0; i < EPD_MAX_TENSORS + 1; i++)
        tensors[i] = &tensor;
    plan.tensors = tensors;
    plan.n_tensors = 1;
    tensor.shape = shape;
    tensor.buffer_id = tensor.offset = numbers;
    expect_datagram_refused(&bench, CODEC_FROM_CLIENT, &datagram,
                            "plan_create tensor 0 shape: 0 dimensions, want 1..3");
    tensor.n_shape = 4;
    expect_datagram_refused(&bench, CODEC_FROM_CLIENT, &datagram,
                            "plan_create tensor 0 shape: 4 dimensions, want 1..3");
    tensor.n_shape = 2;
    expect_datagram_refused(
        &bench, CODEC_FROM_CLIENT, &datagram,
        "plan_create tensor 0: 0 buffer_id and 0 offset, want as many of both, at least 1, and "
        "1 unless it is a list");
    tensor.n_buffer_id = 2;
    tensor.n_offset = 1;
    expect_datagram_refused(
        &bench, CODEC_FROM_CLIENT, &datagram,
        "plan_create tensor 0: 2 buffer_id and 1 offset, want as many of both, at least 1, and "
        "1 unless it is a list");
    tensor.n_offset = 2;
    expect_datagram_refused(
        &bench, CODEC_FROM_CLIENT, &datagram,
        "plan_create tensor 0: 2 buffer_id and 2 offset, want as many of both, at least 1, and "
        "1 unless it is a list");
    tensor.n_parts = 1024;
    tensor.n_buffer_id = tensor.n_offset = EPD_MAX_BINDINGS + 1;
    expect_datagram_refused(&bench, CODEC_FROM_CLIENT, &datagram,
                            "plan_create bindings: given 2201, want at most 2200");
    tensor.n_buffer_id = tensor.n_offset = 1;
    plan.n_tensors = EPD_MAX_TENSORS + 1;
    expect_datagram_refused(&bench, CODEC_FROM_CLIENT, &datagram,
                            "plan_create tensors: given 129, want at most 128");
}
END_TEST

START_TEST(too_many_devices_are_refused)
{
    static struct bench bench;
    static uint8_t uuid[16];
    Epd__V1__Datagram datagram = EPD__V1__DATAGRAM__INIT;
    Epd__V1__HelloReply hello = EPD__V1__HELLO_REPLY__INIT;
    Epd__V1__Device device = EPD__V1__DEVICE__INIT, *devices[17];

    for (size_t i = 0; i < 17; i++)
        devices[i] = &device;
    datagram.body_case = EPD__V1__DATAGRAM__BODY_HELLO_REPLY;
    datagram.hello_reply = &hello;
    hello.boot_id = (ProtobufCBinaryData){.len = 16, .data = uuid};
    hello.devices = devices;
    hello.n_devices = 17;
    expect_datagram_refused(&bench, CODEC_FROM_DAEMON, &datagram,
                            "reply_hello devices: given 17, want at most 16");
    hello.n_devices = 1;
    expect_datagram_refused(&bench, CODEC_FROM_DAEMON, &datagram,
                            "reply_hello device uuid: 0 bytes, want 16");

    static struct bench other;
    fresh(&other, MESSAGE_REPLY_HELLO)->reply_hello.n_devices = 17;
    expect_not_encoded(&other, "reply_hello n_devices: given 17, want 0..16");
}
END_TEST

START_TEST(a_body_from_the_wrong_side_is_refused)
{
    static const struct {
        enum message_kind kind;
        enum codec_side side;
        const char *want;
    } cases[] = {
        {MESSAGE_REPLY_OK, CODEC_FROM_CLIENT,
         "datagram body: reply_ok from a client, want what a client sends"},
        {MESSAGE_CONTROL, CODEC_FROM_CLIENT,
         "datagram body: control from a client, want what a client sends"},
        {MESSAGE_STATS, CODEC_FROM_CONTROL,
         "datagram body: stats from the control socket, want what the control socket sends"},
        {MESSAGE_LAUNCH, CODEC_FROM_DAEMON,
         "datagram body: launch from the daemon, want what the daemon sends"},
    };
    static struct bench bench;

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct message *m = fresh(&bench, cases[i].kind);
        struct epd_error error;
        size_t bytes;

        ck_assert_int_eq(codec_encode(m, bench.datagram, &bytes, &error), EPD_OK);
        expect_not_decoded(cases[i].side, bench.datagram, bytes, m->request_id, cases[i].want);
    }
}
END_TEST

START_TEST(a_datagram_without_a_known_body_is_refused)
{
    static const unsigned char only_id[] = {0x08, 0x07}, newer_body[] = {0x08, 0x07, 0xf2, 0x07, 0x00};

    expect_not_decoded(CODEC_FROM_CLIENT, only_id, sizeof only_id, 7,
                       "datagram body: none that protocol 1.0 knows");
    expect_not_decoded(CODEC_FROM_CLIENT, newer_body, sizeof newer_body, 7,
                       "datagram body: none that protocol 1.0 knows");
}
END_TEST

START_TEST(a_datagram_that_is_no_protobuf_is_refused_with_its_id)
{
    static const unsigned char broken[] = {0x08, 0xac, 0x02, 0x1a, 0x7f, 0x01}, noise[] = {0xff, 0xff, 0xff};
    static unsigned char large[EPD_MAX_DATAGRAM_BYTES + 1];

    expect_not_decoded(CODEC_FROM_CLIENT, broken, sizeof broken, 300,
                       "datagram: 6 bytes that are no epd.v1.Datagram");
    expect_not_decoded(CODEC_FROM_CLIENT, noise, sizeof noise, 0,
                       "datagram: 3 bytes that are no epd.v1.Datagram");
    expect_not_decoded(CODEC_FROM_CLIENT, noise, 0, 0, "datagram: 0 bytes, want 1..65536");
    expect_not_decoded(CODEC_FROM_CLIENT, large, sizeof large, 0, "datagram: 65537 bytes, want 1..65536");
}
END_TEST

START_TEST(a_message_without_a_kind_is_not_encoded)
{
    static struct bench bench;

    bench.sample.message.kind = MESSAGE_NONE;
    expect_not_encoded(&bench, "message kind: given 0, want 1..19");
    bench.sample.message.kind = MESSAGE_KIND_COUNT;
    expect_not_encoded(&bench, "message kind: given 20, want 1..19");
}
END_TEST

int main(void)
{
    TCase *tcase = tcase_create("codec_rejects");

    tcase_add_test(tcase, request_ids_are_where_they_belong);
    tcase_add_test(tcase, hello_is_checked);
    tcase_add_test(tcase, group_join_is_checked);
    tcase_add_test(tcase, group_sizes_are_checked);
    tcase_add_test(tcase, ids_are_not_zero);
    tcase_add_test(tcase, buffers_are_checked);
    tcase_add_test(tcase, plans_are_checked);
    tcase_add_test(tcase, bindings_are_checked);
    tcase_add_test(tcase, an_empty_dimension_does_not_hide_an_overflow);
    tcase_add_test(tcase, more_tensors_than_a_datagram_may_hold_are_refused);
    tcase_add_test(tcase, launches_are_checked);
    tcase_add_test(tcase, control_requests_are_checked);
    tcase_add_test(tcase, replies_are_checked);
    tcase_add_test(tcase, bytes_and_texts_have_their_lengths);
    tcase_add_test(tcase, group_join_without_its_parts_is_refused);
    tcase_add_test(tcase, handles_fit_their_kind_of_memory);
    tcase_add_test(tcase, tensor_lists_fit_each_other);
    tcase_add_test(tcase, too_many_devices_are_refused);
    tcase_add_test(tcase, a_body_from_the_wrong_side_is_refused);
    tcase_add_test(tcase, a_datagram_without_a_known_body_is_refused);
    tcase_add_test(tcase, a_datagram_that_is_no_protobuf_is_refused_with_its_id);
    tcase_add_test(tcase, a_message_without_a_kind_is_not_encoded);
    return suite_run("codec_rejects", tcase);
}
