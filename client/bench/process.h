/* What /proc says about another process of ours. */
#ifndef EPD_BENCH_PROCESS_H
#define EPD_BENCH_PROCESS_H

#include <epd.h>
#include <sys/types.h>

struct process_use {
    double anon_bytes; /* resident memory of its own */
    double page_bytes; /* session pages that it maps: whole, they are allocated from the start */
    double cpu_ns;     /* processor time of all its threads so far */
    double n_fds;
};

enum epd_status process_read(pid_t pid, struct process_use *use);
/* The parent's pid; 0 if unknown. */
pid_t process_parent(pid_t pid);

#endif
