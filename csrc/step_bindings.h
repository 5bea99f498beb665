// The bindings of steps of sequence layers, which read one token of each sequence; included by bindings.cpp only.
//
// For a state that fits into the cache, checks in Python and torch's dispatcher take several times as long as the
// kernels. So these functions take the tensors themselves, and check them here. Where a tensor is not what the kernels
// read, they have written nothing and say so: the checks of ttt/ops/sequence then name what is wrong, or make of it
// what the kernels read.
#pragma once
#include <cstring>
#include <vector>

#include "isa_bindings.h"
#include "tensor_view.h"

namespace {

// A token (B, H, D) of `dtype`, whose heads follow each other; `by` becomes the numbers from one sequence to the next.
inline bool read_token(py::handle object, int dtype, int64_t batch, int64_t heads, int64_t width, const void** data,
                       int64_t* by) {
  TensorView t;
  if (!TensorReader::read(object, &t) || t.dtype() != dtype || !t.has_shape({batch, heads, width}) || !t.is_dense(1))
    return false;
  *data = t.data;
  *by = t.strides[0];
  return true;
}

// Numbers (B, H) of a token in float32, or None where `optional`, which leaves null.
inline bool read_factor(py::handle object, bool optional, int64_t batch, int64_t heads, const float** data,
                        int64_t* by) {
  if (object.is_none()) return optional;
  TensorView t;
  if (!TensorReader::read(object, &t) || !t.is_float32() || !t.has_shape({batch, heads}) || !t.is_dense(1))
    return false;
  *data = static_cast<const float*>(t.data);
  *by = t.strides[0];
  return true;
}

// A contiguous tensor of float32 of the given shape.
inline bool read_plain(py::handle object, std::initializer_list<int64_t> shape, float** data) {
  TensorView t;
  if (!TensorReader::read(object, &t) || !t.is_float32() || !t.has_shape(shape) || !t.is_dense()) return false;
  *data = static_cast<float*>(t.data);
  return true;
}

// A parameter (H, D), contiguous, in float32 or in bfloat16, of which `copy` holds the numbers in float32 then.
inline bool read_parameter(py::handle object, int64_t heads, int64_t width, std::vector<float>* copy,
                           const float** data) {
  TensorView t;
  if (!TensorReader::read(object, &t) || t.dtype() < 0 || !t.has_shape({heads, width}) || !t.is_dense()) return false;
  *data = static_cast<const float*>(t.data);
  if (t.is_float32()) return true;
  copy->resize(static_cast<size_t>(heads * width));
  for (size_t i = 0; i < copy->size(); i++) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(t.data)[i]) << 16;
    std::memcpy(&(*copy)[i], &bits, sizeof bits);
  }
  *data = copy->data();
  return true;
}

// Positions (B,) in int64.
inline bool read_position(py::handle object, int64_t batch, int64_t** data) {
  TensorView t;
  if (!TensorReader::read(object, &t) || !t.is_int64() || !t.has_shape({batch}) || !t.is_dense()) return false;
  *data = static_cast<int64_t*>(t.data);
  return true;
}

// What the output is written to: contiguous, of `dtype`, and no other shape than that of the tokens.
inline bool read_out(py::handle object, int dtype, int64_t batch, int64_t heads, int64_t width, void** data) {
  TensorView t;
  if (!TensorReader::read(object, &t) || t.dtype() != dtype || !t.has_shape({batch, heads, width}) || !t.is_dense())
    return false;
  *data = t.data;
  return true;
}

// The tensors of a tuple or list; none for other objects.
class Items {
 public:
  explicit Items(py::handle object) : listed_(PyTuple_Check(object.ptr()) || PyList_Check(object.ptr())) {
    if (!listed_) return;
    count_ = static_cast<size_t>(PySequence_Fast_GET_SIZE(object.ptr()));
    items_ = PySequence_Fast_ITEMS(object.ptr());
  }
  bool have(size_t count) const { return listed_ && count_ == count; }
  size_t size() const { return count_; }
  py::handle operator[](size_t i) const { return items_[i]; }

 private:
  bool listed_;
  size_t count_ = 0;
  PyObject** items_ = nullptr;
};

// The sizes of q, which is (B, H, D), and its dtype, of those that kernels take.
struct Token {
  int64_t batch, heads, width;
  int dtype;

  bool read(py::handle q) {
    TensorView t;
    if (!TensorReader::read(q, &t) || t.dims != 3 || t.dtype() < 0 || t.shape[2] < 1) return false;
    batch = t.shape[0];
    heads = t.shape[1];
    width = t.shape[2];
    dtype = t.dtype();
    return true;
  }
};

bool delta_rule_step(py::handle q, py::handle k, py::handle v, py::handle beta, py::handle gate, py::handle state,
                     py::handle y, float scale, int threads) {
  Token token;
  TensorView values;
  if (!token.read(q) || !TensorReader::read(v, &values) || values.dims != 3) return false;
  const auto [batch, heads, keys, dtype] = token;
  const int64_t width = values.shape[2];
  ttt::DeltaRuleStep step = {};
  ttt::DeltaRule& a = step.of;
  ttt::TokenSteps& by = step.steps;
  const bool fit =
      read_token(q, dtype, batch, heads, keys, &a.q, &by.q) && read_token(k, dtype, batch, heads, keys, &a.k, &by.k) &&
      read_token(v, dtype, batch, heads, width, &a.v, &by.v) &&
      read_factor(beta, false, batch, heads, &a.beta, &by.rate) &&
      read_factor(gate, true, batch, heads, &a.gate, &by.gate) &&
      read_plain(state, {batch, heads, keys, width}, &a.state) && read_out(y, dtype, batch, heads, width, &a.out);
  if (!fit) return false;
  a.sequences = batch;
  a.tokens = 1;
  a.heads = heads;
  a.keys = keys;
  a.values = width;
  a.scale = scale;
  a.dtype = dtype;
  a.threads = threads;
  py::gil_scoped_release release;
  active->delta_rule_step(step);
  return true;
}

// The layers of a memory from the tuples of its state: weights and biases in turn, and the sizes that they agree in.
inline bool read_layers(const Token& token, const Items& weights, const Items& start, const Items& velocity,
                        bool moving, std::vector<ttt::MemoryLayer>* layers) {
  const size_t count = weights.size();
  if (count == 0 || count % 2 || !start.have(count) || !velocity.have(moving ? count : 0)) return false;
  int64_t inputs = token.width;
  for (size_t i = 0; i < count; i += 2) {
    TensorView first;
    if (!TensorReader::read(weights[i], &first) || first.dims != 4) return false;
    const int64_t outputs = first.shape[3];
    ttt::MemoryLayer layer = {};
    layer.inputs = inputs;
    layer.outputs = outputs;
    const auto read = [&](const Items& from, float** weight, float** bias) {
      return read_plain(from[i], {token.batch, token.heads, inputs, outputs}, weight) &&
             read_plain(from[i + 1], {token.batch, token.heads, outputs}, bias);
    };
    if (!read(weights, &layer.weight, &layer.bias) || !read(start, &layer.start_weight, &layer.start_bias) ||
        (moving && !read(velocity, &layer.velocity, &layer.velocity_bias)))
      return false;
    layers->push_back(layer);
    inputs = outputs;
  }
  return inputs == token.width;
}

bool memory_step(py::handle q, py::handle k, py::handle v, py::handle rate, py::handle gate, py::handle momentum,
                 py::handle norm_weight, py::handle norm_bias, float eps, py::handle weights, py::handle start,
                 py::handle velocity, py::handle position, py::handle y, int64_t mini_batch, float scale, int threads) {
  Token token;
  std::vector<ttt::MemoryLayer> layers;
  if (!token.read(q) || mini_batch < 1 ||
      !read_layers(token, Items(weights), Items(start), Items(velocity), !momentum.is_none(), &layers))
    return false;
  const auto [batch, heads, width, dtype] = token;
  ttt::MemoryStep step = {};
  ttt::Memory& a = step.of;
  ttt::TokenSteps& by = step.steps;
  const bool fit = read_token(q, dtype, batch, heads, width, &a.q, &by.q) &&
                   read_token(k, dtype, batch, heads, width, &a.k, &by.k) &&
                   read_token(v, dtype, batch, heads, width, &a.v, &by.v) &&
                   read_factor(rate, false, batch, heads, &a.rate, &by.rate) &&
                   read_factor(gate, true, batch, heads, &a.gate, &by.gate) &&
                   read_factor(momentum, true, batch, heads, &a.momentum, &by.momentum) &&
                   read_position(position, batch, &step.position) && read_out(y, dtype, batch, heads, width, &a.out);
  if (!fit) return false;
  std::vector<float> weight, bias;
  if (!norm_weight.is_none() && (!read_parameter(norm_weight, heads, width, &weight, &a.norm_weight) ||
                                 !read_parameter(norm_bias, heads, width, &bias, &a.norm_bias)))
    return false;
  a.layers = layers.data();
  a.position = step.position;
  a.sequences = batch;
  a.tokens = 1;
  a.heads = heads;
  a.width = width;
  a.depth = static_cast<int64_t>(layers.size());
  a.mini_batch = mini_batch;
  a.scale = scale;
  a.eps = eps;
  a.dtype = dtype;
  a.threads = threads;
  py::gil_scoped_release release;
  active->memory_step(step);
  return true;
}

// Rates (B, H, count) in float32, at any strides; (B, H) with a single weight.
inline bool read_rates(py::handle object, int64_t batch, int64_t heads, int64_t count, ttt::LargeChunkStep* a) {
  TensorView t;
  if (!TensorReader::read(object, &t) || !t.is_float32()) return false;
  if (count == 1 ? !t.has_shape({batch, heads}) : !t.has_shape({batch, heads, count})) return false;
  a->rates = static_cast<const float*>(t.data);
  a->steps.rate = t.strides[0];
  a->rate_by_head = t.strides[1];
  a->rate_by_weight = count == 1 ? 0 : t.strides[2];
  return true;
}

// Fast weights that change when `size` tokens have been read. The result is 0 where nothing was done, 1 where the token
// was read, 2 where some sequence has read so many with it. The velocities and norms, which are not used before that,
// are only looked at; None where that has been done.
int large_chunk_step(py::handle q, py::handle k, py::handle v, py::handle rates, py::handle momentum,
                     py::handle all_weights, py::handle all_sums, py::handle velocity, py::handle norms,
                     py::handle total_momentum, py::handle position, py::handle y, int64_t size, float scale,
                     int threads) {
  Token token;
  TensorView values, first;
  const Items weights(all_weights), sums(all_sums), velocities(velocity), kept(norms);
  const size_t count = weights.size();
  if ((count != 1 && count != 3) || !sums.have(count) || size < 1 || !token.read(q)) return 0;
  if (!TensorReader::read(v, &values) || values.dims != 3 || !TensorReader::read(weights[0], &first) || first.dims != 4)
    return 0;
  const auto [batch, heads, inputs, dtype] = token;
  const int64_t outputs = values.shape[2], inner = first.shape[3];
  if ((count == 3 && outputs != inputs) || momentum.is_none() != total_momentum.is_none()) return 0;
  if (!velocity.is_none() && !velocities.have(momentum.is_none() ? 0 : count)) return 0;
  if (!norms.is_none() && !kept.have(0) && !kept.have(count)) return 0;
  ttt::LargeChunkStep a = {};
  ttt::TokenSteps& by = a.steps;
  bool fit = read_token(q, dtype, batch, heads, inputs, &a.q, &by.q) &&
             read_token(k, dtype, batch, heads, inputs, &a.k, &by.k) &&
             read_token(v, dtype, batch, heads, outputs, &a.v, &by.v) &&
             read_rates(rates, batch, heads, static_cast<int64_t>(count), &a) &&
             read_factor(momentum, true, batch, heads, &a.momentum, &by.momentum) &&
             (momentum.is_none() || read_plain(total_momentum, {batch, heads}, &a.total_momentum)) &&
             read_position(position, batch, &a.position) && read_out(y, dtype, batch, heads, outputs, &a.out);
  for (size_t i = 0; fit && i < count; i++) {
    const int64_t from = i == 1 ? inner : inputs, to = count == 1 || i == 1 ? outputs : inner;
    float *weight, *unused;
    fit = read_plain(weights[i], {batch, heads, from, to}, &weight) &&
          read_plain(sums[i], {batch, heads, from, to}, &a.sums[i]) &&
          (velocities.size() == 0 || read_plain(velocities[i], {batch, heads, from, to}, &unused)) &&
          (kept.size() == 0 || read_plain(kept[i], {batch, heads, 1, to}, &unused));
    a.weights[i] = weight;
  }
  if (!fit) return 0;
  a.sequences = batch;
  a.heads = heads;
  a.inputs = inputs;
  a.outputs = outputs;
  a.inner = inner;
  a.count = static_cast<int64_t>(count);
  a.scale = scale;
  a.dtype = dtype;
  a.threads = threads;
  py::gil_scoped_release release;
  active->large_chunk_step(a);
  for (int64_t s = 0; s < batch; s++)
    if (a.position[s] >= size) return 2;
  return 1;
}

inline void bind_steps(py::module_& m) {
  m.def("read_tensors", &TensorReader::use, py::arg("tensor"), py::arg("parameter"),
        "Steps read tensors of these two types from now on: torch.Tensor and torch.nn.Parameter. Returns why they "
        "cannot, or an empty text.");
  m.def("delta_rule_step", &delta_rule_step);
  m.def("memory_step", &memory_step);
  m.def("large_chunk_step", &large_chunk_step);
}

}  // namespace
