// The only header of ours that an upstream file includes (llama-graph.cpp). It declares the call site
// and nothing else, so that the patch stays one include and one statement there.

#pragma once

struct ggml_tensor;
struct llm_graph_context;

// adds the probe of one attention layer to the graph being built; called by llm_graph_context::build_attn_mha
// before q and k are permuted. does nothing unless a zoomr_context is attached (cparams.zoomr)
//   q: [n_embd_head_k, n_head,    n_tokens]  after RoPE and after the cache's own rotation
//   k: [n_embd_head_k, n_head_kv, n_kv, n_stream]  a view of the cache
void zoomr_graph_build(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, float kq_scale, int il);
