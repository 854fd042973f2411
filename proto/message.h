/* Messages as plain C, after every size, count and enum has been checked by codec. No protobuf type leaves codec.
 * Strings are zero-terminated inside their arrays. Any thread; owned by whoever declares them. */
#ifndef EPD_PROTO_MESSAGE_H
#define EPD_PROTO_MESSAGE_H

#include "proto/limits.h"
#include "proto/status.h"
#include "proto/words.h"

enum message_kind {
    MESSAGE_NONE = 0,
    /* client -> daemon, each answered by one MESSAGE_REPLY_* with the same request_id, except LAUNCH */
    MESSAGE_HELLO,
    MESSAGE_GROUP_JOIN,
    MESSAGE_GROUP_LEAVE,
    MESSAGE_BUFFER_ALLOC,
    MESSAGE_BUFFER_REGISTER,
    MESSAGE_BUFFER_RELEASE,
    MESSAGE_PLAN_CREATE,
    MESSAGE_PLAN_DESTROY,
    MESSAGE_LAUNCH, /* no reply: the plan's done flag and the status ring answer */
    MESSAGE_STATS,
    /* person -> control socket, answered by MESSAGE_REPLY_DOCUMENT; drain and evict by MESSAGE_REPLY_OK */
    MESSAGE_CONTROL,
    /* daemon -> client */
    MESSAGE_REPLY_ERROR,
    MESSAGE_REPLY_OK, /* leave, release, destroy */
    MESSAGE_REPLY_HELLO,
    MESSAGE_REPLY_GROUP,
    MESSAGE_REPLY_BUFFER,
    MESSAGE_REPLY_PLAN,
    MESSAGE_REPLY_DOCUMENT, /* stats and control: a JSON document in a sealed memfd */
    MESSAGE_CLOSED,         /* unasked: the last message of a session that the daemon closes */
    MESSAGE_KIND_COUNT
};

struct message_device {
    uint8_t uuid[EPD_UUID_BYTES];
    uint32_t device_idx;
    char name[EPD_MAX_NAME_BYTES];
    uint64_t memory_bytes;
};

struct message_hello {
    uint32_t major, minor; /* of the client's protocol */
    uint64_t features;     /* bits the client can use */
    char client_name[EPD_MAX_NAME_BYTES];
};

/* fd: the session page (proto/page.h). */
struct message_reply_hello {
    uint32_t major, minor; /* what the session will speak: the lower of both minors */
    uint64_t features;     /* bits both sides have */
    uint64_t session_id;
    uint8_t boot_id[EPD_BOOT_ID_BYTES]; /* of the worker; changes with every start */
    uint64_t epoch;
    enum epd_backend_kind backend;
    uint64_t page_bytes;
    char daemon_version[EPD_MAX_NAME_BYTES];
    uint32_t n_devices;
    struct message_device devices[EPD_MAX_DEVICES];
};

/* What all ranks of a group must agree on, field by field. */
struct message_group_config {
    uint32_t n_experts;
    uint32_t top_k;
    uint32_t hidden;
    uint32_t ffn; /* 0: the group runs no moe op */
    uint32_t max_tokens;
    int64_t capacity_rows; /* of every rank; 0: the most that can ever arrive */
    uint32_t alignment;    /* rows; power of two */
    enum epd_dtype dtype;
    enum epd_overflow overflow;
    uint32_t deadline_ms; /* for gathering one step; 0: the daemon's default */
    uint32_t n_nodes;     /* that the ranks are on, as many on each; 0 is 1 */
};

/* Answered when all ranks are there, or at the join deadline. */
struct message_group_join {
    char name[EPD_MAX_NAME_BYTES];
    uint32_t world_size, rank;
    int has_device; /* 0: the daemon binds rank modulo n_devices */
    uint8_t device_uuid[EPD_UUID_BYTES];
    struct message_group_config config;
};

struct message_reply_group {
    uint64_t group_id;
    uint64_t epoch;
    uint32_t device_idx;
    uint8_t device_uuid[EPD_UUID_BYTES];
    uint32_t n_local_experts, first_expert;
    int64_t capacity_rows;
    uint64_t heap_bytes; /* of this rank, exchange workspace of the group */
};

/* GROUP_LEAVE, BUFFER_RELEASE, PLAN_DESTROY */
struct message_id {
    uint64_t id;
};

/* fd in the reply: the memory, mapped by the client from offset 0. */
struct message_buffer_alloc {
    uint64_t group_id; /* gives the device */
    uint64_t bytes;
};

/* fd in the request: the memfd or VMM fd; none for CUDA IPC. */
struct message_buffer_register {
    uint64_t group_id;
    enum epd_memory_kind kind;
    uint64_t offset, bytes;                   /* the range inside the allocation that becomes the buffer */
    uint64_t allocation_bytes;                /* of CUDA_VMM only; 0: not told */
    uint8_t ipc_handle[EPD_IPC_HANDLE_BYTES]; /* of CUDA_IPC only */
    uint8_t device_uuid[EPD_UUID_BYTES];      /* where CUDA memory lives; may be zero for a memfd */
};

struct message_reply_buffer {
    uint64_t buffer_id;
    uint64_t bytes; /* usable */
};

struct message_binding {
    enum epd_role role;
    uint32_t part_idx; /* of a weight list; 0 otherwise */
    uint32_t n_parts;  /* length of the list; 0: one tensor */
    uint64_t buffer_id;
    uint64_t offset; /* bytes from the start of the buffer */
    enum epd_dtype dtype;
    uint32_t n_dims; /* 1..3 */
    int64_t shape[3];
};

/* A collective plan is answered when every rank of the group has created it; plans of a group match by the order in
 * which each rank creates its collective plans (the plan key). */
struct message_plan_create {
    uint64_t group_id;
    enum epd_op op;
    uint64_t context_plan_id; /* the plan whose routing or saved context this one uses; 0: none */
    enum epd_gemm_layout layout;
    enum epd_activation activation;
    enum epd_saved saved;
    int accumulate;  /* wgrad adds to dW and dbias */
    int delay_wgrad; /* moe_backward leaves wgrad to a moe_wgrad plan */
    enum epd_crossing crossing;
    uint32_t n_bindings;
    struct message_binding *bindings; /* [n_bindings] in the decode arena, or the caller's */
};

struct message_reply_plan {
    uint64_t plan_id;
    uint32_t plan_key; /* same on every rank; 0 for local plans */
    uint32_t flag_idx; /* this plan's place in the session page */
    uint64_t shape_hash;
    uint64_t saved_bytes;
};

/* The step header. seq belongs to the rank: it is continuous there and checked against the rank's last one. What
 * the ranks launch is matched by position: the n-th collective launch of every rank must be of the same plan. */
struct message_launch {
    uint64_t plan_id;
    uint64_t seq;      /* n-th launch of this rank in its group, from 1, local ones included */
    uint32_t n_tokens; /* rows of x in this step, at most the plan's T */
    uint64_t shape_hash;
    uint32_t n_repeats; /* armed launches in one message: 1 normally; seq counts on from the first */
};

enum control_verb {
    CONTROL_UNSPECIFIED = 0,
    CONTROL_STATUS = 1,
    CONTROL_STATS = 2,
    CONTROL_CLIENTS = 3,
    CONTROL_GROUPS = 4,
    CONTROL_PLANS = 5,
    CONTROL_DEVICES = 6,
    CONTROL_DRAIN = 7,
    CONTROL_EVICT = 8,
    CONTROL_DUMP = 9,
    CONTROL_FABRIC = 10,
    CONTROL_VERB_COUNT
};

struct message_control {
    enum control_verb verb;
    uint64_t session_id;               /* evict */
    char reason[EPD_ERROR_TEXT_BYTES]; /* evict: shown to the client */
};

struct message_reply_document {
    uint64_t bytes; /* of the JSON text in the memfd */
};

struct message_closed {
    enum epd_status status;
    char reason[EPD_ERROR_TEXT_BYTES];
};

/* One message. request_id is 0 for LAUNCH and CLOSED, and in a REPLY_ERROR about a request whose id could not be read.
 * Which kinds carry an fd is said above; the codec does not see fds. */
struct message {
    enum message_kind kind;
    uint64_t request_id;
    union {
        struct message_hello hello;
        struct message_group_join group_join;
        struct message_id group_leave;
        struct message_buffer_alloc buffer_alloc;
        struct message_buffer_register buffer_register;
        struct message_id buffer_release;
        struct message_plan_create plan_create;
        struct message_id plan_destroy;
        struct message_launch launch;
        struct message_control control;
        struct epd_error reply_error;
        struct message_reply_hello reply_hello;
        struct message_reply_group reply_group;
        struct message_reply_buffer reply_buffer;
        struct message_reply_plan reply_plan;
        struct message_reply_document reply_document;
        struct message_closed closed;
    };
};

/* "group_join"; for logs and errors. */
const char *message_kind_name(enum message_kind kind);

#endif
