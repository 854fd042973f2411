#include "progress.h"

#include <stdio.h>
#include <time.h>

static double now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

void progress_init(struct progress *progress, const struct settings *settings, const char *who)
{
    *progress = (struct progress){.settings = settings, .who = who, .last_s = now_s()};
}

void progress_step(struct progress *progress, uint32_t step, double loss)
{
    const struct settings *settings = progress->settings;
    progress->n_steps++;
    if (step != 0 && (step + 1) % settings->report_steps != 0 && step + 1 != settings->n_steps)
        return;
    const double seconds = now_s() - progress->last_s;
    const double n_tokens = (double)progress->n_steps * settings->n_tokens * settings->n_ranks;
    printf("%s  step %5u / %u   loss %7.4f   %8.0f tokens/s\n", progress->who, step + 1, settings->n_steps,
           loss, n_tokens / (seconds > 0 ? seconds : 1e-9));
    fflush(stdout);
    progress->last_s = now_s();
    progress->n_steps = 0;
}
