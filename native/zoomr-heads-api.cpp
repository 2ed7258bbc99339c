// The per-head store's C API: putting it in place of a context's cache, evicting, reading and writing cells.

#include "zoomr-heads.h"

#include "llama-kv-cache-iswa.h"

#include <algorithm>
#include <cstring>

const char * zoomr_heads::unsupported(const llama_context * ctx) {
    const auto & hparams = ctx->get_model().hparams;
    const auto & cparams = ctx->get_cparams();

    if (dynamic_cast<llama_kv_cache_iswa *>(ctx->get_memory())) {
        return "sliding window: its layers bound their own cache";
    }
    if (const char * reason = zoomr_context::unsupported(ctx)) {
        return reason;
    }
    if (ctx->n_seq_max() != 1) {
        return "several sequences: a per-head store holds one";
    }
    if (cparams.zoomr) {
        return "a zoomr_context is attached: its pages are of the uniform cache";
    }
    if (hparams.attn_soft_cap || ctx->get_model().arch == LLM_ARCH_GROK) {
        return "soft-capped attention: not shown exact with a per-head store";
    }

    const auto * kv = dynamic_cast<const llama_kv_cache *>(ctx->get_memory());

    if (kv->type_k() != kv->type_v() || (kv->type_k() != GGML_TYPE_F16 && kv->type_k() != GGML_TYPE_F32)) {
        return "K and V of another type than f16 or f32: not shown exact with a per-head store";
    }
    if (kv->get_cells(0).get_used() > 0) {
        return "tokens were decoded already: a per-head store is made before the first";
    }
    const auto ids = kv->get_layer_ids();
    for (const auto il : ids) {
        if (hparams.n_embd_head_v(il) != hparams.n_embd_head_v(ids[0])) {
            return "attention layers with values of different sizes";
        }
    }
    return nullptr;
}

const char * zoomr_heads_unsupported(const llama_context * ctx) {
    return zoomr_heads::unsupported(ctx);
}

int32_t zoomr_heads_init(llama_context * ctx, zoomr_heads_params params, zoomr_heads ** out) {
    *out = nullptr;
    return zoomr_guard([&]() -> int32_t {
        if (const char * reason = zoomr_heads::unsupported(ctx)) {
            throw zoomr_error { ZOOMR_ERR_UNSUPPORTED, reason };
        }

        const auto * stock = dynamic_cast<const llama_kv_cache *>(ctx->get_memory());

        auto heads = std::make_unique<zoomr_heads>(ctx, stock, params);
        auto * z   = heads.get();

        llama_memory_ptr before = zoomr_context::swap_memory(ctx, std::move(heads));
        for (const auto & layer : z->layers) {
            if (!layer.hooked) {
                const std::string il = std::to_string(layer.il);
                zoomr_context::swap_memory(ctx, std::move(before));
                throw zoomr_error { ZOOMR_ERR_UNSUPPORTED, "attention of layer " + il + " has a form this version does not know" };
            }
        }

        *out = z;
        return 0;
    });
}

// what was there before; also puts it back where the new memory's graph cannot be built
llama_memory_ptr zoomr_context::swap_memory(llama_context * ctx, llama_memory_ptr memory) {
    ctx->synchronize();
    ctx->memory.swap(memory);
    ctx->sched_need_reserve = true;
    try {
        ctx->sched_reserve();
    } catch (const std::exception & err) {
        ctx->memory.swap(memory);
        ctx->sched_need_reserve = true;
        // llama.cpp has one kind of exception for all its failures; this one is no matter of the model's form
        const bool space = std::string(err.what()).find("failed to allocate") != std::string::npos || dynamic_cast<const std::bad_alloc *>(&err);
        throw zoomr_error { space ? ZOOMR_ERR_SPACE : ZOOMR_ERR_UNSUPPORTED, err.what() };
    }
    return memory;
}

void zoomr_heads_get_info(const zoomr_heads * z, zoomr_heads_info * info) {
    *info = {
        /*.n_layer       =*/ (uint32_t) z->layers.size(),
        /*.n_head        =*/ z->n_head,
        /*.n_head_kv     =*/ z->n_head_kv,
        /*.n_embd_head_k =*/ z->n_embd_k,
        /*.n_embd_head_v =*/ z->n_embd_v,
        /*.n_observe     =*/ z->n_observe,
        /*.cell_bytes    =*/ z->cell_bytes(),
        /*.kv_bytes      =*/ z->kv_bytes,
        /*.observe_bytes =*/ z->observe_bytes,
    };
}

int32_t zoomr_heads_layer_id(const zoomr_heads * z, uint32_t layer) {
    return layer < z->layers.size() ? z->layers[layer].il : -1;
}

float zoomr_heads_kq_scale(const zoomr_heads * z, uint32_t layer) {
    return layer < z->layers.size() ? z->layers[layer].kq_scale : 0.0f;
}

uint32_t zoomr_heads_n_cells(const zoomr_heads * z, uint32_t layer) {
    return layer < z->layers.size() ? z->layers[layer].n_cells : 0;
}

const llama_pos * zoomr_heads_pos(const zoomr_heads * z, uint32_t layer) {
    return layer < z->layers.size() ? z->layers[layer].pos.data() : nullptr;
}

int64_t zoomr_heads_free_cells(zoomr_heads * z, uint32_t layer, uint32_t head) {
    return zoomr_guard([&]() -> int64_t {
        const auto & l = z->at(layer, head);
        return l.n_free[l.part(head)];
    });
}

int32_t zoomr_heads_fits(zoomr_heads * z, uint32_t n_tokens) {
    return zoomr_guard([&]() -> int32_t {
        const std::string missing = z->shortage(n_tokens);
        if (!missing.empty()) {
            throw zoomr_error { ZOOMR_ERR_SPACE, missing };
        }
        return 0;
    });
}

// cells that hold tokens of this head, none of them twice
static void check_cells(const zoomr_heads_layer & layer, uint32_t head, const uint32_t * cells, size_t n) {
    std::vector<bool> seen(layer.n_cells);
    for (size_t i = 0; i < n; ++i) {
        const uint32_t c = cells[i];
        if (c >= layer.n_cells || layer.pos[head*layer.n_cells + c] < 0 || seen[c]) {
            throw zoomr_error { ZOOMR_ERR_ARGUMENT, "cell " + std::to_string(c) + " of layer " + std::to_string(layer.il) + ", KV head " +
                std::to_string(head) + (c < layer.n_cells && seen[c] ? " is named twice" : " holds no token of that head") };
        }
        seen[c] = true;
    }
}

int64_t zoomr_heads_evict(zoomr_heads * z, uint32_t layer, uint32_t head, const uint32_t * cells, size_t n) {
    return zoomr_guard([&]() -> int64_t {
        auto & l = z->at(layer, head);
        check_cells(l, head, cells, n);
        for (size_t i = 0; i < n; ++i) {
            l.free(head, cells[i]);
        }
        z->uniform = z->uniform && n == 0;
        return n;
    });
}

//
// rows
//

size_t zoomr_heads::cell_bytes() const {
    return ggml_row_size(layers[0].k->type, n_embd_k) + ggml_row_size(layers[0].v->type, n_embd_v);
}

void zoomr_heads::copy_out(const zoomr_heads_layer & layer, uint32_t head, uint32_t cell, uint8_t * k, uint8_t * v) const {
    const uint32_t ip = layer.part(head);

    if (k) {
        zoomr_get_bytes(layer.k, k, ip*layer.k->nb[2] + cell*layer.k->nb[1], layer.k->nb[1]);
    }
    if (v && !v_trans) {
        zoomr_get_bytes(layer.v, v, ip*layer.v->nb[2] + cell*layer.v->nb[1], layer.v->nb[1]);
    }
    if (v && v_trans) {
        const size_t es = layer.v->nb[0];
        for (uint32_t i = 0; i < n_embd_v; ++i) {
            zoomr_get_bytes(layer.v, v + i*es, ip*layer.v->nb[2] + i*layer.v->nb[1] + cell*es, es);
        }
    }
}

void zoomr_heads::copy_in(const zoomr_heads_layer & layer, uint32_t head, uint32_t cell, const uint8_t * k, const uint8_t * v) {
    const uint32_t ip = layer.part(head);

    zoomr_set_bytes(layer.k, k, ip*layer.k->nb[2] + cell*layer.k->nb[1], layer.k->nb[1]);
    if (!v_trans) {
        zoomr_set_bytes(layer.v, v, ip*layer.v->nb[2] + cell*layer.v->nb[1], layer.v->nb[1]);
        return;
    }
    const size_t es = layer.v->nb[0];
    for (uint32_t i = 0; i < n_embd_v; ++i) {
        zoomr_set_bytes(layer.v, v + i*es, ip*layer.v->nb[2] + i*layer.v->nb[1] + cell*es, es);
    }
}

static void check_size(const zoomr_heads * z, size_t n, size_t size) {
    if (size != n*z->cell_bytes()) {
        throw zoomr_error { ZOOMR_ERR_ARGUMENT, std::to_string(n) + " cells of a head are " + std::to_string(n*z->cell_bytes()) +
            " bytes, the buffer has " + std::to_string(size) };
    }
}

int64_t zoomr_heads_read(zoomr_heads * z, uint32_t layer, uint32_t head, const uint32_t * cells, size_t n, float * k, float * v) {
    return zoomr_guard([&]() -> int64_t {
        const auto & l = z->at(layer, head);
        check_cells(l, head, cells, n);
        z->ctx->synchronize();

        std::vector<uint8_t> raw_k(k ? l.k->nb[0]*z->n_embd_k : 0);
        std::vector<uint8_t> raw_v(v ? l.v->nb[0]*z->n_embd_v : 0);

        const auto convert = [&](const std::vector<uint8_t> & raw, float * dst, size_t m) {
            if (l.k->type == GGML_TYPE_F16) {
                ggml_fp16_to_fp32_row((const ggml_fp16_t *) raw.data(), dst, m);
            } else {
                memcpy(dst, raw.data(), m*sizeof(float));
            }
        };

        for (size_t i = 0; i < n; ++i) {
            z->copy_out(l, head, cells[i], k ? raw_k.data() : nullptr, v ? raw_v.data() : nullptr);
            if (k) {
                convert(raw_k, k + i*z->n_embd_k, z->n_embd_k);
            }
            if (v) {
                convert(raw_v, v + i*z->n_embd_v, z->n_embd_v);
            }
        }
        return n;
    });
}

int64_t zoomr_heads_page_out(zoomr_heads * z, uint32_t layer, uint32_t head, const uint32_t * cells, size_t n, void * dst, size_t size) {
    return zoomr_guard([&]() -> int64_t {
        const auto & l = z->at(layer, head);
        check_cells(l, head, cells, n);
        check_size(z, n, size);
        z->ctx->synchronize();

        const size_t k_row = l.k->nb[1];
        const size_t v_row = z->cell_bytes() - k_row;

        uint8_t * k = (uint8_t *) dst;
        uint8_t * v = k + n*k_row;
        for (size_t i = 0; i < n; ++i) {
            z->copy_out(l, head, cells[i], k + i*k_row, v + i*v_row);
        }
        return size;
    });
}

int64_t zoomr_heads_page_in(zoomr_heads * z, uint32_t layer, uint32_t head, const llama_pos * pos, size_t n, const void * src, size_t size, uint32_t * cells) {
    return zoomr_guard([&]() -> int64_t {
        auto & l = z->at(layer, head);
        check_size(z, n, size);

        std::vector<llama_pos> sorted(pos, pos + n);
        std::sort(sorted.begin(), sorted.end());

        if (n > 0 && (sorted[0] < 0 || sorted[n - 1] > z->pos_max)) {
            throw zoomr_error { ZOOMR_ERR_ARGUMENT, "position " + std::to_string(sorted[0] < 0 ? sorted[0] : sorted[n - 1]) +
                " was not decoded: the newest is " + std::to_string(z->pos_max) };
        }
        for (size_t i = 0; i + 1 < n; ++i) {
            if (sorted[i] == sorted[i + 1]) {
                throw zoomr_error { ZOOMR_ERR_DUPLICATE, "position " + std::to_string(sorted[i]) + " is named twice" };
            }
        }
        for (uint32_t c = 0; c < l.n_cells; ++c) {
            const llama_pos p = l.pos[head*l.n_cells + c];
            if (p >= 0 && std::binary_search(sorted.begin(), sorted.end(), p)) {
                throw zoomr_error { ZOOMR_ERR_DUPLICATE, "position " + std::to_string(p) + " is resident already" };
            }
        }
        if (n > l.n_free[l.part(head)]) {
            throw zoomr_error { ZOOMR_ERR_SPACE, std::to_string(n) + " tokens do not fit into layer " + std::to_string(layer) + ", KV head " +
                std::to_string(head) + ": " + std::to_string(l.n_free[l.part(head)]) + " of " + std::to_string(l.n_cells) + " cells are free" };
        }

        z->ctx->synchronize();

        const size_t k_row = l.k->nb[1];
        const size_t v_row = z->cell_bytes() - k_row;

        const uint8_t * k = (const uint8_t *) src;
        const uint8_t * v = k + n*k_row;
        for (size_t i = 0; i < n; ++i) {
            const uint32_t c = l.take(head, pos[i]);
            z->copy_in(l, head, c, k + i*k_row, v + i*v_row);
            if (cells) {
                cells[i] = c;
            }
        }
        z->uniform = z->uniform && n == 0;
        return n;
    });
}

//
// what the last decode left
//

const float * zoomr_heads::read(ggml_tensor * t, std::vector<float> & copy) {
    if (!t) {
        zoomr_fail(ZOOMR_ERR_ARGUMENT, "the per-head store was made without observing this");
        return nullptr;
    }

    ctx->synchronize();

    if (ggml_backend_buffer_is_host(t->buffer)) {
        return (const float *) t->data;
    }

    copy.resize(ggml_nelements(t));
    ggml_backend_tensor_get(t, copy.data(), 0, ggml_nbytes(t));
    return copy.data();
}

void zoomr_heads_observe(zoomr_heads * z, bool on) {
    z->observing = on;
}

uint32_t zoomr_heads_observed(const zoomr_heads * z) {
    return z->n_observed;
}

const float * zoomr_heads_weights(zoomr_heads * z, uint32_t layer) {
    return layer < z->layers.size() ? z->read(z->layers[layer].weights, z->weights_host[layer]) : nullptr;
}

const float * zoomr_heads_queries(zoomr_heads * z) {
    return z->read(z->query, z->query_host);
}
