// The bindings of the kernels of sequence layers; included by bindings.cpp only.
#pragma once
#include <array>

#include "isa_bindings.h"

namespace {

ttt::DeltaRule delta_rule_of(address q, address k, address v, address beta, address gate, address begins, address kept,
                             int64_t sequences, int64_t tokens, int64_t heads, int64_t keys, int64_t values,
                             float scale, int dtype, int threads) {
  ttt::DeltaRule a = {};
  a.q = in<void>(q);
  a.k = in<void>(k);
  a.v = in<void>(v);
  a.beta = in<float>(beta);
  a.gate = in<float>(gate);
  a.begins = in<int64_t>(begins);
  a.kept = out<float>(kept);
  a.sequences = sequences;
  a.tokens = tokens;
  a.heads = heads;
  a.keys = keys;
  a.values = values;
  a.scale = scale;
  a.dtype = dtype;
  a.threads = threads;
  return a;
}

void delta_rule(address q, address k, address v, address beta, address gate, address begins, address kept,
                int64_t sequences, int64_t tokens, int64_t heads, int64_t keys, int64_t values, float scale, int dtype,
                int threads, address state, address y) {
  ttt::DeltaRule a =
      delta_rule_of(q, k, v, beta, gate, begins, kept, sequences, tokens, heads, keys, values, scale, dtype, threads);
  a.state = out<float>(state);
  a.out = out<void>(y);
  py::gil_scoped_release release;
  active->delta_rule(a);
}

// gradients: of the outputs and of the final state, which becomes that of the first one; then those that are written,
// of q, k, v, beta and the gates.
void delta_rule_backward(address q, address k, address v, address beta, address gate, address begins, address kept,
                         int64_t sequences, int64_t tokens, int64_t heads, int64_t keys, int64_t values, float scale,
                         int dtype, int threads, const std::array<address, 7>& gradients) {
  ttt::DeltaRuleBackward a = {};
  a.forward =
      delta_rule_of(q, k, v, beta, gate, begins, kept, sequences, tokens, heads, keys, values, scale, dtype, threads);
  a.out = in<void>(gradients[0]);
  a.state = out<float>(gradients[1]);
  a.q = out<void>(gradients[2]);
  a.k = out<void>(gradients[3]);
  a.v = out<void>(gradients[4]);
  a.beta = out<float>(gradients[5]);
  a.gate = out<float>(gradients[6]);
  py::gil_scoped_release release;
  active->delta_rule_backward(a);
}

using LayerAddresses = std::array<address, 10>;

// A call of a memory, with its layers.
struct MemoryCall {
  ttt::Memory memory;
  std::vector<ttt::MemoryLayer> layers;
};

// weights: of each layer the addresses of the weight, the bias, both before the present mini-batch, both of the
// momentum, and in training both that are kept, and of the momentum that is. widths: of the first layer's inputs, then
// of each layer's outputs.
std::vector<ttt::MemoryLayer> layers_of(const std::vector<LayerAddresses>& weights,
                                        const std::vector<int64_t>& widths) {
  std::vector<ttt::MemoryLayer> layers;
  for (size_t l = 0; l < weights.size(); l++) {
    const LayerAddresses& a = weights[l];
    layers.push_back({out<float>(a[0]), out<float>(a[1]), out<float>(a[2]), out<float>(a[3]), out<float>(a[4]),
                      out<float>(a[5]), out<float>(a[6]), out<float>(a[7]), out<float>(a[8]), out<float>(a[9]),
                      widths.at(l), widths.at(l + 1)});
  }
  return layers;
}

MemoryCall memory_of(address q, address k, address v, address rate, address gate, address momentum, address norm_weight,
                     address norm_bias, address begins, const std::vector<LayerAddresses>& weights,
                     const std::vector<int64_t>& widths, address position, int64_t sequences, int64_t tokens,
                     int64_t heads, int64_t mini_batch, float scale, float eps, int dtype, int threads) {
  MemoryCall call = {{}, layers_of(weights, widths)};
  ttt::Memory& a = call.memory;
  a.q = in<void>(q);
  a.k = in<void>(k);
  a.v = in<void>(v);
  a.rate = in<float>(rate);
  a.gate = in<float>(gate);
  a.momentum = in<float>(momentum);
  a.norm_weight = in<float>(norm_weight);
  a.norm_bias = in<float>(norm_bias);
  a.begins = in<int64_t>(begins);
  a.layers = call.layers.data();
  a.position = in<int64_t>(position);
  a.sequences = sequences;
  a.tokens = tokens;
  a.heads = heads;
  a.width = widths.at(0);
  a.depth = static_cast<int64_t>(call.layers.size());
  a.mini_batch = mini_batch;
  a.scale = scale;
  a.eps = eps;
  a.dtype = dtype;
  a.threads = threads;
  return call;
}

void memory(address q, address k, address v, address rate, address gate, address momentum, address norm_weight,
            address norm_bias, address begins, const std::vector<LayerAddresses>& weights,
            const std::vector<int64_t>& widths, address position, int64_t sequences, int64_t tokens, int64_t heads,
            int64_t mini_batch, float scale, float eps, int dtype, int threads, address y) {
  MemoryCall call = memory_of(q, k, v, rate, gate, momentum, norm_weight, norm_bias, begins, weights, widths, position,
                              sequences, tokens, heads, mini_batch, scale, eps, dtype, threads);
  call.memory.out = out<void>(y);
  py::gil_scoped_release release;
  active->memory(call.memory);
}

// gradients: of the outputs; then those that are written, of q, k, v, the rates, the gates, the momenta, and the norm's
// weight and bias. states: of each layer the gradients of the final state, which become those of the first one.
void memory_backward(address q, address k, address v, address rate, address gate, address momentum, address norm_weight,
                     address norm_bias, address begins, const std::vector<LayerAddresses>& weights,
                     const std::vector<int64_t>& widths, address position, int64_t sequences, int64_t tokens,
                     int64_t heads, int64_t mini_batch, float scale, float eps, int dtype, int threads,
                     const std::array<address, 9>& gradients, const std::vector<LayerAddresses>& states) {
  const MemoryCall call = memory_of(q, k, v, rate, gate, momentum, norm_weight, norm_bias, begins, weights, widths,
                                    position, sequences, tokens, heads, mini_batch, scale, eps, dtype, threads);
  const std::vector<ttt::MemoryLayer> layers = layers_of(states, widths);
  ttt::MemoryBackward a = {};
  a.forward = call.memory;
  a.out = in<void>(gradients[0]);
  a.layers = layers.data();
  a.q = out<void>(gradients[1]);
  a.k = out<void>(gradients[2]);
  a.v = out<void>(gradients[3]);
  a.rate = out<float>(gradients[4]);
  a.gate = out<float>(gradients[5]);
  a.momentum = out<float>(gradients[6]);
  a.norm_weight = out<float>(gradients[7]);
  a.norm_bias = out<float>(gradients[8]);
  py::gil_scoped_release release;
  active->memory_backward(a);
}

// state: the addresses of the weights, the sums, the velocities and the norms, and of the total momentum; 0 for none.
void large_chunk(address q, address k, address v, address rates, address momentum, address begins,
                 const std::vector<std::array<address, 4>>& state, address total_momentum, address position,
                 int64_t sequences, int64_t tokens, int64_t heads, int64_t inputs, int64_t outputs, int64_t inner,
                 int64_t size, bool orthogonal, float scale, int dtype, int threads, address y) {
  if (state.size() != 1 && state.size() != 3) throw py::value_error("a state has 1 weight or 3");
  ttt::LargeChunkText a = {};
  a.q = in<void>(q);
  a.k = in<void>(k);
  a.v = in<void>(v);
  a.rates = in<float>(rates);
  a.momentum = in<float>(momentum);
  a.begins = in<int64_t>(begins);
  for (size_t i = 0; i < state.size(); i++) {
    a.weights[i] = out<float>(state[i][0]);
    a.sums[i] = out<float>(state[i][1]);
    a.velocity[i] = out<float>(state[i][2]);
    a.norms[i] = in<float>(state[i][3]);
  }
  a.total_momentum = out<float>(total_momentum);
  a.position = in<int64_t>(position);
  a.out = out<void>(y);
  a.sequences = sequences;
  a.tokens = tokens;
  a.heads = heads;
  a.inputs = inputs;
  a.outputs = outputs;
  a.inner = inner;
  a.count = static_cast<int64_t>(state.size());
  a.size = size;
  a.orthogonal = orthogonal;
  a.scale = scale;
  a.dtype = dtype;
  a.threads = threads;
  py::gil_scoped_release release;
  active->large_chunk(a);
}

inline void bind_sequence(py::module_& m) {
  m.def("delta_rule", &delta_rule);
  m.def("delta_rule_backward", &delta_rule_backward);
  m.attr("DELTA_KEPT_TOKENS") = ttt::DELTA_KEPT_TOKENS;
  m.def("memory", &memory);
  m.def("memory_backward", &memory_backward);
  m.def("large_chunk", &large_chunk);
  m.attr("MEMORY_KEPT_MINI_BATCHES") = ttt::MEMORY_KEPT_MINI_BATCHES;
}

}  // namespace
