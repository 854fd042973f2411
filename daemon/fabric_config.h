/* The [fabric] section, resolved: what the configuration says, and where it says nothing the environment of a launcher
 * (Slurm, or one that sets NNODES, GROUP_RANK and MASTER_ADDR). Value type. */
#ifndef EPD_DAEMON_FABRIC_CONFIG_H
#define EPD_DAEMON_FABRIC_CONFIG_H

#include "daemon/config.h"
#include "daemon/fabric_auth.h"

#define FABRIC_DEFAULT_PORT "7741"

struct fabric_config {
    uint32_t n_nodes, node; /* n_nodes 1: no fabric */
    char host[CONFIG_TEXT_BYTES], port[16];
    uint8_t key[FABRIC_KEY_BYTES];
};

/* Reads the secret too. Errors name the key or the variable. */
EPD_MUST_CHECK enum epd_status fabric_config_resolve(const struct config *config,
                                                     struct fabric_config *fabric, struct epd_error *error);
/* The first host of a Slurm node list: "gpu[07-09,12],x" -> "gpu07". */
EPD_MUST_CHECK enum epd_status fabric_config_first_host(const char *list, char *host, size_t bytes,
                                                        struct epd_error *error);

#endif
