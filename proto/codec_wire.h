/* Between the codec's own files: protobuf form <-> struct message, one pair of functions per kind, and the
 * range checks. Nothing outside proto/codec*.c includes this (and the codec's tests, which need datagrams
 * that no honest peer sends). */
#ifndef EPD_PROTO_CODEC_WIRE_H
#define EPD_PROTO_CODEC_WIRE_H

#include "proto/arena.h"
#include "proto/codec.h"
#include "proto/epd.pb-c.h"
#include "proto/message.h"

/* kind in message.h, oneof member in epd.proto, name of the function pair, who may send it */
#define WIRE_TABLE(X)                                                                                        \
    X(MESSAGE_HELLO, HELLO, hello, CODEC_FROM_CLIENT)                                                        \
    X(MESSAGE_GROUP_JOIN, GROUP_JOIN, group_join, CODEC_FROM_CLIENT)                                         \
    X(MESSAGE_GROUP_LEAVE, GROUP_LEAVE, group_leave, CODEC_FROM_CLIENT)                                      \
    X(MESSAGE_BUFFER_ALLOC, BUFFER_ALLOC, buffer_alloc, CODEC_FROM_CLIENT)                                   \
    X(MESSAGE_BUFFER_REGISTER, BUFFER_REGISTER, buffer_register, CODEC_FROM_CLIENT)                          \
    X(MESSAGE_BUFFER_RELEASE, BUFFER_RELEASE, buffer_release, CODEC_FROM_CLIENT)                             \
    X(MESSAGE_PLAN_CREATE, PLAN_CREATE, plan_create, CODEC_FROM_CLIENT)                                      \
    X(MESSAGE_PLAN_DESTROY, PLAN_DESTROY, plan_destroy, CODEC_FROM_CLIENT)                                   \
    X(MESSAGE_LAUNCH, LAUNCH, launch, CODEC_FROM_CLIENT)                                                     \
    X(MESSAGE_STATS, STATS, stats, CODEC_FROM_CLIENT)                                                        \
    X(MESSAGE_CONTROL, CONTROL, control, CODEC_FROM_CONTROL)                                                 \
    X(MESSAGE_REPLY_ERROR, ERROR, error, CODEC_FROM_DAEMON)                                                  \
    X(MESSAGE_REPLY_OK, OK, ok, CODEC_FROM_DAEMON)                                                           \
    X(MESSAGE_REPLY_HELLO, HELLO_REPLY, hello_reply, CODEC_FROM_DAEMON)                                      \
    X(MESSAGE_REPLY_GROUP, GROUP_REPLY, group_reply, CODEC_FROM_DAEMON)                                      \
    X(MESSAGE_REPLY_BUFFER, BUFFER_REPLY, buffer_reply, CODEC_FROM_DAEMON)                                   \
    X(MESSAGE_REPLY_PLAN, PLAN_REPLY, plan_reply, CODEC_FROM_DAEMON)                                         \
    X(MESSAGE_REPLY_DOCUMENT, DOCUMENT_REPLY, document_reply, CODEC_FROM_DAEMON)                             \
    X(MESSAGE_CLOSED, CLOSED, closed, CODEC_FROM_DAEMON)

/* The protobuf form of one outgoing message, on the encoder's stack. Text and bytes point into the struct
 * message. */
struct wire {
    Epd__V1__Datagram datagram;
    union {
        Epd__V1__Hello hello;
        struct {
            Epd__V1__GroupJoin join;
            Epd__V1__GroupConfig config;
        } group_join;
        Epd__V1__GroupLeave group_leave;
        Epd__V1__BufferAlloc buffer_alloc;
        Epd__V1__BufferRegister buffer_register;
        Epd__V1__BufferRelease buffer_release;
        struct {
            Epd__V1__PlanCreate plan;
            Epd__V1__Tensor tensors[EPD_MAX_TENSORS];
            Epd__V1__Tensor *tensor_list[EPD_MAX_TENSORS];
            uint64_t buffer_ids[EPD_MAX_BINDINGS];
            uint64_t offsets[EPD_MAX_BINDINGS];
        } plan_create;
        Epd__V1__PlanDestroy plan_destroy;
        Epd__V1__Launch launch;
        Epd__V1__Stats stats;
        Epd__V1__Control control;
        Epd__V1__Error error;
        Epd__V1__Ok ok;
        struct {
            Epd__V1__HelloReply reply;
            Epd__V1__Device devices[EPD_MAX_DEVICES];
            Epd__V1__Device *device_list[EPD_MAX_DEVICES];
        } hello_reply;
        Epd__V1__GroupReply group_reply;
        Epd__V1__BufferReply buffer_reply;
        Epd__V1__PlanReply plan_reply;
        Epd__V1__DocumentReply document_reply;
        Epd__V1__Closed closed;
    };
};

/* wire_read_hello(wire, arena, message, error): fills the member of the kind, which it zeroes first, and
 * refuses only what has no room there. wire_write_hello(message, wire, error): the message has passed
 * codec_check. */
#define WIRE_DECLARE(kind, body, name, side)                                                                 \
    EPD_MUST_CHECK enum epd_status wire_read_##name(const Epd__V1__Datagram *datagram, struct arena *arena,  \
                                                    struct message *message, struct epd_error *error);       \
    EPD_MUST_CHECK enum epd_status wire_write_##name(const struct message *message, struct wire *wire,       \
                                                     struct epd_error *error);
WIRE_TABLE(WIRE_DECLARE)
#undef WIRE_DECLARE

/* codec_encode without the check. */
EPD_MUST_CHECK enum epd_status wire_encode(const struct message *message, void *datagram, size_t *bytes,
                                           struct epd_error *error);

/* The same bytes for a launch with request_id 0, quickly. Returns how many; 64 are enough room. */
size_t wire_encode_launch(const struct message_launch *launch, void *datagram);

/* Copies exactly want bytes. */
EPD_MUST_CHECK enum epd_status wire_get_bytes(const ProtobufCBinaryData *from, uint8_t *to, size_t want,
                                              const char *field, struct epd_error *error);
/* Copies a text shorter than room and terminates it; refuses a zero inside. */
EPD_MUST_CHECK enum epd_status wire_get_text(const ProtobufCBinaryData *from, char *to, size_t room,
                                             const char *field, struct epd_error *error);
ProtobufCBinaryData wire_put_bytes(const uint8_t *from, size_t bytes);
ProtobufCBinaryData wire_put_text(const char *from);

/* Checks every range of a message that depends on nothing but the message; EPD_PROTOCOL with a text. */
EPD_MUST_CHECK enum epd_status codec_check(const struct message *message, struct epd_error *error);

#endif
