// Attaching to a context, and the parts of the C API that are neither pages nor index rows.

#include "zoomr-impl.h"

static thread_local std::string g_last_error;

int32_t zoomr_fail(int32_t code, const std::string & message) {
    g_last_error = message;
    return code;
}

const char * zoomr_last_error(void) {
    return g_last_error.c_str();
}

#define ZOOMR_STR_(x) #x
#define ZOOMR_STR(x)  ZOOMR_STR_(x)

const char * zoomr_version(void) {
    return ZOOMR_STR(ZOOMR_ABI) " " ZOOMR_ENGINE_VERSION;
}

zoomr_context::zoomr_context(llama_context * ctx, const zoomr_params & params) : ctx(ctx), kv(find_kv(ctx)) {
    const auto & hparams = ctx->get_model().hparams;

    for (const auto & layer : kv->layers) {
        layers.push_back({ (int32_t) layer.il, layer.k, layer.v });
        layer_of.resize(std::max<size_t>(layer_of.size(), layer.il + 1), -1);
        layer_of[layer.il] = layers.size() - 1;
    }

    n_head     = hparams.n_head(layers[0].il);
    n_head_kv  = hparams.n_head_kv(layers[0].il);
    n_embd     = hparams.n_embd_head_k(layers[0].il);
    n_seq_max  = ctx->n_seq_max();
    n_rows_max = GGML_PAD(std::max(params.n_rows_max, 1u), ZOOMR_ROWS_PAD);
    n_keys_max = params.n_keys_max;
    tap_query  = params.tap_query;
    geometry   = page_geometry();

    probe.resize(n_seq_max);

    init_tensors();
    attach();
}

zoomr_context::~zoomr_context() {
    ctx->synchronize();
    ctx->cparams.zoomr = nullptr; // graphs built with the probe are not reused, see llm_graph_params::allow_reuse
}

void zoomr_context::init_tensors() {
    ggml_init_params params = {
        /*.mem_size   =*/ 4*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ctx_ggml.reset(ggml_init(params));

    const int64_t n_layer = layers.size();

    const auto new_tensor = [&](int64_t n0, int64_t n1, int64_t n2, const char * name) {
        ggml_tensor * t = ggml_new_tensor_4d(ctx_ggml.get(), GGML_TYPE_F32, n0, n1, n2, n_layer);
        ggml_set_name(t, name);
        return t;
    };

    rows   = new_tensor(n_embd,     n_rows_max, n_head_kv, "zoomr_rows");
    scores = new_tensor(n_rows_max, n_head,     n_seq_max, "zoomr_scores");
    if (n_keys_max > 0) {
        keys = new_tensor(n_keys_max, n_head, n_seq_max, "zoomr_keys");
    }
    if (tap_query) {
        query = new_tensor(n_embd, n_head, n_seq_max, "zoomr_query");
    }

    ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(layers[0].k->buffer);

    index_bytes = ggml_backend_alloc_ctx_tensors_from_buft_size(ctx_ggml.get(), buft);

    if (ctx->get_model().hparams.no_alloc) {
        // as llama_kv_cache does: an empty buffer, so that the scheduler takes the tensors for allocated
        buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
        for (ggml_tensor * t : { rows, scores, keys, query }) {
            if (t) {
                t->buffer = buf.get();
            }
        }
        return;
    }

    buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_ggml.get(), buft));
    if (!buf) {
        throw zoomr_error { ZOOMR_ERR_SPACE, "no memory for " + std::to_string(n_rows_max) + " index rows" };
    }

    // rows and scores are initialised as they are used, see rows_reach()
    for (ggml_tensor * t : { keys, query }) {
        if (t) {
            zero(t, 0, ggml_nbytes(t));
        }
    }
}

void zoomr_context::attach() {
    ctx->cparams.zoomr = this;

    // reserve with the probe at its largest, so that growing the index does not reallocate; the same graph shows
    // whether every attention layer passes the hook
    try {
        reserving = true;
        ctx->sched_need_reserve = true;
        ctx->sched_reserve();
        reserving = false;
    } catch (...) {
        ctx->cparams.zoomr = nullptr;
        throw;
    }

    for (const auto & layer : layers) {
        if (!layer.hooked) {
            ctx->cparams.zoomr = nullptr;
            ctx->sched_need_reserve = true;
            throw zoomr_error { ZOOMR_ERR_UNSUPPORTED, "attention of layer " + std::to_string(layer.il) + " has a form this version does not know" };
        }
    }
}

int32_t zoomr_init(llama_context * ctx, zoomr_params params, zoomr_context ** out) {
    *out = nullptr;
    return zoomr_guard([&]() -> int32_t {
        if (const char * reason = zoomr_context::unsupported(ctx)) {
            throw zoomr_error { ZOOMR_ERR_UNSUPPORTED, reason };
        }
        if (ctx->get_cparams().zoomr) {
            throw zoomr_error { ZOOMR_ERR_ARGUMENT, "the context has a zoomr_context already" };
        }
        *out = new zoomr_context(ctx, params);
        return 0;
    });
}

void zoomr_free(zoomr_context * zoomr) {
    delete zoomr;
}

void zoomr_get_info(const zoomr_context * z, zoomr_info * info) {
    *info = {
        /*.n_layer     =*/ (uint32_t) z->layers.size(),
        /*.n_head      =*/ z->n_head,
        /*.n_head_kv   =*/ z->n_head_kv,
        /*.n_embd_head =*/ z->n_embd,
        /*.n_seq_max   =*/ z->n_seq_max,
        /*.n_rows_max  =*/ z->n_rows_max,
        /*.n_keys_max  =*/ z->n_keys_max,
        /*.n_stream    =*/ z->kv->get_n_stream(),
        /*.token_bytes =*/ zoomr_context::kv_token_bytes(z->kv),
        /*.geometry    =*/ z->geometry,
    };
}

int32_t zoomr_layer_id(const zoomr_context * z, uint32_t i) {
    return i < z->layers.size() ? z->layers[i].il : -1;
}

float zoomr_kq_scale(const zoomr_context * z, uint32_t i) {
    return i < z->layers.size() ? z->layers[i].kq_scale : 0.0f;
}

const float * zoomr_context::read(ggml_tensor * t, std::vector<float> & copy) {
    if (!t) {
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

const float * zoomr_scores(zoomr_context * z) {
    return z->read(z->scores, z->scores_host);
}

const float * zoomr_query(zoomr_context * z) {
    return z->read(z->query, z->query_host);
}

const float * zoomr_key_scores(zoomr_context * z) {
    if (z->n_probe_missing > 0) {
        zoomr_fail(ZOOMR_ERR_ARGUMENT, std::to_string(z->n_probe_missing) + " probed positions were not resident");
        return nullptr;
    }
    return z->read(z->keys, z->keys_host);
}

int32_t zoomr_set_key_probe(zoomr_context * z, llama_seq_id seq, const llama_pos * pos, uint32_t n) {
    return zoomr_guard([&]() -> int32_t {
        if (n > z->n_keys_max) {
            throw zoomr_error { ZOOMR_ERR_ARGUMENT, "a key probe of " + std::to_string(n) + " positions, made for " + std::to_string(z->n_keys_max) };
        }
        for (uint32_t i = 0; i < n; ++i) {
            if (z->cells_in(seq, pos[i], pos[i] + 1).empty()) {
                throw zoomr_error { ZOOMR_ERR_ARGUMENT, "position " + std::to_string(pos[i]) + " is not resident" };
            }
        }
        z->probe.at(seq).assign(pos, pos + n);
        return 0;
    });
}
