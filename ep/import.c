#include "ep/import.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

/* As linux/magic.h has it. */
#define HUGETLBFS_MAGIC 0x958458f6

/* What a client punches out of such a file, the kernel may have no page for when it is touched next: SIGBUS, whatever the
 * seals say. */
static enum epd_status refuse_huge_pages(int fd, struct epd_error *error)
{
    struct statfs fs;
    if (fstatfs(fd, &fs) < 0)
        return error_set(error, EPD_SYSTEM, "imported memfd: fstatfs: %s", strerror(errno));
    if ((unsigned long)fs.f_type == HUGETLBFS_MAGIC)
        return error_set(error, EPD_INVALID_ARGUMENT, "imported memfd is made of huge pages (MFD_HUGETLB)");
    return EPD_OK;
}

/* Seals first, size after: what is sealed against shrinking stays at least as large as it is measured then.
 */
static enum epd_status import_check(int fd, uint64_t offset, uint64_t bytes, struct stat *file,
                                    struct epd_error *error)
{
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0)
        return error_set(error, EPD_INVALID_ARGUMENT, "imported fd is not a memfd: %s", strerror(errno));
    if (!(seals & F_SEAL_SHRINK))
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "imported memfd has seals 0x%x, want F_SEAL_SHRINK (0x%x) among them",
                         (unsigned)seals, (unsigned)F_SEAL_SHRINK);
    if (seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE))
        return error_set(error, EPD_INVALID_ARGUMENT, "imported memfd is sealed against writing (seals 0x%x)",
                         (unsigned)seals);
    if (refuse_huge_pages(fd, error))
        return error->status;
    if (fstat(fd, file) < 0)
        return error_set(error, EPD_SYSTEM, "imported memfd: fstat: %s", strerror(errno));
    uint64_t size = file->st_size > 0 ? (uint64_t)file->st_size : 0;
    if (bytes == 0 || offset > size || bytes > size - offset)
        return error_set(error, EPD_OUT_OF_RANGE,
                         "imported memfd: offset %llu bytes %llu, the file has %llu bytes",
                         (unsigned long long)offset, (unsigned long long)bytes, (unsigned long long)size);
    return EPD_OK;
}

static struct import_mapping *import_find(const struct import_cache *cache, const struct stat *file,
                                          uint64_t offset, uint64_t bytes)
{
    for (struct import_mapping *m = cache->first; m; m = m->next)
        if (m->device == file->st_dev && m->inode == file->st_ino && offset >= m->first_byte &&
            offset + bytes <= m->first_byte + m->n_bytes)
            return m;
    return NULL;
}

/* Only the pages of the range: a file may be far larger than what its owner may map here. */
static enum epd_status import_map(struct import_cache *cache, int fd, const struct stat *file,
                                  uint64_t offset, uint64_t bytes, struct import_mapping **mapping,
                                  struct epd_error *error)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t first = offset & ~(page - 1);
    uint64_t n_bytes = (offset + bytes - first + page - 1) & ~(page - 1);
    struct import_mapping *made = calloc(1, sizeof *made);
    if (!made)
        return error_set(error, EPD_NO_MEMORY, "imported memfd: %zu bytes", sizeof *made);
    made->base = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)first);
    if (made->base == MAP_FAILED) {
        error_set(error, errno == ENOMEM ? EPD_NO_MEMORY : EPD_SYSTEM,
                  "imported memfd: mmap of %llu bytes: %s", (unsigned long long)n_bytes, strerror(errno));
        free(made);
        return error->status;
    }
    made->device = file->st_dev;
    made->inode = file->st_ino;
    made->first_byte = first;
    made->n_bytes = n_bytes;
    made->next = cache->first;
    cache->first = made;
    *mapping = made;
    return EPD_OK;
}

enum epd_status import_acquire(struct import_cache *cache, int fd, uint64_t offset, uint64_t bytes,
                               struct import_range *range, struct epd_error *error)
{
    struct stat file;
    if (import_check(fd, offset, bytes, &file, error))
        return error->status;
    uint64_t mapped_bytes = 0;
    struct import_mapping *mapping = import_find(cache, &file, offset, bytes);
    if (!mapping) {
        if (import_map(cache, fd, &file, offset, bytes, &mapping, error))
            return error->status;
        mapped_bytes = mapping->n_bytes;
    }
    mapping->n_imports++;
    *range = (struct import_range){
        .data = mapping->base + (offset - mapping->first_byte),
        .mapping = mapping,
        .mapped_bytes = mapped_bytes,
    };
    return EPD_OK;
}

uint64_t import_release(struct import_cache *cache, struct import_mapping *mapping)
{
    assert(mapping->n_imports > 0);
    if (--mapping->n_imports)
        return 0;
    struct import_mapping **link = &cache->first;
    while (*link != mapping)
        link = &(*link)->next;
    *link = mapping->next;
    uint64_t n_bytes = mapping->n_bytes;
    munmap(mapping->base, n_bytes);
    free(mapping);
    return n_bytes;
}
