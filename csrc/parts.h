// The working memory of a kernel's thread, as one piece of scratch memory that is split into parts.
#pragma once
#include <cstdint>

#include "scratch.h"

namespace {

// Parts of a piece of memory, one after the other. With null they are only counted.
struct Parts {
  float* memory;
  int64_t used;

  float* take(int64_t count) {
    used += count;
    return memory == nullptr ? nullptr : memory + used - count;
  }
};

// An M for the call `a`, in scratch memory of its own. M's constructor takes the call, and where its parts come from.
template <class M>
struct InScratch {
  Scratch scratch;
  Parts parts;
  M memory;

  template <class Call>
  explicit InScratch(const Call& a) : scratch(floats_of(a)), parts{scratch.get(), 0}, memory(a, &parts) {}

  template <class Call>
  static int64_t floats_of(const Call& a) {
    Parts counted = {nullptr, 0};
    M(a, &counted);
    return counted.used;
  }
};

}  // namespace
