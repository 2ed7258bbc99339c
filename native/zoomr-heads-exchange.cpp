// A per-head store's layer in one call: tokens that are not wanted go to the caller's memory, those that are come back.
// The rows are those of zoomr_heads_page_out; which tokens go and come is worked out here, as it is for every token and layer.

#include "zoomr-heads.h"

namespace {

struct moves {
    std::vector<uint32_t>  leaving;  // cells
    std::vector<llama_pos> arriving;
};

struct exchange {
    zoomr_heads *       z;
    uint32_t            layer;
    zoomr_heads_layer & l;
    const uint8_t *     wanted; // [n_head_kv][n_pos]
    size_t              n_pos;
    uint8_t *           stored; // [n_head_kv][n_rows]
    uint8_t *           rows;   // [n_head_kv][n_rows][cell_bytes]
    size_t              n_rows;

    std::string where(uint32_t head) const {
        return "layer " + std::to_string(layer) + ", KV head " + std::to_string(head);
    }

    moves plan(uint32_t head) const {
        moves                out;
        std::vector<uint8_t> here(n_pos);

        for (uint32_t c = 0; c < l.n_cells; ++c) {
            const llama_pos p = l.pos[head*l.n_cells + c];
            if (p < 0) {
                continue;
            }
            if ((size_t) p >= n_pos) {
                throw zoomr_error { ZOOMR_ERR_ARGUMENT, where(head) + " holds position " + std::to_string(p) + ", it is said of " +
                    std::to_string(n_pos) + " which are wanted" };
            }
            here[p] = 1;
            if (!wanted[head*n_pos + p]) {
                out.leaving.push_back(c);
            }
        }
        for (size_t p = 0; p < n_pos; ++p) {
            if (!wanted[head*n_pos + p] || here[p]) {
                continue;
            }
            if (!stored[head*n_rows + p]) {
                throw zoomr_error { ZOOMR_ERR_ARGUMENT, where(head) + ": position " + std::to_string(p) + " is wanted, in no cell and not stored" };
            }
            out.arriving.push_back(p);
        }
        return out;
    }

    // with a pool the heads' moves add up
    void check_room(const std::vector<moves> & plans) const {
        std::vector<int64_t> missing(l.n_parts);
        for (uint32_t h = 0; h < z->n_head_kv; ++h) {
            missing[l.part(h)] += (int64_t) plans[h].arriving.size() - (int64_t) plans[h].leaving.size();
        }
        for (uint32_t ip = 0; ip < l.n_parts; ++ip) {
            if (missing[ip] > (int64_t) l.n_free[ip]) {
                throw zoomr_error { ZOOMR_ERR_SPACE, "what is wanted does not fit into " + where(ip) + ": " + std::to_string(missing[ip]) +
                    " cells more than now, " + std::to_string(l.n_free[ip]) + " of " + std::to_string(l.n_cells) + " are free" };
            }
        }
    }

    uint64_t let_go(uint32_t head, const std::vector<uint32_t> & cells) const {
        const size_t k_row = l.k->nb[1];
        uint64_t     n_new = 0;

        for (const uint32_t c : cells) {
            const size_t at = head*n_rows + l.pos[head*l.n_cells + c];
            if (!stored[at]) {
                uint8_t * row = rows + at*z->cell_bytes();
                z->copy_out(l, head, c, row, row + k_row);
                stored[at] = 1;
                n_new++;
            }
            l.free(head, c);
        }
        return n_new;
    }

    void take_in(uint32_t head, const std::vector<llama_pos> & positions) const {
        const size_t k_row = l.k->nb[1];

        for (const llama_pos p : positions) {
            const uint8_t * row = rows + (head*n_rows + p)*z->cell_bytes();
            z->copy_in(l, head, l.take(head, p), row, row + k_row);
        }
    }
};

} // namespace

int32_t zoomr_heads_exchange(zoomr_heads * z, uint32_t layer, const uint8_t * wanted, size_t n_pos, uint8_t * stored, void * rows, size_t n_rows,
                             zoomr_heads_moved * moved) {
    return zoomr_guard([&]() -> int32_t {
        const exchange x { z, layer, z->at(layer, 0), wanted, n_pos, stored, (uint8_t *) rows, n_rows };
        if (n_pos > n_rows || (int64_t) n_pos > (int64_t) z->pos_max + 1) {
            throw zoomr_error { ZOOMR_ERR_ARGUMENT, "of " + std::to_string(n_pos) + " tokens it is said which are wanted; " +
                std::to_string(z->pos_max + 1) + " were decoded, " + std::to_string(n_rows) + " can be stored" };
        }

        std::vector<moves> plans;
        for (uint32_t h = 0; h < z->n_head_kv; ++h) {
            plans.push_back(x.plan(h));
        }
        x.check_room(plans);

        z->ctx->synchronize();

        *moved = {};
        for (uint32_t h = 0; h < z->n_head_kv; ++h) {
            moved->n_stored  += x.let_go(h, plans[h].leaving);
            moved->n_evicted += plans[h].leaving.size();
        }
        for (uint32_t h = 0; h < z->n_head_kv; ++h) {
            x.take_in(h, plans[h].arriving);
            moved->n_recalled += plans[h].arriving.size();
        }
        z->uniform = z->uniform && moved->n_evicted + moved->n_recalled == 0;
        return 0;
    });
}
