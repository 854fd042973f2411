#include "ep/cuda_graph.h"

#include <stdlib.h>

#include "ep/backend_cuda.h"

struct backend_graph {
    cudaGraphExec_t exec;
};

/* Calls of other lanes on their own streams are none of this recording's business. */
enum epd_status cuda_graph_begin(struct backend_queue *queue, struct epd_error *error)
{
    return cuda_runtime_check(
        cudaStreamBeginCapture(cuda_queue_stream(queue), cudaStreamCaptureModeThreadLocal), "graph", error);
}

static enum epd_status instantiate(cudaGraph_t recorded, struct backend_graph **graph,
                                   struct epd_error *error)
{
    struct backend_graph *created = calloc(1, sizeof *created);
    if (!created)
        return error_set(error, EPD_NO_MEMORY, "graph: %zu bytes", sizeof *created);
    if (cuda_runtime_check(cudaGraphInstantiate(&created->exec, recorded, 0), "graph", error)) {
        free(created);
        return error->status;
    }
    *graph = created;
    return EPD_OK;
}

enum epd_status cuda_graph_end(struct backend_queue *queue, struct backend_graph **graph,
                               struct epd_error *error)
{
    cudaGraph_t recorded = NULL;
    cudaError_t result = cudaStreamEndCapture(cuda_queue_stream(queue), &recorded);
    if (!graph && result != cudaSuccess)
        (void)cudaGetLastError(); /* a recording that failed has ended all the same */
    if (graph && cuda_runtime_check(result, "graph", error))
        return error->status;
    enum epd_status status = graph ? instantiate(recorded, graph, error) : EPD_OK;
    if (recorded)
        (void)cudaGraphDestroy(recorded);
    return status;
}

enum epd_status cuda_graph_launch(struct backend_queue *queue, struct backend_graph *graph,
                                  struct epd_error *error)
{
    return cuda_runtime_check(cudaGraphLaunch(graph->exec, cuda_queue_stream(queue)), "graph", error);
}

static void graph_end(struct backend_device *device, void *arg)
{
    struct backend_graph *graph = arg;
    (void)device;
    (void)cudaGraphExecDestroy(graph->exec);
    free(graph);
}

void cuda_graph_destroy(struct backend_device *device, struct backend_graph *graph)
{
    cuda_defer(device, 0, graph_end, graph);
}
