// C API of what zoomr-local adds to libllama: paging of KV cells by position, index rows and the probe that
// scores them, and a store in which every KV head keeps its own tokens. Mechanism only: what to page and when is decided by the caller (zoomr_local, in Python).
//
// A zoomr_context belongs to one llama_context and must be freed before it. Calls on one context must not
// overlap, neither with each other nor with llama_decode. Without a zoomr_context the library is stock.
//
// Positions are logical and never change: llama_memory_seq_add, llama_memory_seq_div and context shift must
// not be used on a context that pages; calls here fail with ZOOMR_ERR_SHIFT while a shift is pending.
//
// Unless stated otherwise a function returns a count >= 0, or one of the negative codes below;
// zoomr_last_error() has the sentence.

#pragma once

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

// changed whenever a struct, a signature or the page format below changes
#define ZOOMR_ABI 6

#define ZOOMR_ERR_ARGUMENT    -1
#define ZOOMR_ERR_UNSUPPORTED -2 // the model or its cache cannot be paged
#define ZOOMR_ERR_SPACE       -3 // not enough free cells, or a buffer too small
#define ZOOMR_ERR_DUPLICATE   -4 // a position is resident already
#define ZOOMR_ERR_PAGE        -5 // not a page or snapshot of this cache: wrong magic, geometry, size or contents
#define ZOOMR_ERR_SHIFT       -6 // a position shift is pending
#define ZOOMR_ERR_INTERNAL    -7

#ifdef __cplusplus
extern "C" {
#endif

struct zoomr_context;

struct zoomr_params {
    uint32_t n_rows_max; // index rows to reserve address space for
    uint32_t n_keys_max; // key probe (test oracle): positions a sequence can name, 0: off
    bool     tap_query;  // keep the last token's query of every sequence
};

// what a caller needs to interpret the arrays below
struct zoomr_info {
    uint32_t n_layer;       // paged attention layers, in model order
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t n_embd_head;   // of a key
    uint32_t n_seq_max;
    uint32_t n_rows_max;    // rounded up from the parameter
    uint32_t n_keys_max;
    uint32_t n_stream;
    uint64_t token_bytes;   // K and V of one token over the paged layers
    uint64_t geometry;      // hash of everything that a page's bytes depend on
};

// one kind of buffer of a context, in bytes. without allocation (llama_model_params::no_alloc) what a load would ask for
struct zoomr_memory {
    char     buffer[32];  // the buffer type, "CPU", "CPU_REPACK", "CUDA0", ...
    char     device[32];
    uint64_t weights;
    uint64_t kv;
    uint64_t compute;     // with the logits
    uint64_t index;       // index rows and scores
    bool     in_ram;      // of the host, not of a device of its own
    bool     mappable;    // weights here are read from the mapped file where it is mapped
};

struct zoomr_gpu {
    char     device[32];
    char     description[128];
    uint64_t free;
    uint64_t total;
    bool     shares_ram;
};

// "<ZOOMR_ABI> <engine version>"
LLAMA_API const char * zoomr_version(void);

// the calling thread's last error
LLAMA_API const char * zoomr_last_error(void);

// keeps llama.cpp's log in a ring instead of printing it; tail copies the newest lines, oldest first
LLAMA_API void   zoomr_log_capture(void);
LLAMA_API size_t zoomr_log_tail(char * dst, size_t size, int32_t level_min);

// any context, paged or not: the cells of the (full-attention) KV cache. 0 if there is no such cache
LLAMA_API uint32_t zoomr_kv_size    (const struct llama_context * ctx); // cells of one stream
LLAMA_API uint32_t zoomr_kv_used    (const struct llama_context * ctx); // cells in use, all streams
LLAMA_API uint64_t zoomr_token_bytes(const struct llama_context * ctx); // K and V of one token
LLAMA_API int64_t  zoomr_resident   (const struct llama_context * ctx, llama_seq_id seq, llama_pos * dst, size_t n_max);

// what a context holds (zoomr: the one attached, or NULL); returns how many kinds of buffer there are
LLAMA_API int64_t zoomr_memory_use(const struct llama_context * ctx, const struct zoomr_context * zoomr, struct zoomr_memory * dst, size_t n_max);
LLAMA_API int64_t zoomr_gpus(struct zoomr_gpu * dst, size_t n_max);

// a snapshot of all cells of a context with one sequence, paged or not: their numbers, positions, K and V, and where
// llama.cpp looks for the next free one. into a context of the same model, cells, KV type and flash attention setting
// only; nothing changes unless all of it is valid. fails with ZOOMR_ERR_UNSUPPORTED where the memory is more than a KV cache
LLAMA_API int64_t zoomr_state_bytes(struct llama_context * ctx);
LLAMA_API int64_t zoomr_state_write(struct llama_context * ctx, void * dst, size_t size); // bytes
LLAMA_API int64_t zoomr_state_read (struct llama_context * ctx, const void * src, size_t size); // tokens

// NULL if the context's model and cache can be paged, else the reason
LLAMA_API const char * zoomr_unsupported(const struct llama_context * ctx);

// attach and detach. the buffers live where the KV cache lives
LLAMA_API int32_t zoomr_init(struct llama_context * ctx, struct zoomr_params params, struct zoomr_context ** out);
LLAMA_API void    zoomr_free(struct zoomr_context * zoomr);
LLAMA_API void    zoomr_get_info(const struct zoomr_context * zoomr, struct zoomr_info * info);

LLAMA_API int32_t zoomr_layer_id(const struct zoomr_context * zoomr, uint32_t i); // model layer of paged layer i
LLAMA_API float   zoomr_kq_scale(const struct zoomr_context * zoomr, uint32_t i); // scale of q.k before softmax

// paging. a page holds the resident tokens of a sequence in [p0, p1): positions, cell data, K and V rows
LLAMA_API int64_t zoomr_page_tokens(struct zoomr_context * zoomr, llama_seq_id seq, llama_pos p0, llama_pos p1);
LLAMA_API int64_t zoomr_page_bytes (const struct zoomr_context * zoomr, uint64_t n_tokens);
LLAMA_API int64_t zoomr_page_write (struct zoomr_context * zoomr, llama_seq_id seq, llama_pos p0, llama_pos p1, void * dst, size_t size); // bytes
LLAMA_API int64_t zoomr_page_free  (struct zoomr_context * zoomr, llama_seq_id seq, llama_pos p0, llama_pos p1); // tokens
// into the lowest free cells, at the original positions. nothing changes unless the whole page fits
LLAMA_API int64_t zoomr_page_in    (struct zoomr_context * zoomr, llama_seq_id seq, const void * src, size_t size); // tokens

// a page with its K and V rows quantised (GGML_TYPE_Q8_0 or GGML_TYPE_Q4_0), everything else byte for byte; lossy.
// pages of an f16 cache only. these three read nothing but what stays the same from init to free: they may be called
// on any thread, also while the context decodes
LLAMA_API int64_t zoomr_page_packed_bytes(const struct zoomr_context * zoomr, uint64_t n_tokens, int32_t type);
LLAMA_API int64_t zoomr_page_pack        (const struct zoomr_context * zoomr, const void * src, size_t size, int32_t type, void * dst, size_t dst_size); // bytes
LLAMA_API int64_t zoomr_page_unpack      (const struct zoomr_context * zoomr, const void * src, size_t size, void * dst, size_t dst_size); // bytes

// index rows, shared by all sequences: [n_head_kv, n_embd_head] floats in every paged layer
LLAMA_API int32_t zoomr_rows_set_n(struct zoomr_context * zoomr, uint32_t n); // rows that the probe scores
LLAMA_API int64_t zoomr_rows_mean (struct zoomr_context * zoomr, uint32_t row, llama_seq_id seq, llama_pos p0, llama_pos p1); // tokens averaged
LLAMA_API int32_t zoomr_rows_get  (struct zoomr_context * zoomr, uint32_t row,       float * dst); // [n_layer][n_head_kv][n_embd_head]
LLAMA_API int32_t zoomr_rows_set  (struct zoomr_context * zoomr, uint32_t row, const float * src);
LLAMA_API void    zoomr_rows_clear(struct zoomr_context * zoomr);

// what the last decode left, for the last token of every sequence in it. valid until the next decode;
// a host address of the tensor itself where the KV cache is in host memory, else of a copy made by the call
LLAMA_API const float * zoomr_scores    (struct zoomr_context * zoomr); // [n_layer][n_seq_max][n_head][n_rows_max]
LLAMA_API const float * zoomr_query     (struct zoomr_context * zoomr); // [n_layer][n_seq_max][n_head][n_embd_head], NULL unless tapped
LLAMA_API const float * zoomr_key_scores(struct zoomr_context * zoomr); // [n_layer][n_seq_max][n_head][n_keys_max], NULL unless probed

// test oracle: score the resident keys at these positions in every following decode. fails where one is not resident
LLAMA_API int32_t zoomr_set_key_probe(struct zoomr_context * zoomr, llama_seq_id seq, const llama_pos * pos, uint32_t n);

//
// per-head store: a memory in which every (layer, KV head) keeps its own tokens, in place of a context's KV cache.
// one sequence. a zoomr_heads belongs to its llama_context and is freed with it; llama_memory_seq_rm and
// llama_memory_clear act on all layers and heads
//

struct zoomr_heads;

struct zoomr_heads_params {
    const uint32_t * n_cells; // [n_layer] cells a KV head; a layer allocates n_head_kv times as many
    uint32_t n_layer;
    uint32_t n_observe; // last tokens of a decode whose weights and queries are kept
    bool     share;     // the heads of a layer take their cells from one pool: one may hold more than n_cells, another less
    bool     weights;   // keep attention weights
    bool     queries;   // keep queries
};

struct zoomr_heads_info {
    uint32_t n_layer;       // attention layers, in model order
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t n_embd_head_k;
    uint32_t n_embd_head_v;
    uint32_t n_observe;
    uint64_t cell_bytes;    // K and V of one cell of one KV head
    uint64_t kv_bytes;      // of the K and V buffers
    uint64_t observe_bytes; // of the buffers for weights and queries
};

// NULL if the context can have a per-head store, else the reason
LLAMA_API const char * zoomr_heads_unsupported(const struct llama_context * ctx);

// before the first decode, and not beside a zoomr_context. the cache that the context was made with is freed
LLAMA_API int32_t  zoomr_heads_init    (struct llama_context * ctx, struct zoomr_heads_params params, struct zoomr_heads ** out);
LLAMA_API void     zoomr_heads_get_info(const struct zoomr_heads * heads, struct zoomr_heads_info * info);
LLAMA_API int32_t  zoomr_heads_layer_id(const struct zoomr_heads * heads, uint32_t layer); // its layer in the model
LLAMA_API float    zoomr_heads_kq_scale(const struct zoomr_heads * heads, uint32_t layer);
LLAMA_API uint32_t zoomr_heads_n_cells (const struct zoomr_heads * heads, uint32_t layer); // that a head can name: n_head_kv times as many if shared

// [n_head_kv][n_cells] position in each cell, -1 where it is free or another head's. always current, do not write
LLAMA_API const llama_pos * zoomr_heads_pos(const struct zoomr_heads * heads, uint32_t layer);

// a decode puts every token into the lowest free cell of every layer and head, and fails with 1 where one has none
LLAMA_API int32_t zoomr_heads_fits      (struct zoomr_heads * heads, uint32_t n_tokens); // 0 if n_tokens have room everywhere, else an error that says where not
LLAMA_API int64_t zoomr_heads_free_cells(struct zoomr_heads * heads, uint32_t layer, uint32_t head);
LLAMA_API int64_t zoomr_heads_evict     (struct zoomr_heads * heads, uint32_t layer, uint32_t head, const uint32_t * cells, size_t n);

// rows of cells as floats, [n][n_embd_head]; k or v may be NULL
LLAMA_API int64_t zoomr_heads_read(struct zoomr_heads * heads, uint32_t layer, uint32_t head, const uint32_t * cells, size_t n, float * k, float * v);

// rows of cells as bytes, n K rows then n V rows: n*cell_bytes. page_in puts tokens that were decoded before into the lowest
// free cells of a head (cells, may be NULL: which), all or nothing. page_out leaves them there
LLAMA_API int64_t zoomr_heads_page_out(struct zoomr_heads * heads, uint32_t layer, uint32_t head, const uint32_t * cells, size_t n, void * dst, size_t size); // bytes
LLAMA_API int64_t zoomr_heads_page_in (struct zoomr_heads * heads, uint32_t layer, uint32_t head, const llama_pos * pos, size_t n, const void * src, size_t size, uint32_t * cells); // tokens

struct zoomr_heads_moved {
    uint64_t n_evicted;  // cells of single heads
    uint64_t n_recalled;
    uint64_t n_stored;   // of the evicted ones, rows that were not stored before
};

// a layer at once: of the first n_pos positions each head then holds those that are wanted ([n_head_kv][n_pos], 0 or 1) and no others. rows
// ([n_head_kv][n_rows][cell_bytes], by position, each K then V) takes what leaves, unless stored ([n_head_kv][n_rows], 0 or 1; set by this) says
// that it is there, and gives what comes. nothing changes unless all of it is stored and fits. who decodes a position again must say that it
// is not stored
LLAMA_API int32_t zoomr_heads_exchange(struct zoomr_heads * heads, uint32_t layer, const uint8_t * wanted, size_t n_pos, uint8_t * stored, void * rows, size_t n_rows, struct zoomr_heads_moved * moved);

// whether the next decodes observe (at first they do); changing it rebuilds the graph once
LLAMA_API void zoomr_heads_observe(struct zoomr_heads * heads, bool on);

// what the last decode left: of its last ubatch's last tokens, oldest first. weights are those that attention used: soft-maxed
// over the cells of a head. cells that hold no token of the head are not all written. addresses are stable on the CPU
LLAMA_API uint32_t      zoomr_heads_observed(const struct zoomr_heads * heads); // how many tokens, at most n_observe
LLAMA_API const float * zoomr_heads_weights (struct zoomr_heads * heads, uint32_t layer); // [n_observe][n_head][n_cells]
LLAMA_API const float * zoomr_heads_queries (struct zoomr_heads * heads); // [n_layer][n_observe][n_head][n_embd_head_k], after RoPE

#ifdef __cplusplus
}
#endif
