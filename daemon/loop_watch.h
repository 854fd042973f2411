/* Whether the loop of another process still comes round: it is asked at intervals and answers from its loop. What counts is
 * time in which the asker ran itself: a machine that was suspended, or stopped with everything on it, accuses nobody. Value
 * type without a clock; its caller looks at the times that it is told. */
#ifndef EPD_DAEMON_LOOP_WATCH_H
#define EPD_DAEMON_LOOP_WATCH_H

#include <stdint.h>

/* A question is put this often, or four times within the limit if that is more often. */
#define LOOP_WATCH_ASK_MS 5000
/* While one is open it is looked at this often, or sixteen times within the limit. */
#define LOOP_WATCH_LOOK_MS 1000

enum loop_watch_word {
    LOOP_WATCH_FINE = 0,
    LOOP_WATCH_ASK, /* put the question, then loop_watch_asked; if it cannot be put, that time counts all the same */
    LOOP_WATCH_SUSPECT, /* half of the limit has passed; said once */
    LOOP_WATCH_STUCK,   /* all of it */
};

struct loop_watch {
    uint64_t limit_ns;  /* 0: not watched */
    uint64_t at_ns;     /* the next look */
    uint64_t looked_ns; /* the last one while a question is open; 0: none is */
    uint64_t waited_ns; /* for the answer, without what was not ours */
    int asked, suspected;
};

/* From now on, with no question open. limit_ms 0: does not watch. */
void loop_watch_start(struct loop_watch *watch, uint64_t limit_ms, uint64_t now_ns);
/* Another limit; a question stays open. */
void loop_watch_limit(struct loop_watch *watch, uint64_t limit_ms, uint64_t now_ns);
/* What is to be done at this time. */
enum loop_watch_word loop_watch_look(struct loop_watch *watch, uint64_t now_ns);
void loop_watch_asked(struct loop_watch *watch);
void loop_watch_answered(struct loop_watch *watch, uint64_t now_ns);
/* The time since the last look is not the loop's fault (a debugger holds it, its core is being written). */
void loop_watch_excuse(struct loop_watch *watch, uint64_t now_ns);

#endif
