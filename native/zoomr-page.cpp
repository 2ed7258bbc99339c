// Pages: the resident tokens of one sequence in a range of positions, as bytes. The only file that knows where
// a token's K and V rows lie; cell numbers never leave it.
//
// A page: header (64 bytes), positions (4 bytes a token, ascending), cell data (12 bytes a token), then for
// every paged layer the K rows and the V rows in position order. With a transposed V cache (flash attention
// off) V is channel-major, [n_embd_v_gqa][n_tokens]. Host byte order: a page is a cache, not an exchange format.
//
// zoomr-pack.cpp makes packed pages of them.

#include "zoomr-page.h"

#include <algorithm>
#include <cstring>
#include <limits>

// far above any context, far below where position + 1 overflows
static constexpr llama_pos ZOOMR_POS_MAX = 1 << 30;

// tokens that follow each other both in the page and in the cells are copied at once
struct zoomr_run {
    uint32_t i; // first token
    uint32_t cell;
    uint32_t n;
};

static std::vector<zoomr_run> merge_runs(const std::vector<zoomr_cell> & cells) {
    std::vector<zoomr_run> runs;
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!runs.empty() && runs.back().cell + runs.back().n == cells[i].second) {
            runs.back().n++;
        } else {
            runs.push_back({ i, cells[i].second, 1 });
        }
    }
    return runs;
}

void zoomr_get_bytes(const ggml_tensor * t, uint8_t * dst, size_t offs, size_t size) {
    if (ggml_backend_buffer_is_host(t->buffer)) {
        memcpy(dst, (const uint8_t *) t->data + offs, size);
    } else {
        ggml_backend_tensor_get(t, dst, offs, size);
    }
}

void zoomr_set_bytes(ggml_tensor * t, const uint8_t * src, size_t offs, size_t size) {
    if (ggml_backend_buffer_is_host(t->buffer)) {
        memcpy((uint8_t *) t->data + offs, src, size);
    } else {
        ggml_backend_tensor_set(t, src, offs, size);
    }
}

uint32_t zoomr_context::stream_of(llama_seq_id seq) const {
    return kv->get_stream(seq);
}

bool zoomr_context::v_by_channel() const {
    return kv->v_trans;
}

std::vector<zoomr_cell> zoomr_context::cells_in(llama_seq_id seq, llama_pos p0, llama_pos p1) const {
    if (seq < 0 || seq >= (llama_seq_id) n_seq_max) {
        throw zoomr_error { ZOOMR_ERR_ARGUMENT, "sequence " + std::to_string(seq) + " of " + std::to_string(n_seq_max) };
    }

    const auto & resident = kv->get_cells(seq).seq_pos_get(seq);

    std::vector<zoomr_cell> cells;
    for (auto it = resident.lower_bound({ p0, 0 }); it != resident.end() && it->first < p1; ++it) {
        cells.push_back(*it);
    }
    return cells;
}

void zoomr_context::settle() {
    ctx->synchronize();

    if (kv->get_has_shift()) {
        throw zoomr_error { ZOOMR_ERR_SHIFT, "positions were shifted (seq_add, seq_div): pages that left the cache would be stale" };
    }
    if (!kv->sc_info.empty()) {
        ctx->memory_update(false); // a sequence copy between streams moves its rows only now
    }
}

uint64_t zoomr_context::page_geometry() const {
    uint64_t hash = 0xcbf29ce484222325ull; // FNV-1a

    const auto add = [&](uint64_t x) {
        for (int i = 0; i < 8; ++i) {
            hash = (hash ^ ((x >> 8*i) & 0xff))*0x100000001b3ull;
        }
    };

    add(ZOOMR_ABI);
    add(kv->v_trans);
    add(kv->attn_rot_k);
    add(kv->attn_rot_v);
    for (const auto & layer : layers) {
        add(layer.il);
        add(layer.k->type);
        add(layer.k->ne[0]);
        add(layer.v->type);
        add(layer.v->ne[0]);
    }

    return hash;
}

size_t zoomr_context::page_size(uint64_t n_tokens) const {
    return sizeof(zoomr_page_header) + n_tokens*(sizeof(llama_pos) + sizeof(llama_kv_cell_ext) + kv_token_bytes(kv));
}

void zoomr_context::copy_out(const std::vector<zoomr_cell> & cells, uint32_t stream, uint8_t * dst) const {
    const auto   runs = merge_runs(cells);
    const size_t n    = cells.size();

    for (const auto & layer : layers) {
        const ggml_tensor * k = layer.k;
        const ggml_tensor * v = layer.v;

        for (const auto & run : runs) {
            zoomr_get_bytes(k, dst + run.i*k->nb[1], stream*k->nb[2] + run.cell*k->nb[1], run.n*k->nb[1]);
        }
        dst += n*k->nb[1];

        if (!kv->v_trans) {
            for (const auto & run : runs) {
                zoomr_get_bytes(v, dst + run.i*v->nb[1], stream*v->nb[2] + run.cell*v->nb[1], run.n*v->nb[1]);
            }
            dst += n*v->nb[1];
            continue;
        }

        const size_t es = v->nb[0];
        for (int64_t ch = 0; ch < v->ne[0]; ++ch) {
            for (const auto & run : runs) {
                zoomr_get_bytes(v, dst + run.i*es, stream*v->nb[2] + (ch*v->ne[1] + run.cell)*es, run.n*es);
            }
            dst += n*es;
        }
    }
}

void zoomr_context::copy_in(const std::vector<zoomr_cell> & cells, uint32_t stream, const uint8_t * src) {
    const auto   runs = merge_runs(cells);
    const size_t n    = cells.size();

    for (auto & layer : layers) {
        ggml_tensor * k = layer.k;
        ggml_tensor * v = layer.v;

        for (const auto & run : runs) {
            zoomr_set_bytes(k, src + run.i*k->nb[1], stream*k->nb[2] + run.cell*k->nb[1], run.n*k->nb[1]);
        }
        src += n*k->nb[1];

        if (!kv->v_trans) {
            for (const auto & run : runs) {
                zoomr_set_bytes(v, src + run.i*v->nb[1], stream*v->nb[2] + run.cell*v->nb[1], run.n*v->nb[1]);
            }
            src += n*v->nb[1];
            continue;
        }

        const size_t es = v->nb[0];
        for (int64_t ch = 0; ch < v->ne[0]; ++ch) {
            for (const auto & run : runs) {
                zoomr_set_bytes(v, src + run.i*es, stream*v->nb[2] + (ch*v->ne[1] + run.cell)*es, run.n*es);
            }
            src += n*es;
        }
    }
}

int64_t zoomr_page_tokens(zoomr_context * z, llama_seq_id seq, llama_pos p0, llama_pos p1) {
    return zoomr_guard([&]() -> int64_t {
        return z->cells_in(seq, p0, p1).size();
    });
}

int64_t zoomr_page_bytes(const zoomr_context * z, uint64_t n_tokens) {
    return z->page_size(n_tokens);
}

int64_t zoomr_page_write(zoomr_context * z, llama_seq_id seq, llama_pos p0, llama_pos p1, void * dst, size_t size) {
    return zoomr_guard([&]() -> int64_t {
        z->settle();

        const auto   cells = z->cells_in(seq, p0, p1);
        const size_t need  = z->page_size(cells.size());
        if (size < need) {
            throw zoomr_error { ZOOMR_ERR_SPACE, "a page of " + std::to_string(cells.size()) + " tokens needs " +
                std::to_string(need) + " bytes, the buffer has " + std::to_string(size) };
        }

        uint8_t * p = (uint8_t *) dst;

        zoomr_page_header header = {};
        header.magic    = ZOOMR_PAGE_MAGIC;
        header.abi      = ZOOMR_ABI;
        header.geometry = z->geometry;
        header.size     = need;
        header.n_tokens = cells.size();
        memcpy(p, &header, sizeof(header));
        p += sizeof(header);

        for (const auto & cell : cells) {
            memcpy(p, &cell.first, sizeof(llama_pos));
            p += sizeof(llama_pos);
        }
        for (const auto & cell : cells) {
            const llama_kv_cell_ext ext = z->kv->get_cells(seq).ext_get(cell.second);
            memcpy(p, &ext, sizeof(ext));
            p += sizeof(ext);
        }

        z->copy_out(cells, z->stream_of(seq), p);
        return need;
    });
}

int64_t zoomr_page_free(zoomr_context * z, llama_seq_id seq, llama_pos p0, llama_pos p1) {
    return zoomr_guard([&]() -> int64_t {
        z->settle();

        const int64_t n = z->cells_in(seq, p0, p1).size();
        if (n > 0) {
            // of this cache only: a sliding-window cache beside it recycles its own cells
            z->kv->seq_rm(seq, std::max(p0, 0), p1);
        }
        return n;
    });
}

const uint8_t * zoomr_context::page_parse(const uint8_t * src, size_t size,
        std::vector<llama_pos> & pos, std::vector<llama_kv_cell_ext> & ext) const {
    const auto bad = [](const std::string & what) {
        return zoomr_error { ZOOMR_ERR_PAGE, "not a page of this cache: " + what };
    };

    zoomr_page_header header;
    if (size < sizeof(header)) {
        throw bad("shorter than a header");
    }
    memcpy(&header, src, sizeof(header));

    if (header.magic != ZOOMR_PAGE_MAGIC || header.abi != ZOOMR_ABI) {
        throw bad("wrong magic or version");
    }
    if (header.geometry != geometry) {
        throw bad("made for another model, KV type or flash attention setting");
    }
    // the token count is bounded before it is multiplied, and must agree with what the caller holds
    if (header.n_tokens > kv->get_size() || header.size != size || page_size(header.n_tokens) != size) {
        throw bad("size of " + std::to_string(size) + " bytes does not match its header");
    }

    src += sizeof(header);
    pos.resize(header.n_tokens);
    ext.resize(header.n_tokens);
    memcpy(pos.data(), src, pos.size()*sizeof(pos[0]));
    src += pos.size()*sizeof(pos[0]);
    memcpy((void *) ext.data(), src, ext.size()*sizeof(ext[0]));
    src += ext.size()*sizeof(ext[0]);

    const llama_token n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(&ctx->get_model()));
    for (size_t i = 0; i < pos.size(); ++i) {
        if (pos[i] < 0 || pos[i] >= ZOOMR_POS_MAX || (i > 0 && pos[i] <= pos[i - 1])) {
            throw bad("positions are not ascending");
        }
        if (ext[i].tok < LLAMA_TOKEN_NULL || ext[i].tok >= n_vocab) {
            throw bad("a token outside of the vocabulary");
        }
    }

    return src;
}

void zoomr_context::page_place(llama_seq_id seq, const std::vector<llama_pos> & pos, const std::vector<llama_kv_cell_ext> & ext, const uint8_t * rows) {
    const uint32_t stream = stream_of(seq);
    auto         & cells  = kv->v_cells[stream];

    std::vector<zoomr_cell> placed;
    placed.reserve(pos.size());

    // lowest first: attention runs over all cells up to the highest one in use
    for (uint32_t i = 0; i < cells.size() && placed.size() < pos.size(); ++i) {
        if (cells.is_empty(i)) {
            placed.emplace_back(pos[placed.size()], i);
        }
    }
    if (placed.size() < pos.size()) {
        throw zoomr_error { ZOOMR_ERR_SPACE, "a page of " + std::to_string(pos.size()) + " tokens does not fit: " +
            std::to_string(placed.size()) + " of " + std::to_string(cells.size()) + " cells are free" };
    }

    for (size_t i = 0; i < placed.size(); ++i) {
        cells.pos_set(placed[i].second, placed[i].first);
        cells.ext_set(placed[i].second, ext[i]);
        cells.seq_add(placed[i].second, seq);
    }

    copy_in(placed, stream, rows);
}

int64_t zoomr_page_in(zoomr_context * z, llama_seq_id seq, const void * src, size_t size) {
    return zoomr_guard([&]() -> int64_t {
        z->settle();

        std::vector<llama_pos>         pos;
        std::vector<llama_kv_cell_ext> ext;
        const uint8_t * rows = z->page_parse((const uint8_t *) src, size, pos, ext);

        const auto resident = z->cells_in(seq, pos.empty() ? 0 : pos.front(), pos.empty() ? 0 : pos.back() + 1);
        for (const auto & cell : resident) {
            if (std::binary_search(pos.begin(), pos.end(), cell.first)) {
                throw zoomr_error { ZOOMR_ERR_DUPLICATE, "position " + std::to_string(cell.first) + " is resident already" };
            }
        }

        z->page_place(seq, pos, ext, rows);
        return pos.size();
    });
}
