// The state behind the C API and its private helpers. Included by native/zoomr-*.cpp only.

#pragma once

#include "zoomr.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-cpp.h"

#include <string>
#include <utility>
#include <vector>

// the probe is rebuilt into the graph when the padded number of rows grows; a step this long makes that rare
// (one rebuild costs about as much as 1/30 of a token) and wastes little work on padding
static constexpr uint32_t ZOOMR_ROWS_PAD = 64;

struct zoomr_layer {
    int32_t il; // layer index in the model

    ggml_tensor * k; // [n_embd_k_gqa, kv_size, n_stream]
    ggml_tensor * v; // the same, or channel-major if v_trans

    float kq_scale = 0.0f;
    bool  hooked   = false; // the probe was added to a graph at this layer
};

// a resident token of one sequence
using zoomr_cell = std::pair<llama_pos, uint32_t>; // position, cell

struct zoomr_state_cells;

struct zoomr_context {
    zoomr_context(llama_context * ctx, const zoomr_params & params);
    ~zoomr_context();

    // the full-attention cache of a context, or null
    static llama_kv_cache * find_kv(const llama_context * ctx);

    // bytes of one token's K and V
    static uint64_t kv_token_bytes(const llama_kv_cache * kv);

    // why this context cannot be paged, or null
    static const char * unsupported(const llama_context * ctx);

    // why a memory is neither a plain KV cache nor one beside a sliding-window cache, or null
    static const char * unsupported_memory(llama_memory_i * memory);

    // puts another memory in the context's place and returns the one before, for a per-head store
    static llama_memory_ptr swap_memory(llama_context * ctx, llama_memory_ptr memory);

    // what the context and its zoomr_context (or null) hold, an entry for each kind of buffer
    static std::vector<zoomr_memory> memory_use(const llama_context * ctx, const zoomr_context * z);

    //
    // attaching
    //

    void attach(); // throws if an attention layer's graph does not pass the hook
    void init_tensors();

    //
    // cells and pages
    //

    // the resident cells of a sequence in [p0, p1), by position
    std::vector<zoomr_cell> cells_in(llama_seq_id seq, llama_pos p0, llama_pos p1) const;

    // waits for the device and applies pending stream copies, so that K and V rows are what the cells say
    void settle();

    size_t   page_size(uint64_t n_tokens) const;
    size_t   packed_size(uint64_t n_tokens, ggml_type type) const;
    uint64_t page_geometry() const;

    void copy_out(const std::vector<zoomr_cell> & cells, uint32_t stream, uint8_t * dst) const;
    void copy_in (const std::vector<zoomr_cell> & cells, uint32_t stream, const uint8_t * src);

    // checks a page that may come from anywhere; fills its positions and cell data, returns the rows' address
    const uint8_t * page_parse(const uint8_t * src, size_t size, std::vector<llama_pos> & pos, std::vector<llama_kv_cell_ext> & ext) const;

    void page_place(llama_seq_id seq, const std::vector<llama_pos> & pos, const std::vector<llama_kv_cell_ext> & ext, const uint8_t * rows);

    uint32_t stream_of(llama_seq_id seq) const;

    bool v_by_channel() const; // V is [n_embd_v_gqa][tokens], not a row a token

    //
    // snapshots, of any context: zoomr-state.cpp
    //

    static std::vector<llama_kv_cache *> state_caches(llama_context * ctx); // throws if they cannot be saved

    static uint64_t  state_geometry(const llama_context * ctx, const std::vector<llama_kv_cache *> & caches);
    static size_t    state_size    (const std::vector<llama_kv_cache *> & caches);
    static uint8_t * state_put     (const llama_kv_cache * kv, uint8_t * dst);

    static const uint8_t * state_parse(const llama_kv_cache * kv, const uint8_t * src, const uint8_t * end, llama_token n_vocab, zoomr_state_cells & out);

    static void state_apply(llama_kv_cache * kv, const zoomr_state_cells & in);

    template <typename F>
    static void state_rows(const llama_kv_cache * kv, const std::vector<uint32_t> & idx, F && f);

    //
    // index rows
    //

    void rows_reach(uint32_t n);           // rows [0, n) are initialised, to zero where never written
    static void zero(ggml_tensor * t, size_t offset, size_t size);
    void rows_write(uint32_t layer, uint32_t row, const float * src);
    void key_f32   (uint32_t layer, uint32_t stream, uint32_t cell, float * dst) const;

    uint32_t n_rows_pad() const;

    //
    // results
    //

    const float * read(ggml_tensor * t, std::vector<float> & copy);

    llama_context  * ctx;
    llama_kv_cache * kv;

    uint32_t n_head     = 0;
    uint32_t n_head_kv  = 0;
    uint32_t n_embd     = 0; // of one head's key
    uint32_t n_seq_max  = 0;
    uint32_t n_rows_max = 0;
    uint32_t n_keys_max = 0;
    bool     tap_query  = false;

    uint64_t geometry = 0;

    uint32_t n_rows      = 0; // rows in use
    uint32_t n_rows_zero = 0; // rows that were initialised

    // while the worst-case graph is reserved, the probe is built at its largest
    bool reserving = false;

    std::vector<zoomr_layer> layers;
    std::vector<int32_t>     layer_of; // model layer -> index into layers, or -1

    std::vector<std::vector<llama_pos>> probe; // [n_seq_max] positions of the key probe
    uint32_t n_probe_missing = 0;              // of the last decode: positions that were not resident

    ggml_context_ptr        ctx_ggml;
    ggml_backend_buffer_ptr buf;
    size_t                  index_bytes = 0; // of buf, or what it would be where the model is not allocated

    ggml_tensor * rows   = nullptr; // F32 [n_embd,     n_rows_max, n_head_kv, n_layer]
    ggml_tensor * scores = nullptr; // F32 [n_rows_max, n_head,     n_seq_max, n_layer]
    ggml_tensor * keys   = nullptr; // F32 [n_keys_max, n_head,     n_seq_max, n_layer]
    ggml_tensor * query  = nullptr; // F32 [n_embd,     n_head,     n_seq_max, n_layer]

    // copies for callers where the tensors are in device memory
    std::vector<float> scores_host;
    std::vector<float> keys_host;
    std::vector<float> query_host;
};

// bytes of a tensor. host memory is copied by hand: the backend's getter and setter cost more than the copy itself where runs are short
void zoomr_get_bytes(const ggml_tensor * t, uint8_t * dst, size_t offs, size_t size);
void zoomr_set_bytes(ggml_tensor * t, const uint8_t * src, size_t offs, size_t size);

// an error with its code; turned into a return value at the C boundary
struct zoomr_error {
    int32_t     code;
    std::string message;
};

// records the message and returns the code
int32_t zoomr_fail(int32_t code, const std::string & message);

// runs f and turns whatever it throws into an error code: nothing may be thrown through the C API
template <typename F>
static auto zoomr_guard(F && f) -> decltype(f()) {
    try {
        return f();
    } catch (const zoomr_error & err) {
        return zoomr_fail(err.code, err.message);
    } catch (const std::exception & err) {
        return zoomr_fail(ZOOMR_ERR_INTERNAL, err.what());
    }
}
