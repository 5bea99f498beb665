// The bindings of the kernels of sequence layers; included by bindings.cpp only.
#pragma once
#include <array>

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

// weights: of each layer the addresses of the weight, the bias, both before the present mini-batch, and both of the
// momentum. widths: of the first layer's inputs, then of each layer's outputs.
void memory(address q, address k, address v, address rate, address gate, address momentum, address norm_weight,
            address norm_bias, address begins, const std::vector<std::array<address, 6>>& weights,
            const std::vector<int64_t>& widths, address position, address y, int64_t sequences, int64_t tokens,
            int64_t heads, int64_t mini_batch, float scale, float eps, bool one_token, int dtype, int threads) {
  std::vector<ttt::MemoryLayer> layers;
  for (size_t l = 0; l < weights.size(); l++) {
    const auto& [weight, bias, start_weight, start_bias, velocity, velocity_bias] = weights[l];
    layers.push_back({out<float>(weight), out<float>(bias), out<float>(start_weight), out<float>(start_bias),
                      out<float>(velocity), out<float>(velocity_bias), widths.at(l), widths.at(l + 1)});
  }
  ttt::Memory a = {};
  a.q = in<void>(q);
  a.k = in<void>(k);
  a.v = in<void>(v);
  a.rate = in<float>(rate);
  a.gate = in<float>(gate);
  a.momentum = in<float>(momentum);
  a.norm_weight = in<float>(norm_weight);
  a.norm_bias = in<float>(norm_bias);
  a.begins = in<int64_t>(begins);
  a.layers = layers.data();
  a.position = in<int64_t>(position);
  a.out = out<void>(y);
  a.sequences = sequences;
  a.tokens = tokens;
  a.heads = heads;
  a.width = widths.at(0);
  a.depth = static_cast<int64_t>(layers.size());
  a.mini_batch = mini_batch;
  a.scale = scale;
  a.eps = eps;
  a.one_token = one_token;
  a.dtype = dtype;
  a.threads = threads;
  py::gil_scoped_release release;
  active->memory(a);
}

void swiglu_token(address q, address k, address v, address rates, const std::array<address, 3>& weights,
                  const std::array<address, 3>& sums, address y, int64_t rows, int64_t width, int64_t inner,
                  int threads) {
  ttt::SwigluToken a = {};
  a.q = in<float>(q);
  a.k = in<float>(k);
  a.v = in<float>(v);
  a.rates = in<float>(rates);
  for (int i = 0; i < 3; i++) {
    a.weights[i] = in<float>(weights[i]);
    a.sums[i] = out<float>(sums[i]);
  }
  a.out = out<float>(y);
  a.rows = rows;
  a.width = width;
  a.inner = inner;
  a.threads = threads;
  py::gil_scoped_release release;
  active->swiglu_token(a);
}

inline void bind_sequence(py::module_& m) {
  m.def("delta_rule", &delta_rule);
  m.def("memory", &memory);
  m.def("swiglu_token", &swiglu_token);
}

}  // namespace
