/* Bounds of the wire and of what one peer may make the other hold. Every count from a peer is checked against one of
 * these at decode, before anything is allocated for it. */
#ifndef EPD_PROTO_LIMITS_H
#define EPD_PROTO_LIMITS_H

#define EPD_PROTOCOL_MAJOR 1
#define EPD_PROTOCOL_MINOR 0

#define EPD_MAX_DATAGRAM_BYTES     65536        /* one message */
#define EPD_MAX_ARENA_BYTES        (256 * 1024) /* what unpacking one datagram may take */
#define EPD_MAX_NAME_BYTES         64           /* group, client and device names, zero included */
#define EPD_MAX_BINDINGS           2200         /* of one plan: two weight lists of 1024 parts and the rest */
#define EPD_MAX_TENSORS            128 /* of one plan, as the wire counts them: a run of list parts is one tensor */
#define EPD_MAX_REPEATS            65536 /* launches announced by one message */
#define EPD_MAX_LOCAL_EXPERTS      1024
#define EPD_MAX_TOP_K              32
#define EPD_MAX_DEVICES            16
#define EPD_MAX_WORLD_SIZE         64
#define EPD_MAX_NODES              64   /* of a fabric */
#define EPD_MAX_RAIL_ADDRESS_BYTES 1024 /* where one rank's rail listens */
#define EPD_MAX_HIDDEN             (1u << 20)
#define EPD_MAX_FFN                (1u << 20)
#define EPD_MAX_TOKENS             (1u << 24) /* per rank and step */
#define EPD_MAX_ALIGNMENT          4096
#define EPD_UUID_BYTES             16
#define EPD_BOOT_ID_BYTES          16
#define EPD_IPC_HANDLE_BYTES       64

#endif
