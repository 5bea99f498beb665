// The choice of an instruction set and the conversion of addresses; included by bindings.cpp only.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "api.h"
#include "attention_api.h"
#include "head_api.h"

namespace py = pybind11;
using address = uintptr_t;

namespace {

#ifdef TTT_X86
bool supports(const std::string& isa) {
  __builtin_cpu_init();
  if (isa == "amx") return supports("avx512bf16") && ttt::amx_tiles() != nullptr;
  if (isa == "amx, emulated") return supports("avx512bf16");
  if (isa == "avx512bf16") return supports("avx512") && __builtin_cpu_supports("avx512bf16");
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return isa == "portable";
}
#else
bool supports(const std::string& isa) { return isa == "portable"; }
#endif

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const char* isa : {"portable", "avx2", "avx512", "avx512bf16", "amx"})
    if (supports(isa)) names.push_back(isa);
  return names;
}

const ttt::Kernels* table_of(const std::string& isa) {
#ifdef TTT_X86
  if (isa == "avx512bf16" || isa.rfind("amx", 0) == 0) return &ttt::kernels_avx512bf16();
  if (isa == "avx512") return &ttt::kernels_avx512();
  if (isa == "avx2") return &ttt::kernels_avx2();
#endif
  return &ttt::kernels_portable();
}

const ttt::HeadKernels* head_table_of(const std::string& isa) {
#ifdef TTT_X86
  if (isa == "avx512bf16" || isa.rfind("amx", 0) == 0) return &ttt::head_avx512bf16();
  if (isa == "avx512") return &ttt::head_avx512();
  if (isa == "avx2") return &ttt::head_avx2();
#endif
  return &ttt::head_portable();
}

const ttt::AttentionKernels* attention_table_of(const std::string& isa) {
#ifdef TTT_X86
  if (isa == "avx512bf16" || isa.rfind("amx", 0) == 0) return &ttt::attention_avx512bf16();
  if (isa == "avx512") return &ttt::attention_avx512();
  if (isa == "avx2") return &ttt::attention_avx2();
#endif
  return &ttt::attention_portable();
}

// Intel's processors multiply pairs of bfloat16 at half the rate of float32 (a commit of 4096 x 4096, T = 256, on
// Emerald Rapids takes 111 ms with pairs, 71 ms with factors widened to float32), AMD's at twice that rate. With few
// tokens, pairs are faster on both.
const bool slow_dots = [] {
#ifdef TTT_X86
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}();

std::string active_isa = available_isas().back();
const ttt::Kernels* active = table_of(active_isa);
const ttt::HeadKernels* active_head = head_table_of(active_isa);
const ttt::AttentionKernels* active_attention = attention_table_of(active_isa);

const ttt::Tiles* tiles_of(const std::string& isa) {
  if (isa == "amx, emulated") return ttt::emulated_tiles();  // for tests
  return isa == "amx" ? ttt::amx_tiles() : nullptr;
}
const ttt::Tiles* active_tiles = tiles_of(active_isa);

void set_isa(const std::string& isa) {
  if (!supports(isa)) {
    std::string allowed;
    for (const auto& name : available_isas()) allowed += (allowed.empty() ? "" : ", ") + name;
    throw py::value_error("isa must be one that this processor has (" + allowed + "), got '" + isa + "'");
  }
  active_isa = isa;
  active = table_of(isa);
  active_head = head_table_of(isa);
  active_attention = attention_table_of(isa);
  active_tiles = tiles_of(isa);
}

template <class T>
const T* in(address a) {
  return reinterpret_cast<const T*>(a);
}
template <class T>
T* out(address a) {
  return reinterpret_cast<T*>(a);
}

}  // namespace
