// Writes one register tile of W and F: the proximal step, stochastic rounding, the trace.
#pragma once
#include "log8.h"
#include "product.h"
#include "rounding.h"
#include "vec.h"

namespace {

struct Scalars {
  float pull;                          // lam * sum(eta)
  float decay;                         // decay * sum(eta)
  float keep;                          // gamma^T
  bool si, draws;                      // draws: random bits are needed
  bool writes;                         // the weight changes; false if all rates are 0 and nothing is replayed
  float carry, gain, remember, share;  // of the momentum: ttt/ops/momentum.py, where `remember` is called `keep`
};

// A part of a row of importance or trace: numbers, or 8-bit codes with the exponents of their blocks.
template <class S>
struct State {
  S* value;
  uint8_t* exponent;
};

template <class S>
inline State<S> state_at(void* base, int64_t i, int64_t j, int64_t n) {
  if (base == nullptr) return {nullptr, nullptr};
  if constexpr (sizeof(S) == 1) {
    S* row = static_cast<S*>(base) + i * packed_width(n);
    return {row + j, reinterpret_cast<uint8_t*>(row + n) + j / BLOCK};
  }
  return {static_cast<S*>(base) + i * n + j, nullptr};
}

template <bool split, class S>
inline Two load_state(const State<S>& s, int at) {
  if constexpr (sizeof(S) == 1)
    return decode2<split>(s.value + at, s.exponent[at / BLOCK]);
  else
    return load2<split>(s.value + at);
}

// `usual`: the weight changes and is pulled by its importance, and there is a trace other than that of Synaptic
// Intelligence. These conditions are then known at compile time.
template <bool usual, class W, class S>
__attribute__((always_inline)) inline void update_row(W* weight, const W* anchor, const State<S>& importance,
                                                      const State<S>& trace, const vf* g, const vf* s, RowKey key,
                                                      int64_t column, const Scalars& k) {
  constexpr bool split = splits<W>, rounds = sizeof(W) == 2 || sizeof(S) < 4;
  constexpr int strips = NC / STRIP;
  const bool writes = usual || k.writes, pulls = usual || anchor != nullptr, traces = usual || trace.value != nullptr;
  Two grown[strips];
  [[maybe_unused]] Bits later[strips];
#pragma GCC unroll 4
  for (int strip = 0; strip < strips; strip++) {
    const int at = strip * STRIP;
    const vu words = rounds && (usual || k.draws) ? random_words(key, column + at) : vu{};
    const Bits bits = bits_of<split>(words);
    // The trace is rounded with the bits of the other column of the pair: ttt/ops/rounding.py says why.
    const Bits others = split ? Bits{bits.b, bits.a} : bits_of<split>((words >> 16) | (words << 16));
    const Two old = writes ? load2<split>(weight + at) : Two{};
    Two change = {g[2 * strip], g[2 * strip + 1]};
    if (writes && pulls) {
      // The proximal step W* + (W - G - W*) / (1 + a), written so that G = 0 and a = 0 change no bit.
      const Two omega = usual || importance.value != nullptr ? load_state<split>(importance, at) : Two{};
      const Two from = load2<split>(anchor + at);
      const vf pull_a = k.pull * omega.a + k.decay, pull_b = k.pull * omega.b + k.decay;
      change.a = (change.a + pull_a * (old.a - from.a)) / (1.0f + pull_a);
      change.b = (change.b + pull_b * (old.b - from.b)) / (1.0f + pull_b);
    }
    Two now = old;
    if (writes) now = store2_rounded<split>(weight + at, {old.a - change.a, old.b - change.b}, bits);
    if (!traces) continue;
    const Two before = load_state<split>(trace, at);
    Two more = {s[2 * strip], s[2 * strip + 1]};
    if (!usual && k.si) more = {more.a * (old.a - now.a), more.b * (old.b - now.b)};
    grown[strip] = {k.keep * before.a + more.a, k.keep * before.b + more.b};
    if constexpr (sizeof(S) > 1)
      store2_rounded<split>(trace.value + at, grown[strip], others);
    else
      later[strip] = others;
  }
  if constexpr (sizeof(S) == 1) {
    if (traces) encode_blocks<split>(trace.value, trace.exponent, grown, later);
  }
}

// The tile whose first element is (i, j), and whose rows are `apart` rows from one another.
template <int MR, class W, class S>
struct Rows {
  const ttt::Commit& a;
  int64_t i, j, apart;

  Rows(const ttt::Commit& a, int64_t i, int64_t j, int64_t apart) : a(a), i(i), j(j), apart(apart) {}

  // Prefetches row r's NC columns: the processor does not detect this many streams by itself.
  void prefetch(int r, bool writes) const {
    const int64_t at = (i + r * apart) * a.n + j;
    if (writes) touch(static_cast<const W*>(a.weight) + at);
    if (writes && (a.decay > 0 || a.importance != nullptr)) touch(static_cast<const W*>(a.anchor) + at);
    if (writes && a.importance != nullptr) touch_state(const_cast<void*>(a.importance), r);
    if (a.trace != nullptr) touch_state(a.trace, r);
  }

  // Applies the momentum to the tokens' part g of G: g <- carry M + gain g, M <- remember M + share g.
  void pass_momentum(int tall, vf (&g)[MR][NV], const RowKey* keys, const Scalars& k) const {
    const int64_t at = i * a.n + j;
    if (a.momentum_dtype == ttt::kF32)
      pass_rows(static_cast<float*>(a.momentum) + at, tall, g, keys, k);
    else
      pass_rows(static_cast<bf16*>(a.momentum) + at, tall, g, keys, k);
  }

  __attribute__((always_inline)) void update(int tall, const vf (&g)[MR][NV], const vf (&s)[MR][NV], const RowKey* keys,
                                             const Scalars& k, bool pulls, bool traces, const Rows& ahead) const {
    const bool usual = pulls && traces && a.importance != nullptr && k.writes && !k.si;
    if (!usual) {
      vf g_copy[MR][NV], s_copy[MR][NV];  // the originals stay in registers
      std::memcpy(g_copy, g, sizeof g);
      std::memcpy(s_copy, s, sizeof s);
      for (int r = 0; r < tall; r++) ahead.prefetch(r, k.writes);
      update_rest(tall, g_copy, s_copy, keys, k, pulls, traces);
    } else if constexpr (MR <= MID) {
#pragma GCC unroll 4
      for (int r = 0; r < MR; r++)
        if (r < tall) {
          ahead.prefetch(r, true);
          update_one<true>(r, g[r], s[r], keys[r * apart], k, pulls, traces);
        }
    } else {
#pragma GCC unroll 1
      for (int r = 0; r < tall; r++) {
        ahead.prefetch(r, true);
        update_one<true>(r, g[r], s[r], keys[r * apart], k, pulls, traces);
      }
    }
  }

 private:
  __attribute__((noinline)) void update_rest(int tall, const vf (&g)[MR][NV], const vf (&s)[MR][NV], const RowKey* keys,
                                             const Scalars& k, bool pulls, bool traces) const {
#pragma GCC unroll 1
    for (int r = 0; r < tall; r++) update_one<false>(r, g[r], s[r], keys[r * apart], k, pulls, traces);
  }

  template <class V>
  __attribute__((noinline)) void pass_rows(V* momentum, int tall, vf (&g)[MR][NV], const RowKey* keys,
                                           const Scalars& k) const {
    constexpr bool split = splits<W>;
    for (int r = 0; r < tall; r++, momentum += apart * a.n)
      for (int at = 0; at < NC && at < a.n - j; at += STRIP) {
        const int64_t count = a.n - j - at;
        const Two before = load2_upto<split>(momentum + at, count);
        vf &first = g[r][at / VL], &second = g[r][at / VL + 1];
        const Two after = {k.remember * before.a + k.share * first, k.remember * before.b + k.share * second};
        first = k.carry * before.a + k.gain * first;
        second = k.carry * before.b + k.gain * second;
        Bits bits = {};
        if constexpr (sizeof(V) == 2) {
          // The bits of the other pair of four columns: ttt/ops/rounding.py says why.
          const vq words = (vq)random_words(keys[r * apart], j + at);
          bits = bits_of<split>((vu)((words >> 32) | (words << 32)));
        }
        if (count >= STRIP) {
          store2_rounded<split>(momentum + at, after, bits);
        } else {
          V part[STRIP];
          store2_rounded<split>(part, after, bits);
          std::memcpy(momentum + at, part, count * sizeof(V));
        }
      }
  }

  template <bool usual>
  __attribute__((always_inline)) void update_one(int r, const vf (&g)[NV], const vf (&s)[NV], RowKey key,
                                                 const Scalars& k, bool pulls, bool traces) const {
    const int64_t row = i + r * apart, at = row * a.n + j;
    W* weight = static_cast<W*>(a.weight) + at;
    const W* anchor = pulls ? static_cast<const W*>(a.anchor) + at : nullptr;
    const State<S> importance = state_at<S>(pulls ? const_cast<void*>(a.importance) : nullptr, row, j, a.n);
    const State<S> trace = state_at<S>(traces ? a.trace : nullptr, row, j, a.n);
    if (j + NC <= a.n) {
      update_row<usual>(weight, anchor, importance, trace, g, s, key, j, k);
    } else {
      vf g_copy[NV], s_copy[NV];
      std::memcpy(g_copy, g, sizeof g);
      std::memcpy(s_copy, s, sizeof s);
      update_part(weight, anchor, importance, trace, a.n - j, g_copy, s_copy, key, j, k);
    }
  }

  void touch_state(void* base, int r) const {
    const State<S> state = state_at<S>(base, i + r * apart, j, a.n);
    touch(state.value);
    if (sizeof(S) == 1 && j % (64 * BLOCK) == 0) __builtin_prefetch(state.exponent, 0, 3);
  }
  template <class T>
  static void touch(const T* p) {
    for (int64_t byte = 0; byte < static_cast<int64_t>(NC * sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 3);
  }

  // Updates the last columns of a row in copies that are padded with zeros.
  __attribute__((noinline)) static void update_part(W* weight, const W* anchor, const State<S>& importance,
                                                    const State<S>& trace, int64_t count, const vf* g, const vf* s,
                                                    RowKey key, int64_t column, const Scalars& k) {
    W w[NC] = {}, w0[NC] = {};
    S o[NC] = {};
    S f[NC] = {};
    uint8_t o_exponent[NC / BLOCK] = {}, f_exponent[NC / BLOCK] = {};
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
    std::memcpy(w, weight, count * sizeof(W));
    if (anchor) std::memcpy(w0, anchor, count * sizeof(W));
    if (importance.value) std::memcpy(o, importance.value, count * sizeof(S));
    if (importance.exponent) std::memcpy(o_exponent, importance.exponent, blocks);
    if (trace.value) std::memcpy(f, trace.value, count * sizeof(S));
    if (trace.exponent) std::memcpy(f_exponent, trace.exponent, blocks);
    update_row<false, W, S>(w, anchor ? w0 : nullptr, {importance.value ? o : nullptr, o_exponent},
                            {trace.value ? f : nullptr, f_exponent}, g, s, key, column, k);
    std::memcpy(weight, w, count * sizeof(W));
    if (trace.value) std::memcpy(trace.value, f, count * sizeof(S));
    if (trace.exponent) std::memcpy(trace.exponent, f_exponent, blocks);
  }
};

}  // namespace
