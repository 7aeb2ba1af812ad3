// A CUDA driver in host memory, for tests of the code that calls one. There is no GPU behind it.
//
// It is strict where a real driver is lenient: work is done as late as it may be (when somebody waits, or
// one operation per query), memory that is freed is gone at once, every call needs a current context, and
// a module must name the kernels it is asked for. Kernels run from the very source, src/kernels/kv.cu.

#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned x, y, z; } Dimensions;
typedef struct { unsigned x, y, z, w; } uint4;
static Dimensions blockIdx, blockDim, gridDim, threadIdx;

#include "../../src/kernels/kv.cu"

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_CONTEXT = 201,
    UNSUPPORTED_PTX = 222,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    DEVICE_ORDINAL = 9,
};

#define TOTAL_BYTES ((size_t)1 << 30)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread void *current;
static int context;
static size_t used_bytes;

typedef void (*KernelFn)(const u64 *, const u32 *, u8 *, Shape);
typedef struct Stream Stream;
typedef struct { Stream *stream; uint64_t at; } Event;
typedef struct {
    enum { COPY, KERNEL, WAIT } kind;
    void *to;
    const void *from;
    size_t length;
    KernelFn kernel;
    Dimensions grid, block;
    const u64 *layers;
    const u32 *pages;
    u8 *blocks;
    Shape shape;
    Event event;
} Op;
struct Stream { Op *ops; uint64_t done, queued, capacity; };

static void run_until(Stream *stream, uint64_t until);

// The default stream, known as null.
static Stream default_stream;
static Stream *known(Stream *stream) { return stream ? stream : &default_stream; }

static void run(Op *op) {
    if (op->kind == COPY) {
        memcpy(op->to, op->from, op->length);
    } else if (op->kind == WAIT) {
        run_until(op->event.stream, op->event.at);
    } else {
        gridDim = op->grid;
        blockDim = op->block;
        for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
            for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
                for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
                    for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)
                        op->kernel(op->layers, op->pages, op->blocks, op->shape);
    }
}

static void run_until(Stream *stream, uint64_t until) {
    while (stream && stream->done < until) {
        Op op = stream->ops[stream->done++];
        run(&op);
    }
}

static int enqueue(Stream *stream, Op op) {
    if (!current) return INVALID_CONTEXT;
    stream = known(stream);
    pthread_mutex_lock(&lock);
    if (stream->queued == stream->capacity) {
        stream->capacity = stream->capacity ? stream->capacity * 2 : 64;
        stream->ops = realloc(stream->ops, stream->capacity * sizeof(Op));
    }
    stream->ops[stream->queued++] = op;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

#ifdef WITHOUT_DEVICE
int cuInit(unsigned flags) { return NO_DEVICE; }
#else
int cuInit(unsigned flags) { return SUCCESS; }
#endif
int cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, length, "stub driver (no GPU)");
    return SUCCESS;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = TOTAL_BYTES; return SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 0; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **ctx, int device) { *ctx = &context; return SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
int cuCtxGetCurrent(void **ctx) { *ctx = current; return SUCCESS; }
int cuCtxSetCurrent(void *ctx) { current = ctx; return SUCCESS; }
int cuCtxSynchronize(void) { return current ? SUCCESS : INVALID_CONTEXT; }
int cuGetErrorName(int error, const char **name) { *name = "STUB_ERROR"; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { *text = "the stub says no"; return SUCCESS; }

static void note(uintptr_t start, size_t bytes);
static void forget(uintptr_t start);
// Each allocation carries its length in front, 256 bytes wide to keep CUDA's alignment.
int cuMemAlloc_v2(uintptr_t *address, size_t bytes) {
    if (!current) return INVALID_CONTEXT;
    pthread_mutex_lock(&lock);
    int refused = bytes > TOTAL_BYTES - used_bytes;
    if (!refused) used_bytes += bytes;
    pthread_mutex_unlock(&lock);
    if (refused) return OUT_OF_MEMORY;
    char *base = aligned_alloc(256, (bytes + 511) / 256 * 256);
    *(size_t *)base = bytes;
    memset(base + 256, 0xdd, bytes);
    *address = (uintptr_t)base + 256;
    pthread_mutex_lock(&lock);
    note(*address, bytes);
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}
int cuMemFree_v2(uintptr_t address) {
    if (!current) return INVALID_CONTEXT;
    char *base = (char *)address - 256;
    pthread_mutex_lock(&lock);
    used_bytes -= *(size_t *)base;
    forget(address);
    pthread_mutex_unlock(&lock);
    memset(base + 256, 0xee, *(size_t *)base);
    free(base);
    return SUCCESS;
}
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    if (!current) return INVALID_CONTEXT;
    *free_bytes = TOTAL_BYTES - used_bytes;
    *total = TOTAL_BYTES;
    return SUCCESS;
}
int cuMemsetD8_v2(uintptr_t address, unsigned char value, size_t bytes) {
    memset((void *)address, value, bytes);
    return SUCCESS;
}

// As far as the stub knows, an address is its own if it came from it: allocations are 256-aligned and carry
// their length in front, but a pointer may lie inside one, so they are looked up in a table.
#define MAX_ALLOCATIONS 4096
static struct { uintptr_t start; size_t bytes; } allocations[MAX_ALLOCATIONS];
static void note(uintptr_t start, size_t bytes) {
    for (int i = 0; i < MAX_ALLOCATIONS; i++)
        if (!allocations[i].start) {
            allocations[i].start = start;
            allocations[i].bytes = bytes;
            return;
        }
}
static void forget(uintptr_t start) {
    for (int i = 0; i < MAX_ALLOCATIONS; i++)
        if (allocations[i].start == start) allocations[i].start = 0;
}
int cuPointerGetAttribute(void *value, int attribute, uintptr_t address) {
    if (!current) return INVALID_CONTEXT;
    if (attribute != DEVICE_ORDINAL) return INVALID_VALUE;
    int found = INVALID_VALUE;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MAX_ALLOCATIONS; i++)
        if (allocations[i].start && address >= allocations[i].start &&
            address < allocations[i].start + allocations[i].bytes) {
            *(int *)value = 0;
            found = SUCCESS;
        }
    pthread_mutex_unlock(&lock);
    return found;
}

static void *registered[64];
int cuMemHostRegister_v2(void *base, size_t bytes, unsigned flags) {
    if (!current) return INVALID_CONTEXT;
    for (int i = 0; i < 64; i++)
        if (registered[i] == base) return ALREADY_REGISTERED;
    for (int i = 0; i < 64; i++)
        if (!registered[i]) { registered[i] = base; return SUCCESS; }
    return OUT_OF_MEMORY;
}
int cuMemHostUnregister(void *base) {
    for (int i = 0; i < 64; i++)
        if (registered[i] == base) { registered[i] = NULL; return SUCCESS; }
    return NOT_REGISTERED;
}

static int copy(void *to, const void *from, size_t bytes, Stream *stream) {
    return enqueue(stream, (Op){.kind = COPY, .to = to, .from = from, .length = bytes});
}
int cuMemcpyHtoDAsync_v2(uintptr_t to, const void *from, size_t bytes, Stream *stream) {
    return copy((void *)to, from, bytes, stream);
}
int cuMemcpyDtoHAsync_v2(void *to, uintptr_t from, size_t bytes, Stream *stream) {
    return copy(to, (void *)from, bytes, stream);
}
int cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, Stream *stream) {
    return copy((void *)to, (void *)from, bytes, stream);
}

int cuStreamCreate(Stream **stream, unsigned flags) {
    if (!current) return INVALID_CONTEXT;
    *stream = calloc(1, sizeof(Stream));
    return SUCCESS;
}
int cuStreamSynchronize(Stream *stream) {
    pthread_mutex_lock(&lock);
    run_until(stream, stream->queued);
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}
// Events of a stream may outlive it, so it is emptied and not freed.
int cuStreamDestroy_v2(Stream *stream) { return cuStreamSynchronize(stream); }
int cuStreamWaitEvent(Stream *stream, Event *event, unsigned flags) {
    return enqueue(stream, (Op){.kind = WAIT, .event = *event});
}

int cuEventCreate(Event **event, unsigned flags) {
    if (!current) return INVALID_CONTEXT;
    *event = calloc(1, sizeof(Event));
    return SUCCESS;
}
int cuEventRecord(Event *event, Stream *stream) {
    pthread_mutex_lock(&lock);
    stream = known(stream);
    *event = (Event){stream, stream->queued};
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}
int cuEventQuery(Event *event) {
    pthread_mutex_lock(&lock);
    Stream *stream = event->stream;
    int done = !stream || stream->done >= event->at;
    if (!done) run_until(stream, stream->done + 1);
    pthread_mutex_unlock(&lock);
    return done ? SUCCESS : NOT_READY;
}
int cuEventSynchronize(Event *event) {
    pthread_mutex_lock(&lock);
    run_until(event->stream, event->at);
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}
int cuEventDestroy_v2(Event *event) { free(event); return SUCCESS; }

#ifdef REFUSES_PTX
int cuModuleLoadData(char **module, const char *image) { return UNSUPPORTED_PTX; }
#else
int cuModuleLoadData(char **module, const char *image) {
    *module = strdup(image);
    return SUCCESS;
}
#endif
int cuModuleGetFunction(KernelFn *function, const char *module, const char *name) {
    static const struct { const char *name; KernelFn kernel; } kernels[] = {
        {"terrace_gather_16", terrace_gather_16}, {"terrace_gather_4", terrace_gather_4},
        {"terrace_gather_1", terrace_gather_1},   {"terrace_scatter_16", terrace_scatter_16},
        {"terrace_scatter_4", terrace_scatter_4}, {"terrace_scatter_1", terrace_scatter_1},
    };
    char entry[128];
    snprintf(entry, sizeof entry, ".visible .entry %s(", name);
    if (!strstr(module, entry)) return NOT_FOUND;
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (!strcmp(kernels[i].name, name)) { *function = kernels[i].kernel; return SUCCESS; }
    return NOT_FOUND;
}

#ifndef WITHOUT_LAUNCH
int cuLaunchKernel(KernelFn kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, Stream *stream, void **parameters, void **extra) {
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || bx > 1024) return INVALID_VALUE;
    return enqueue(stream, (Op){
        .kind = KERNEL,
        .kernel = kernel,
        .grid = {gx, gy, gz},
        .block = {bx, by, bz},
        .layers = *(const u64 **)parameters[0],
        .pages = *(const u32 **)parameters[1],
        .blocks = *(u8 **)parameters[2],
        .shape = *(Shape *)parameters[3],
    });
}
#endif
