// What many layers do in one call, as the experts of a mixture, each with rows of its own. What they learn has the bits
// of `Layer::learn`. Outputs have those of `Layer::forward` if the product with the weight is made in the same place,
// in these kernels or by torch. A layer that is called by itself leaves it to torch from fewer rows on (_FUSED_TOKENS
// of ttt/ops/cpu.py) than many layers do (FEW_OF_MANY), and between the two numbers the outputs differ by rounding. So
// do gradients, which torch alone computes for a layer that is passed back through by itself. Included by bindings.cpp
// only.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "failure.h"
#include "layer_bindings.h"

namespace {

using Layers = std::vector<const Layer*>;

// Calls f(i, threads) for i from 0 to `count`. Each thread takes whole layers, unless there are fewer of them than
// threads: then all threads share each layer.
template <class F>
void for_each_layer(int64_t count, int threads, const F& f) {
  if (threads <= 1 || count < threads) {
    for (int64_t i = 0; i < count; i++) f(i, threads);
    return;
  }
  Failure failure;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; i++) failure.of([&] { f(i, 1); });
  failure.rethrow();
}

// Throws if one of the layers is None in Python.
void check_given(const Layers& layers) {
  if (std::find(layers.begin(), layers.end(), nullptr) != layers.end())
    throw std::invalid_argument("layers must not be None");
}

// The first row of each layer, where the rows of all of them follow one another.
std::vector<int64_t> first_rows(const Layers& layers, const std::vector<int64_t>& counts) {
  if (counts.size() != layers.size()) throw std::invalid_argument("counts must have a number for each layer");
  check_given(layers);
  std::vector<int64_t> first;
  int64_t total = 0;
  for (size_t i = 0; i < layers.size(); i++) {
    const Layer &a = *layers[i], &b = *layers[0];
    if (a.m != b.m || a.n != b.n || a.dtype != b.dtype) throw std::invalid_argument("layers must be of one kind");
    if (counts[i] < 0) throw std::invalid_argument("counts must not be negative");
    first.push_back(total);
    total += counts[i];
  }
  return first;
}

// y (R, m) of the rows x (R, n). Of layers with more than `few` rows, y holds the product with the weight already.
void forward_many(const Layers& layers, address x, address y, const std::vector<int64_t>& counts, int64_t few,
                  int threads) {
  const std::vector<int64_t> first = first_rows(layers, counts);
  for_each_layer(layers.size(), threads, [&](int64_t i, int own) {
    const Layer& layer = *layers[i];
    const int64_t at = first[i] * layer.element();
    layer.forward(x + at * layer.n, y + at * layer.m, counts[i], own, counts[i] > few);
  });
}

// x (R, n), the gradients at the inputs, of those at the outputs, delta (R, m). `few` as above.
void backward_many(const Layers& layers, address delta, address x, const std::vector<int64_t>& counts, int64_t few,
                   int threads) {
  const std::vector<int64_t> first = first_rows(layers, counts);
  for_each_layer(layers.size(), threads, [&](int64_t i, int own) {
    const Layer& layer = *layers[i];
    const int64_t at = first[i] * layer.element();
    layer.backward(delta + at * layer.m, x + at * layer.n, counts[i], own, counts[i] > few);
  });
}

// pairs (L, rows, C) of x (L, rows, n) and delta (L, rows, m); of layer i only the first counts[i] rows are written.
void pairs_many(const Layers& layers, address x, address delta, address pairs, const std::vector<int64_t>& counts,
                int64_t rows, int threads) {
  first_rows(layers, counts);  // checks them
  for (const Layer* layer : layers)
    if (layer->window != layers[0]->window) throw std::invalid_argument("layers must have windows of one size");
  for (int64_t count : counts)
    if (count > rows) throw std::invalid_argument("counts must be at most the number of rows");
  for_each_layer(layers.size(), threads, [&](int64_t i, int own) {
    const Layer& layer = *layers[i];
    const int64_t at = i * rows * layer.element();
    layer.pairs(x + at * layer.n, delta + at * layer.m, pairs + i * rows * layer.window * sizeof(float), counts[i],
                own);
  });
}

// Each layer learns its own rows. Throws, and writes nothing, if the rows or a counter of one of them are out of range
// or a layer is there twice: its rows would be checked, and written, as if it had not learnt the others.
void learn_many(const Layers& layers, const std::vector<LearntRows::Given>& given, int threads) {
  if (given.size() != layers.size()) throw std::invalid_argument("each layer must have rows");
  check_given(layers);
  Layers sorted = layers;
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
    throw std::invalid_argument("layers must not be there twice");
  for (size_t i = 0; i < layers.size(); i++) layers[i]->check(LearntRows::of(given[i]));
  for_each_layer(layers.size(), threads, [&](int64_t i, int own) { layers[i]->learn(LearntRows::of(given[i]), own); });
}

inline void bind_many_layers(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> released;
  m.def("forward_many", &forward_many, released);
  m.def("backward_many", &backward_many, released);
  m.def("pairs_many", &pairs_many, released);
  m.def("learn_many", &learn_many, released);
}

}  // namespace
