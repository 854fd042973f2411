/* The script that fabric_seed writes and fabric_fuzz plays: a way, then parts, each a byte that says how, a length (2
 * bytes, little endian) and so many bytes; the last may be cut short. */
#ifndef EPD_TESTS_FUZZ_FABRIC_PARTS_H
#define EPD_TESTS_FUZZ_FABRIC_PARTS_H

#include <stddef.h>
#include <stdint.h>

enum fabric_way {
    FABRIC_WAY_MESSAGES,
    FABRIC_WAY_STRANGER,
    FABRIC_WAY_IMPOSTOR,
    FABRIC_WAY_MEMBER,
    FABRIC_WAY_COUNT,
};

/* `how` of a member's part, modulo 4; what is not named is marked. */
#define FABRIC_FRAME_MARKED 0
#define FABRIC_FRAME_FORGED 2
#define FABRIC_FRAME_RAW    3

/* From here on all deadlines pass before the message; `how` modulo 3 is its node either way. */
#define FABRIC_HOW_LATE 240

struct fabric_script {
    const uint8_t *data; /* borrowed */
    size_t left;
};

struct fabric_part {
    uint8_t how;
    const uint8_t *data; /* borrowed from the script */
    size_t bytes;
};

/* 0 at the end. */
static inline int fabric_part_take(struct fabric_script *script, struct fabric_part *part)
{
    if (script->left < 3)
        return 0;
    const size_t wanted = (size_t)script->data[1] | (size_t)script->data[2] << 8, there = script->left - 3;
    *part = (struct fabric_part){script->data[0], script->data + 3, wanted < there ? wanted : there};
    script->data += 3 + part->bytes;
    script->left -= 3 + part->bytes;
    return 1;
}

#endif
