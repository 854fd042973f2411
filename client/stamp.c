#include "client/stamp.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static size_t stamp_bytes(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

enum epd_status stamp_init(struct stamp *stamp, struct epd_error *error)
{
    void *page = mmap(NULL, stamp_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (page == MAP_FAILED)
        return error_set(error, EPD_NO_MEMORY, "client: mmap of %zu bytes: %s", stamp_bytes(),
                         strerror(errno));
    stamp->word = page;
    stamp->wipes = madvise(page, stamp_bytes(), MADV_WIPEONFORK) == 0;
    *stamp->word = getpid();
    return EPD_OK;
}

void stamp_fini(struct stamp *stamp)
{
    munmap(stamp->word, stamp_bytes());
}

int stamp_is_mine(const struct stamp *stamp)
{
    return stamp->wipes ? *stamp->word != 0 : *stamp->word == getpid();
}
