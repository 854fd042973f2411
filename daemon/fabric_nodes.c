#include "daemon/fabric_nodes.h"

#include <stdio.h>

void fabric_nodes_name(uint64_t nodes, char *text, size_t bytes)
{
    size_t length = 0;
    text[0] = 0;
    for (unsigned node = 0; node < 64 && length < bytes; node++)
        if (nodes >> node & 1)
            length += (size_t)snprintf(text + length, bytes - length, " %u", node);
}
