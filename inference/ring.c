/* Hands a packed block to a GPU's streams: see _Ring in cuda_link.py. Five calls of CUDA's driver, which Python made in 28 us.

The driver is whoever opened it; nothing of CUDA is needed to compile this. */

#include <stddef.h>
#include <stdint.h>

typedef struct {
    int (*copy)(uint64_t, const void *, size_t, void *);
    int (*record)(void *, void *);
    int (*wait)(void *, void *, unsigned);
    int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
    void *copying, *unpacking;      /* streams */
    const uint64_t *buffer;         /* [count] addresses on the device */
    void *const *arrived, *const *free; /* events of each buffer, and of both halves */
    void *kernel;
    uint64_t *arguments;            /* the first two are where from and where to */
    void **places;                  /* of the arguments */
    int count;
    unsigned tiles, threads, shared;
} ring_t;

/* The turn-th buffer's turn. Returns the driver's status, 0 for success. */
int ring_bring(const ring_t *ring, int turn, void *target, const void *packed, long nbytes) {
    int half = ring->count / 2, next = (turn + 1) % ring->count, status = 0;
    if (turn % half == 0 && (status = ring->wait(ring->copying, ring->free[turn / half], 0))) return status;
    if ((status = ring->copy(ring->buffer[turn], packed, (size_t)nbytes, ring->copying))) return status;
    if ((status = ring->record(ring->arrived[turn], ring->copying))) return status;
    if ((status = ring->wait(ring->unpacking, ring->arrived[turn], 0))) return status;
    ring->arguments[0] = ring->buffer[turn];
    ring->arguments[1] = (uint64_t)target;
    status = ring->launch(ring->kernel, ring->tiles, 1, 1, ring->threads, 1, 1, ring->shared, ring->unpacking, ring->places, NULL);
    if (!status && next % half == 0) status = ring->record(ring->free[turn / half], ring->unpacking);
    return status;
}
