/* The [fabric] section, resolved: what the configuration says, and where it says nothing the environment of a launcher
 * (Slurm, torchrun, or one that sets NNODES, NODE_RANK and MASTER_ADDR). Value type. */
#ifndef EPD_DAEMON_FABRIC_CONFIG_H
#define EPD_DAEMON_FABRIC_CONFIG_H

#include "daemon/config.h"
#include "daemon/fabric_auth.h"

#define FABRIC_DEFAULT_PORT "7741"

struct fabric_config {
    uint32_t n_nodes, node; /* n_nodes 1: no fabric */
    char host[CONFIG_TEXT_BYTES], port[16];
    char rendezvous[CONFIG_TEXT_BYTES + 24]; /* "host:port", "[::1]:7741": to be shown */
    uint8_t key[FABRIC_KEY_BYTES];
};

/* Reads the secret too. Errors name the key or the variable. */
EPD_MUST_CHECK enum epd_status fabric_config_resolve(const struct config *config,
                                                     struct fabric_config *fabric, struct epd_error *error);
/* "host:port", "host", "[::1]:port", "[::1]", "::1" -> host and port. */
EPD_MUST_CHECK enum epd_status fabric_config_split(const char *given, struct fabric_config *fabric,
                                                   struct epd_error *error);
/* The first host of a Slurm node list: "gpu[07-09,12]-ib,x" -> "gpu07-ib". */
EPD_MUST_CHECK enum epd_status fabric_config_first_host(const char *list, char *host, size_t bytes,
                                                        struct epd_error *error);

#endif
