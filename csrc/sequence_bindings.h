// The bindings of the kernels of sequence layers; included by bindings.cpp only.
#pragma once
#include "isa_bindings.h"

namespace {

void delta_rule(address q, address k, address v, address beta, address gate, address begins, address state, address y,
                int64_t sequences, int64_t tokens, int64_t heads, int64_t keys, int64_t values, float scale,
                bool one_token, int dtype, int threads) {
  ttt::DeltaRule a = {};
  a.q = in<void>(q);
  a.k = in<void>(k);
  a.v = in<void>(v);
  a.beta = in<float>(beta);
  a.gate = in<float>(gate);
  a.begins = in<int64_t>(begins);
  a.state = out<float>(state);
  a.out = out<void>(y);
  a.sequences = sequences;
  a.tokens = tokens;
  a.heads = heads;
  a.keys = keys;
  a.values = values;
  a.scale = scale;
  a.one_token = one_token;
  a.dtype = dtype;
  a.threads = threads;
  py::gil_scoped_release release;
  active->delta_rule(a);
}

void ttt_linear(address q, address k, address v, address rate, address norm_weight, address norm_bias, address begins,
                address weight, address bias, address start_weight, address start_bias, address position, address y,
                int64_t sequences, int64_t tokens, int64_t heads, int64_t width, int64_t mini_batch, float scale,
                float eps, bool one_token, int dtype, int threads) {
  ttt::TTTLinear a = {};
  a.q = in<void>(q);
  a.k = in<void>(k);
  a.v = in<void>(v);
  a.rate = in<float>(rate);
  a.norm_weight = in<float>(norm_weight);
  a.norm_bias = in<float>(norm_bias);
  a.begins = in<int64_t>(begins);
  a.weight = out<float>(weight);
  a.bias = out<float>(bias);
  a.start_weight = out<float>(start_weight);
  a.start_bias = out<float>(start_bias);
  a.position = in<int64_t>(position);
  a.out = out<void>(y);
  a.sequences = sequences;
  a.tokens = tokens;
  a.heads = heads;
  a.width = width;
  a.mini_batch = mini_batch;
  a.scale = scale;
  a.eps = eps;
  a.one_token = one_token;
  a.dtype = dtype;
  a.threads = threads;
  py::gil_scoped_release release;
  active->ttt_linear(a);
}

inline void bind_sequence(py::module_& m) {
  m.def("delta_rule", &delta_rule);
  m.def("ttt_linear", &ttt_linear);
}

}  // namespace
