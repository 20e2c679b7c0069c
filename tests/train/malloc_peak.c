/* The truth that the measuring is held to: every byte the heap of this process hands out.
 *
 * Preloaded, it stands before glibc's allocator, keeps the sum of the usable sizes of all live
 * blocks and the highest sum since the last reset. glibc only.
 *
 *     cc -O2 -shared -fPIC malloc_peak.c -o malloc_peak.so
 */
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdlib.h>

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *block, size_t size);
void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *block);

static _Atomic long long live_bytes;
static _Atomic long long peak_bytes;

static void *grown(void *block) {
    if (block == NULL) return NULL;
    long long size = (long long)malloc_usable_size(block);
    long long level = atomic_fetch_add(&live_bytes, size) + size;
    long long highest = atomic_load(&peak_bytes);
    /* A failed exchange reloads `highest`: another thread was faster. */
    while (level > highest && !atomic_compare_exchange_weak(&peak_bytes, &highest, level)) continue;
    return block;
}

static void shrunk(void *block) {
    if (block != NULL) atomic_fetch_sub(&live_bytes, (long long)malloc_usable_size(block));
}

void *malloc(size_t size) { return grown(__libc_malloc(size)); }

void *calloc(size_t count, size_t size) { return grown(__libc_calloc(count, size)); }

void *memalign(size_t alignment, size_t size) { return grown(__libc_memalign(alignment, size)); }

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **block, size_t alignment, size_t size) {
    void *made = memalign(alignment, size);
    if (made == NULL) return ENOMEM;
    *block = made;
    return 0;
}

void *realloc(void *block, size_t size) {
    shrunk(block);
    void *moved = __libc_realloc(block, size);
    /* Refused: the old block stays. With size 0 it is gone and nothing took its place. */
    if (moved == NULL) return size == 0 ? NULL : (grown(block), NULL);
    return grown(moved);
}

void free(void *block) {
    shrunk(block);
    __libc_free(block);
}

long long heap_level(void) { return atomic_load(&live_bytes); }

long long heap_peak(void) { return atomic_load(&peak_bytes); }

void heap_reset(void) { atomic_store(&peak_bytes, atomic_load(&live_bytes)); }
