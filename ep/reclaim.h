/* What devices give back in quiet moments (quiet.h): memory that CUDA unmaps only when nothing runs. A moment is asked for
 * when a lane has something to give back, and is of all lanes: for what each of them has by then. Loop thread. */
#ifndef EPD_EP_RECLAIM_H
#define EPD_EP_RECLAIM_H

#include "ep/node_impl.h"

/* After jobs have ended. Asks for a moment if there is something to give back and none has been asked for. */
void reclaim_look(struct node *node);

#endif
