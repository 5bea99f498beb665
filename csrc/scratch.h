// Uninitialised, cache-line aligned memory that a kernel keeps for one call.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

namespace {

class Scratch {
 public:
  explicit Scratch(size_t floats) : data_(nullptr) {
    if (floats == 0) return;
    const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
    data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

}  // namespace
