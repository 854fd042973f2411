/* NCCL and the streams of rails as one node sees them, without either: how far the other nodes and the library come is
 * said by the test, and what is left over is counted. Takes the place of ep/nccl_library.c and ep/cuda_rail.c.
 *
 * What the real ones were seen to do is kept: a communicator begins and finishes in the background, ends on a thread that
 * inherits the name of its caller, and an id is a listener until all have come for it, or one alone. What would crash or
 * hang them ends the test: a stream that goes while a swap is in it, a call on what has gone. */
#ifndef EPD_TESTS_UNIT_EP_FAKE_NCCL_H
#define EPD_TESTS_UNIT_EP_FAKE_NCCL_H

#include <stdatomic.h>
#include <stdint.h>

/* Answers of the library (enum nccl_result) and steps that it does, or does not do yet; any thread. */
struct fake_nccl {
    /* 1: done as soon as it is asked for; 0: not yet. */
    _Atomic int meets;    /* the other nodes come */
    _Atomic int takes;    /* swaps get into their streams */
    _Atomic int answers;  /* the other nodes swap */
    _Atomic int leaves;   /* swaps leave their streams when they are told to */
    _Atomic int finishes; /* what was sent last is handed over */
    /* 0, or what a call says instead. */
    _Atomic int id_result, send_result, async_result;
    _Atomic int begin_result; /* once */
    _Atomic int no_channels, no_memory, stream_lost;
    _Atomic int go_ms; /* that an end takes, on its thread */

    /* Now. */
    _Atomic int n_ids, n_comms, n_rails, n_channels, n_connecting;
    /* Ever. */
    _Atomic int n_swaps, n_aborts, n_destroys, n_shrinks;
    _Atomic uint64_t sent_bytes, received_bytes;
    /* Runs before a communicator ends; not where one that is busy is aborted. May be NULL. */
    void (*_Atomic on_end)(void);
    /* What a swap sends, and then takes: to be looked at, and to be filled in. Lane thread; may be NULL. */
    void (*_Atomic on_send)(const void *data, uint64_t bytes);
    void (*_Atomic on_receive)(void *data, uint64_t bytes);
    struct CUstream_st *queue_stream; /* of every queue, where there is one; the test's */
};

extern struct fake_nccl fake_nccl;

/* Everything goes well, nothing is there. */
void fake_nccl_reset(void);
/* Nothing is left; n_first: communicators that stay with their device. */
void fake_nccl_expect_clean(int n_first);
/* A stream of no rail; nothing that was put there may be in it when it goes. */
struct CUstream_st *fake_stream_create(void);
void fake_stream_destroy(struct CUstream_st *stream);
/* 1 if all that was put there is done. */
int fake_stream_passed(const struct CUstream_st *stream);

#endif
