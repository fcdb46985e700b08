/* Memory of each thread for the blocks that a product or attention packs, kept for the next call: mapping it anew each
   time costs as much as using it. Every file that includes this has its own. */

#pragma once

#include <stddef.h>
#include <stdlib.h>

static _Thread_local void *kept;
static _Thread_local size_t kept_bytes;

/* At least so many bytes, on a cache line; 0 when there are none. What was there before is lost. */
static void *room(size_t bytes) {
    if (bytes > kept_bytes) {
        free(kept);
        kept_bytes = bytes;
        if (posix_memalign(&kept, 64, bytes)) kept_bytes = 0, kept = 0;
    }
    return kept;
}
