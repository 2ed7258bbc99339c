// Index rows: one vector per (paged layer, KV head) that stands for a block when it is scored. Their buffer is
// separate from the KV cache, so that a block can leave the cache and still be scored.

#include "zoomr-impl.h"

#include <algorithm>
#include <cstring>

uint32_t zoomr_context::n_rows_pad() const {
    return reserving ? n_rows_max : GGML_PAD(n_rows, ZOOMR_ROWS_PAD);
}

// not ggml_backend_tensor_memset: some backends (OpenCL) have none and abort
void zoomr_context::zero(ggml_tensor * t, size_t offset, size_t size) {
    const std::vector<uint8_t> zeros(size);
    ggml_backend_tensor_set(t, zeros.data(), offset, size);
}

// memory beyond is never touched, so a large n_rows_max costs address space only
void zoomr_context::rows_reach(uint32_t n) {
    n = std::min(GGML_PAD(n, ZOOMR_ROWS_PAD), n_rows_max);
    if (n <= n_rows_zero) {
        return;
    }

    const uint32_t n_new = n - n_rows_zero;

    for (size_t il = 0; il < layers.size(); ++il) {
        for (uint32_t h = 0; h < n_head_kv; ++h) {
            zero(rows, il*rows->nb[3] + h*rows->nb[2] + n_rows_zero*rows->nb[1], n_new*rows->nb[1]);
        }
        // a sequence that was not decoded since has no score, which reads as 0
        for (uint32_t s = 0; s < n_seq_max; ++s) {
            for (uint32_t h = 0; h < n_head; ++h) {
                zero(scores, il*scores->nb[3] + s*scores->nb[2] + h*scores->nb[1] + n_rows_zero*sizeof(float), n_new*sizeof(float));
            }
        }
    }

    n_rows_zero = n;
}

void zoomr_context::rows_write(uint32_t layer, uint32_t row, const float * src) {
    for (uint32_t h = 0; h < n_head_kv; ++h) {
        ggml_backend_tensor_set(rows, src + h*n_embd, layer*rows->nb[3] + h*rows->nb[2] + row*rows->nb[1], n_embd*sizeof(float));
    }
}

// the key of one cell as floats, in the cache's own rotation (which the query shares at the hook)
void zoomr_context::key_f32(uint32_t layer, uint32_t stream, uint32_t cell, float * dst) const {
    const ggml_tensor * k = layers[layer].k;

    const size_t offs = stream*k->nb[2] + cell*k->nb[1];

    std::vector<uint8_t> raw(k->nb[1]);
    ggml_backend_tensor_get(k, raw.data(), offs, raw.size());

    if (k->type == GGML_TYPE_F32) {
        memcpy(dst, raw.data(), raw.size());
    } else {
        ggml_get_type_traits(k->type)->to_float(raw.data(), dst, k->ne[0]);
    }
}

static void check_row(const zoomr_context * z, uint32_t row) {
    if (row >= z->n_rows_max) {
        throw zoomr_error { ZOOMR_ERR_ARGUMENT,
            "index row " + std::to_string(row) + " of " + std::to_string(z->n_rows_max) };
    }
}

int32_t zoomr_rows_set_n(zoomr_context * z, uint32_t n) {
    return zoomr_guard([&]() -> int32_t {
        if (n > 0) {
            check_row(z, n - 1);
        }
        z->settle();
        z->rows_reach(n);
        z->n_rows = n;
        return 0;
    });
}

int64_t zoomr_rows_mean(zoomr_context * z, uint32_t row, llama_seq_id seq, llama_pos p0, llama_pos p1) {
    return zoomr_guard([&]() -> int64_t {
        check_row(z, row);
        z->settle();

        const auto cells = z->cells_in(seq, p0, p1);
        if (cells.empty()) {
            throw zoomr_error { ZOOMR_ERR_ARGUMENT,
                "no resident key of sequence " + std::to_string(seq) + " in [" + std::to_string(p0) + ", " + std::to_string(p1) + ")" };
        }

        z->rows_reach(row + 1);

        const uint32_t stream = z->stream_of(seq);
        const size_t   n      = (size_t) z->n_embd*z->n_head_kv;

        std::vector<float>  key(n);
        std::vector<double> sum(n); // so that the mean does not depend on how many keys there are

        for (size_t il = 0; il < z->layers.size(); ++il) {
            std::fill(sum.begin(), sum.end(), 0.0);
            for (const auto & cell : cells) {
                z->key_f32(il, stream, cell.second, key.data());
                for (size_t i = 0; i < n; ++i) {
                    sum[i] += key[i];
                }
            }
            for (size_t i = 0; i < n; ++i) {
                key[i] = (float) (sum[i]/cells.size());
            }
            z->rows_write(il, row, key.data());
        }

        return cells.size();
    });
}

int32_t zoomr_rows_get(zoomr_context * z, uint32_t row, float * dst) {
    return zoomr_guard([&]() -> int32_t {
        check_row(z, row);
        z->settle();
        z->rows_reach(row + 1);

        for (size_t il = 0; il < z->layers.size(); ++il) {
            for (uint32_t h = 0; h < z->n_head_kv; ++h) {
                ggml_backend_tensor_get(z->rows, dst, il*z->rows->nb[3] + h*z->rows->nb[2] + row*z->rows->nb[1], z->n_embd*sizeof(float));
                dst += z->n_embd;
            }
        }
        return 0;
    });
}

int32_t zoomr_rows_set(zoomr_context * z, uint32_t row, const float * src) {
    return zoomr_guard([&]() -> int32_t {
        check_row(z, row);
        z->settle();
        z->rows_reach(row + 1);

        for (size_t il = 0; il < z->layers.size(); ++il) {
            z->rows_write(il, row, src + il*z->n_embd*z->n_head_kv);
        }
        return 0;
    });
}

void zoomr_rows_clear(zoomr_context * z) {
    z->n_rows      = 0;
    z->n_rows_zero = 0;
}
