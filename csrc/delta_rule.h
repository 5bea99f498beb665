// The gated delta rule: ttt/ops/sequence/delta_rule.py has the formulas. The chunk form for texts, and one token.
#pragma once
#include <cmath>

#include "api.h"
#include "scratch.h"
#include "sequence_product.h"

namespace {

// Tokens of a chunk. Products with the state cost the same for each token; those within a chunk grow with its length.
constexpr int64_t DELTA_CHUNK = 32;

// The chunks from one state that is kept for the backward pass to the next.
constexpr int64_t DELTA_KEPT = ttt::DELTA_KEPT_TOKENS / DELTA_CHUNK;

// Which of the kept states is the first of a sequence. Sequences have one for each DELTA_KEPT chunks, so that all have
// at most one for each DELTA_KEPT_TOKENS tokens and one more for each sequence.
inline int64_t first_kept(int64_t begin, int64_t sequence) { return begin / ttt::DELTA_KEPT_TOKENS + sequence; }

struct DeltaGates {
  float beta[DELTA_CHUNK];   // beta_i
  float grown[DELTA_CHUNK];  // e^{G_i}
  float ratio[DELTA_CHUNK];  // e^{G_C - G_i}
  float total;               // e^{G_C}
};

// The errors e = u / beta of `some` tokens from the rows k and v, and the state: (I + L)^-1 (v - diag(e^G) k S) with
// L_ij = e^{G_i - G_j} k_i.k_j beta_j for j < i. `system` becomes L. Where `plain` is given it becomes L without beta,
// and where `seen` is, which holds q_i.k_j, scale e^{G_i - G_j} q_i.k_j beta_j.
inline void delta_errors(const ttt::DeltaRule& a, int64_t first, int64_t some, const float* k, const float* kt,
                         const float* state, const float* v, float* system, float* plain, float* seen, float* errors,
                         DeltaGates& gates) {
  constexpr int64_t cp = (DELTA_CHUNK + VL - 1) / VL * VL;
  const int64_t kp = whole_vectors(a.keys), vp = whole_vectors(a.values);
  product_of<kSet>({k, kp, 1}, kt, cp, system, cp, some, whole_vectors(some), a.keys, kLowerResult);
  product_of<kSet>({k, kp, 1}, state, vp, errors, vp, some, vp, a.keys);
  float* ratio = gates.ratio;
  float total = 1.0f;
  for (int64_t i = 0; i < some; i++) {
    const float gate = a.gate ? std::exp(a.gate[first + i * a.heads]) : 1.0f;
    total *= gate;
    gates.grown[i] = total;
    gates.beta[i] = a.beta[first + i * a.heads];
    for (int64_t j = 0; j < i; j++) ratio[j] *= gate;
    ratio[i] = 1.0f;
    for (int64_t j = 0; j < i; j++) {
      const float match = system[i * cp + j] * ratio[j];
      system[i * cp + j] = match * gates.beta[j];
      if (plain) plain[i * cp + j] = match;
    }
    system[i * cp + i] = 0.0f;
    for (int64_t j = 0; seen && j <= i; j++) seen[i * cp + j] *= a.scale * ratio[j] * gates.beta[j];
    // Rows of a register tile read further columns of `seen` than their own.
    for (int64_t j = i + 1; seen && j < i + TILE_ROWS && j < cp; j++) seen[i * cp + j] = 0.0f;
    for (int64_t j = 0; j < vp; j += VL)
      store(errors + i * vp + j, load(v + i * vp + j) - splat(total) * load(errors + i * vp + j));
  }
  gates.total = total;
  solve_lower(system, cp, errors, vp, some, vp);
}

// The state after some tokens; their errors are written over.
inline void delta_state(const ttt::DeltaRule& a, int64_t some, const float* k, float* errors, const DeltaGates& gates,
                        float* state) {
  const int64_t kp = whole_vectors(a.keys), vp = whole_vectors(a.values);
  float factor[DELTA_CHUNK];
  for (int64_t i = 0; i < some; i++) factor[i] = gates.ratio[i] * gates.beta[i];
  scale_rows<kSet>(errors, factor, some, vp, errors);
  if (a.gate)
    for (int64_t i = 0; i < a.keys * vp; i += VL) store(state + i, splat(gates.total) * load(state + i));
  product_of<kAdd>({k, 1, kp}, errors, vp, state, vp, a.keys, vp, some);
}

template <class T>
void delta_rule_sequence(const ttt::DeltaRule& a, int64_t sequence, int64_t head, float* memory) {
  const int64_t keys = a.keys, values = a.values, kp = whole_vectors(keys), vp = whole_vectors(values);
  constexpr int64_t C = DELTA_CHUNK, cp = (C + VL - 1) / VL * VL;
  float* state = memory;
  float* q = state + keys * vp;
  float* k = q + C * kp;
  float* kt = k + C * kp;
  float* errors = kt + kp * cp;
  float* out = errors + C * vp;
  float* system = out + C * vp;
  float* seen = system + C * cp;
  DeltaGates gates;
  const int64_t begin = a.begins ? a.begins[sequence] : sequence * a.tokens;
  const int64_t end = a.begins ? a.begins[sequence + 1] : begin + a.tokens;
  float* held = a.state + (sequence * a.heads + head) * keys * values;
  read_rows(held, values, keys, values, state, vp);
  for (int64_t at = begin; at < end; at += C) {
    const int64_t some = end - at < C ? end - at : C, first = at * a.heads + head;
    if (a.kept && (at - begin) % ttt::DELTA_KEPT_TOKENS == 0) {
      const int64_t row = first_kept(begin, sequence) + (at - begin) / ttt::DELTA_KEPT_TOKENS;
      write_rows(state, vp, keys, values, a.kept + (row * a.heads + head) * keys * values, values);
    }
    read_rows(static_cast<const T*>(a.q) + first * keys, a.heads * keys, some, keys, q, kp);
    read_rows(static_cast<const T*>(a.k) + first * keys, a.heads * keys, some, keys, k, kp);
    read_rows(static_cast<const T*>(a.v) + first * values, a.heads * values, some, values, out, vp);
    transpose(k, kp, some, kp, kt, cp);
    product_of<kSet>({q, kp, 1}, kt, cp, seen, cp, some, whole_vectors(some), keys, kLowerResult);
    delta_errors(a, first, some, k, kt, state, out, system, nullptr, seen, errors, gates);
    product_of<kSet>({q, kp, 1}, state, vp, out, vp, some, vp, keys);
    float factor[C];
    for (int64_t i = 0; i < some; i++) factor[i] = a.scale * gates.grown[i];
    scale_rows<kSet>(out, factor, some, vp, out);
    product_of<kAdd>({seen, cp, 1}, errors, vp, out, vp, some, vp, some, kLowerLeft);
    write_rows(out, vp, some, values, static_cast<T*>(a.out) + first * values, a.heads * values);
    delta_state(a, some, k, errors, gates, state);
  }
  write_rows(state, vp, keys, values, held, values);
}

template <class T>
void delta_rule(const ttt::DeltaRule& a) {
  const int64_t kp = whole_vectors(a.keys), vp = whole_vectors(a.values), cp = whole_vectors(DELTA_CHUNK);
  const int64_t floats = a.keys * vp + DELTA_CHUNK * (2 * kp + 2 * vp + 2 * cp) + kp * cp;
  const int64_t tasks = a.sequences * a.heads;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && tasks > 1)
  {
    Scratch scratch(floats + VL);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++)
      delta_rule_sequence<T>(a, task / a.heads, task % a.heads, scratch.get());
  }
}

// One token of one head: the state is read for both products, and is in the cache when it is written.
template <class T>
void delta_rule_token(const ttt::DeltaRuleStep& step, int64_t row, float* memory) {
  const ttt::DeltaRule& a = step.of;
  const ttt::TokenSteps& by = step.steps;
  const int64_t sequence = row / a.heads, head = row % a.heads;
  const int64_t keys = a.keys, values = a.values, vp = whole_vectors(values);
  float* q = memory;
  float* k = q + whole_vectors(keys);
  float* error = k + whole_vectors(keys);
  float* out = error + vp;
  read_rows(static_cast<const T*>(a.q) + sequence * by.q + head * keys, 0, 1, keys, q, whole_vectors(keys));
  read_rows(static_cast<const T*>(a.k) + sequence * by.k + head * keys, 0, 1, keys, k, whole_vectors(keys));
  float* state = a.state + row * keys * values;
  const float gate = a.gate ? std::exp(a.gate[sequence * by.gate + head]) : 1.0f;
  const float beta = a.beta[sequence * by.rate + head];
  float match = 0.0f;
  for (int64_t i = 0; i < keys; i++) match += q[i] * k[i];
  const T* v = static_cast<const T*>(a.v) + sequence * by.v + head * values;
  for (int64_t j = 0; j < values;) {
    vf by_k[4] = {}, by_q[4] = {};
    const bool wide = j + 4 * VL <= values;
    const int64_t left = values - j;
    if (wide) {
      for (int64_t i = 0; i < keys; i++)
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
          const vf s = load(state + i * values + j + n * VL);
          by_k[n] += splat(k[i]) * s;
          by_q[n] += splat(q[i]) * s;
        }
    } else {
      for (int64_t i = 0; i < keys; i++) {
        const vf s = load_upto(state + i * values + j, left);
        by_k[0] += splat(k[i]) * s;
        by_q[0] += splat(q[i]) * s;
      }
    }
    for (int n = 0; n < (wide ? 4 : 1); n++) {
      const int64_t to = j + n * VL;
      const vf e = splat(beta) * (load_upto(v + to, values - to) - splat(gate) * by_k[n]);
      store(error + to, e);
      store(out + to, splat(a.scale) * (splat(gate) * by_q[n] + splat(match) * e));
    }
    j += wide ? 4 * VL : VL;
  }
  for (int64_t i = 0; i < keys; i++) {
    float* s = state + i * values;
    int64_t j = 0;
    for (; j + VL <= values; j += VL) store(s + j, splat(gate) * load(s + j) + splat(k[i]) * load(error + j));
    for (; j < values; j++) s[j] = gate * s[j] + k[i] * error[j];
  }
  write_rows(out, vp, 1, values, static_cast<T*>(a.out) + row * values, 0);
}

template <class T>
void delta_rule_tokens(const ttt::DeltaRuleStep& step) {
  const ttt::DeltaRule& a = step.of;
  const int64_t tasks = a.sequences * a.heads;
  const int threads = tasks * a.keys * a.values < 65536 ? 1 : a.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch scratch(2 * whole_vectors(a.keys) + 2 * whole_vectors(a.values));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < tasks; row++) delta_rule_token<T>(step, row, scratch.get());
  }
}

void run_delta_rule(const ttt::DeltaRule& a) { a.dtype == ttt::kF32 ? delta_rule<float>(a) : delta_rule<bf16>(a); }

void run_delta_rule_step(const ttt::DeltaRuleStep& step) {
  step.of.dtype == ttt::kF32 ? delta_rule_tokens<float>(step) : delta_rule_tokens<bf16>(step);
}

}  // namespace
