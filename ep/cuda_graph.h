/* Work of a queue, recorded once and replayed: a CUDA graph. Lane thread. */
#ifndef EPD_EP_CUDA_GRAPH_H
#define EPD_EP_CUDA_GRAPH_H

#include "ep/backend.h"

EPD_MUST_CHECK enum epd_status cuda_graph_begin(struct backend_queue *queue, struct epd_error *error);
/* graph NULL: what was recorded is thrown away. */
EPD_MUST_CHECK enum epd_status cuda_graph_end(struct backend_queue *queue, struct backend_graph **graph,
                                              struct epd_error *error);
EPD_MUST_CHECK enum epd_status cuda_graph_launch(struct backend_queue *queue, struct backend_graph *graph,
                                                 struct epd_error *error);
/* Once the queues have passed its last launch. */
void cuda_graph_destroy(struct backend_device *device, struct backend_graph *graph);

#endif
