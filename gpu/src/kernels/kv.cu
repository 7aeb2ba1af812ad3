// Paged KV to contiguous blocks and back.
//
// grid:  x  pieces of a page     y  page of the plan     z  layer and half (K or V)
//
// Each thread moves words of one page of one layer, one of K and V. Words are 16, 4 or 1 bytes, the widest
// that divides every stride and address (chosen by the host). `flat` pages have the block's order already,
// others are transposed row by row; either way the block side is written or read in order.
//
// Written in the subset that C and CUDA share, so that a test can compile it for the host and run it
// under a stub driver. The bytes moved are those of CopyPlan::runs.

#ifdef __cplusplus
#define TERRACE_KERNEL extern "C" __global__ void
#else
#define TERRACE_KERNEL void
#endif

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

// As `Shape` in cuda.rs, field by field.
typedef struct {
    u64 kv_stride;     // bytes, K to V of a page
    u64 page_stride;   // bytes, page to page
    u64 token_stride;  // bytes, token to token in a page
    u64 head_stride;   // bytes, head to head at a token
    u64 page_bytes;    // bytes of one page of one layer, one of K and V
    u64 block_stride;  // bytes, block to block
    u32 kv;            // 1 or 2
    u32 pages_per_block;
    u32 heads;
    u32 row_words;     // words per head and token
    u32 page_words;    // words per page
    u32 flat;          // pages have the block's order
} Shape;

#define MOVE(NAME, WORD, TO_BLOCK)                                                                  \
    TERRACE_KERNEL NAME(const u64 *layers, const u32 *pages, u8 *blocks, Shape shape) {            \
        u32 index = blockIdx.y, plane = blockIdx.z;                                                \
        u32 block = index / shape.pages_per_block, within = index % shape.pages_per_block;         \
        u8 *page = (u8 *)layers[plane / shape.kv] + (plane % shape.kv) * shape.kv_stride +         \
                   pages[index] * shape.page_stride;                                               \
        WORD *place = (WORD *)(blocks + block * shape.block_stride +                               \
                               ((u64)plane * shape.pages_per_block + within) * shape.page_bytes);  \
        u32 step = gridDim.x * blockDim.x;                                                         \
        for (u32 w = blockIdx.x * blockDim.x + threadIdx.x; w < shape.page_words; w += step) {     \
            u64 at = (u64)w * sizeof(WORD);                                                        \
            if (!shape.flat) {                                                                     \
                u32 row = w / shape.row_words;                                                     \
                at = (row / shape.heads) * shape.token_stride +                                    \
                     (row % shape.heads) * shape.head_stride +                                     \
                     (u64)(w % shape.row_words) * sizeof(WORD);                                    \
            }                                                                                      \
            WORD *paged = (WORD *)(page + at);                                                     \
            if (TO_BLOCK) {                                                                        \
                place[w] = *paged;                                                                 \
            } else {                                                                               \
                *paged = place[w];                                                                 \
            }                                                                                      \
        }                                                                                          \
    }

MOVE(terrace_gather_16, uint4, 1)
MOVE(terrace_gather_4, u32, 1)
MOVE(terrace_gather_1, u8, 1)
MOVE(terrace_scatter_16, uint4, 0)
MOVE(terrace_scatter_4, u32, 0)
MOVE(terrace_scatter_1, u8, 0)
