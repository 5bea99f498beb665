// The backward pass of the gated delta rule on texts. ttt/ops/sequence/delta_rule.py has the formulas of the forward
// pass, delta_rule.h the names of its parts.
//
// With D the gradient of the state after a chunk, O that of its outputs times the scale, M_ij = e^{G_i - G_j} q_i.k_j
// for j <= i, A = diag(beta) L diag(beta)^-1, a = diag(e^G), c = diag(e^{G_C - G}) and e the errors:
//
//     B = (I + A^T)^-1 (c k D + M^T O)         the gradient of diag(beta) (v - a k S)
//     X = -diag(beta) a B                      of k S
//     N_ij = e^{G_i - G_j} O_i.u_j for j <= i, P_ij = -beta_i e^{G_i - G_j} B_i.u_j for j < i
//     dq = a O S^T + N k                       dv = diag(beta) B          dbeta_i = B_i.e_i
//     dk = (X S^T + P k) + (c u D^T + N^T q + P^T k)
//     D <- e^{G_C} D + q^T a O + k^T X
//
// The gate of token t scales what tokens from t on read of those before it. So its gradient is the sum, over i >= t >
// j, of the gradients by e^{G_i - G_j} times that, and of what they read of S and what D reads of them, likewise: no
// terms that cancel are added up.
#pragma once
#include <algorithm>
#include <cstring>

#include "delta_rule.h"
#include "parts.h"

namespace {

// What the first pass over some chunks leaves of one of them.
struct DeltaChunk {
  float *state, *errors, *plain;  // keys x vp, C x vp, C x cp: L without beta
};

struct DeltaGradient {
  static constexpr int64_t C = DELTA_CHUNK, cp = (C + VL - 1) / VL * VL;
  int64_t keys, values, kp, vp;
  DeltaChunk chunks[DELTA_KEPT];
  float *state, *dstate;       // keys x vp
  float *q, *k;                // k follows q without a gap, whatever the number of tokens
  float *dq, *dk;              // likewise
  float *reads, *dkeys;        // the gradients of q S and k S, likewise
  float *kt, *turned, *later;  // kp x cp, vp x max(kp, cp), C x kp
  float *v, *dout, *u, *b;     // C x vp
  float *system, *seen, *crossed, *ratio;
  DeltaGates gates;

  DeltaGradient(const ttt::DeltaRule& a, Parts* parts)
      : keys(a.keys), values(a.values), kp(whole_vectors(a.keys)), vp(whole_vectors(a.values)) {
    for (DeltaChunk& chunk : chunks) chunk = {parts->take(keys * vp), parts->take(C * vp), parts->take(C * cp)};
    state = parts->take(keys * vp);
    dstate = parts->take(keys * vp);
    q = parts->take(2 * C * kp);
    dq = parts->take(2 * C * kp);
    reads = parts->take(2 * C * vp);
    kt = parts->take(kp * cp);
    later = parts->take(C * kp);
    turned = parts->take(vp * std::max(kp, cp));
    v = parts->take(C * vp);
    dout = parts->take(C * vp);
    u = parts->take(C * vp);
    b = parts->take(C * vp);
    system = parts->take(C * cp);
    seen = parts->take(C * cp);
    crossed = parts->take(C * cp);
    ratio = parts->take(C * cp);
  }
};

// Reads the chunks from token `at` on again, up to DELTA_KEPT of them, and keeps what the backward pass needs.
template <class T>
void reread(const ttt::DeltaRule& a, int64_t at, int64_t end, int64_t head, DeltaGradient& m) {
  const int64_t keys = m.keys, values = m.values;
  for (int64_t n = 0; n < DELTA_KEPT && at < end; n++, at += m.C) {
    const int64_t some = std::min(end - at, m.C), first = at * a.heads + head;
    const DeltaChunk& chunk = m.chunks[n];
    std::memcpy(chunk.state, m.state, keys * m.vp * sizeof(float));
    read_rows(static_cast<const T*>(a.k) + first * keys, a.heads * keys, some, keys, m.q, m.kp);
    read_rows(static_cast<const T*>(a.v) + first * values, a.heads * values, some, values, m.v, m.vp);
    transpose(m.q, m.kp, some, m.kp, m.kt, m.cp);
    delta_errors(a, first, some, m.q, m.kt, m.state, m.v, m.system, chunk.plain, nullptr, chunk.errors, m.gates);
    std::memcpy(m.u, chunk.errors, some * m.vp * sizeof(float));
    delta_state(a, some, m.q, m.u, m.gates, m.state);
  }
}

template <class T>
void delta_rule_chunk_backward(const ttt::DeltaRuleBackward& g, int64_t at, int64_t some, int64_t head,
                               const DeltaChunk& chunk, DeltaGradient& m) {
  const ttt::DeltaRule& a = g.forward;
  const int64_t keys = m.keys, values = m.values, kp = m.kp, vp = m.vp, first = at * a.heads + head;
  constexpr int64_t cp = DeltaGradient::cp;
  m.k = m.q + some * kp;
  m.dk = m.dq + some * kp;
  m.dkeys = m.reads + some * vp;
  read_rows(static_cast<const T*>(a.q) + first * keys, a.heads * keys, some, keys, m.q, kp);
  read_rows(static_cast<const T*>(a.k) + first * keys, a.heads * keys, some, keys, m.k, kp);
  read_rows(static_cast<const T*>(g.out) + first * values, a.heads * values, some, values, m.dout, vp);
  transpose(m.k, kp, some, kp, m.kt, cp);
  product_of<kSet>({m.q, kp, 1}, m.kt, cp, m.seen, cp, some, whole_vectors(some), keys, kLowerResult);
  float *beta = m.gates.beta, *grown = m.gates.grown, *last = m.ratio + (some - 1) * cp;
  float total = 1.0f, gates[DELTA_CHUNK];
  for (int64_t i = 0; i < some; i++) {
    const float gate = a.gate ? std::exp(a.gate[first + i * a.heads]) : 1.0f;
    beta[i] = a.beta[first + i * a.heads];
    grown[i] = total *= gate;
    float* ratio = m.ratio + i * cp;
    for (int64_t j = 0; j < i; j++) ratio[j] = ratio[j - cp] * gate;
    ratio[i] = 1.0f;
    for (int64_t j = 0; j <= i; j++) m.seen[i * cp + j] *= ratio[j];
    clear_above(m.seen, cp, i);
    for (int64_t j = 0; j < i; j++) m.system[i * cp + j] = beta[i] * chunk.plain[i * cp + j];
    for (int64_t j = 0; j < vp; j += VL) {
      const int64_t e = i * vp + j;
      const vf given = splat(a.scale) * load(m.dout + e);
      store(m.dout + e, given);
      store(m.reads + e, splat(total) * given);
      store(m.u + e, splat(beta[i]) * load(chunk.errors + e));
    }
  }
  // B, and what follows from it.
  product_of<kSet>({m.k, kp, 1}, m.dstate, vp, m.b, vp, some, vp, keys);
  scale_rows<kSet>(m.b, last, some, vp, m.b);
  product_of<kAdd>({m.seen, 1, cp}, m.dout, vp, m.b, vp, some, vp, some, kUpperLeft);
  solve_upper(m.system, cp, m.b, vp, some, vp);
  for (int64_t i = 0; i < some; i++) {
    g.beta[first + i * a.heads] = dot(m.b + i * vp, chunk.errors + i * vp, vp);
    for (int64_t j = 0; j < vp; j += VL) {
      const int64_t e = i * vp + j;
      const vf given = splat(beta[i]) * load(m.b + e);
      store(m.v + e, given);
      store(m.dkeys + e, splat(-grown[i]) * given);
    }
  }
  write_rows(m.v, vp, some, values, static_cast<T*>(g.v) + first * values, a.heads * values);
  // N, and P in the place of A; both without e^{G_i - G_j} first.
  transpose(m.u, vp, some, vp, m.turned, cp);
  product_of<kSet>({m.dout, vp, 1}, m.turned, cp, m.crossed, cp, some, whole_vectors(some), values, kLowerResult);
  product_of<kSet>({m.b, vp, 1}, m.turned, cp, m.system, cp, some, whole_vectors(some), values, kLowerResult);
  float across[cp] = {};  // of each token, what tokens from i on read of it
  for (int64_t i = some - 1; i >= 0; i--) {
    const float* ratio = m.ratio + i * cp;
    float *n = m.crossed + i * cp, *p = m.system + i * cp, sum_across = 0.0f;
    for (int64_t j = 0; j < i; j++) {
      p[j] *= -beta[i];
      across[j] += n[j] * m.seen[i * cp + j] + p[j] * chunk.plain[i * cp + j];
      p[j] *= ratio[j];
      n[j] *= ratio[j];
      sum_across += across[j];
    }
    gates[i] = sum_across;
    p[i] = 0.0f;
    clear_above(m.crossed, cp, i);
    clear_above(m.system, cp, i);
  }
  // What each token reads, then what later ones read of it.
  transpose(chunk.state, vp, keys, vp, m.turned, kp);
  product_of<kSet>({m.reads, vp, 1}, m.turned, kp, m.dq, kp, 2 * some, kp, values);
  if (g.gate) {
    float from_state = total * dot(m.dstate, chunk.state, keys * vp);
    for (int64_t i = some - 1; i >= 0; i--) {
      from_state += dot(m.q + i * kp, m.dq + i * kp, kp) + dot(m.k + i * kp, m.dk + i * kp, kp);
      gates[i] += from_state;
    }
  }
  product_of<kAdd>({m.crossed, cp, 1}, m.k, kp, m.dq, kp, some, kp, some, kLowerLeft);
  product_of<kAdd>({m.system, cp, 1}, m.k, kp, m.dk, kp, some, kp, some, kLowerLeft);
  transpose(m.dstate, vp, keys, vp, m.turned, kp);
  scale_rows<kSet>(m.u, last, some, vp, m.u);
  product_of<kSet>({m.u, vp, 1}, m.turned, kp, m.later, kp, some, kp, values);
  if (g.gate) {
    float to_state = 0.0f;
    for (int64_t i = 0; i < some; i++) {
      g.gate[first + i * a.heads] = gates[i] + to_state;
      to_state += dot(m.k + i * kp, m.later + i * kp, kp);
    }
  }
  product_of<kAdd>({m.crossed, 1, cp}, m.q, kp, m.later, kp, some, kp, some, kUpperLeft);
  product_of<kAdd>({m.system, 1, cp}, m.k, kp, m.later, kp, some, kp, some, kUpperLeft);
  for (int64_t i = 0; i < some * kp; i += VL) store(m.dk + i, load(m.dk + i) + load(m.later + i));
  write_rows(m.dq, kp, some, keys, static_cast<T*>(g.q) + first * keys, a.heads * keys);
  write_rows(m.dk, kp, some, keys, static_cast<T*>(g.k) + first * keys, a.heads * keys);
  for (int64_t i = 0; a.gate && i < keys * vp; i += VL) store(m.dstate + i, splat(total) * load(m.dstate + i));
  product_of<kAdd>({m.q, 1, kp}, m.reads, vp, m.dstate, vp, keys, vp, 2 * some);
}

template <class T>
void delta_rule_sequence_backward(const ttt::DeltaRuleBackward& g, int64_t sequence, int64_t head, DeltaGradient& m) {
  const ttt::DeltaRule& a = g.forward;
  constexpr int64_t C = DELTA_CHUNK, span = ttt::DELTA_KEPT_TOKENS;
  const int64_t keys = m.keys, values = m.values;
  const int64_t begin = a.begins ? a.begins[sequence] : sequence * a.tokens;
  const int64_t end = a.begins ? a.begins[sequence + 1] : begin + a.tokens;
  float* held = g.state + (sequence * a.heads + head) * keys * values;
  read_rows(held, values, keys, values, m.dstate, m.vp);
  for (int64_t n = (end - begin + span - 1) / span - 1; n >= 0; n--) {
    const int64_t at = begin + n * span, row = first_kept(begin, sequence) + n;
    read_rows(a.kept + (row * a.heads + head) * keys * values, values, keys, values, m.state, m.vp);
    reread<T>(a, at, end, head, m);
    const int64_t chunks = (std::min(end - at, span) + C - 1) / C;
    for (int64_t c = chunks - 1; c >= 0; c--)
      delta_rule_chunk_backward<T>(g, at + c * C, std::min(end - at - c * C, C), head, m.chunks[c], m);
  }
  write_rows(m.dstate, m.vp, keys, values, held, values);
}

template <class T>
void delta_rule_backward(const ttt::DeltaRuleBackward& g) {
  const int64_t heads = g.forward.heads, tasks = g.forward.sequences * heads;
#pragma omp parallel num_threads(g.forward.threads) if (g.forward.threads > 1 && tasks > 1)
  {
    InScratch<DeltaGradient> own(g.forward);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++)
      delta_rule_sequence_backward<T>(g, task / heads, task % heads, own.memory);
  }
}

void run_delta_rule_backward(const ttt::DeltaRuleBackward& g) {
  g.forward.dtype == ttt::kF32 ? delta_rule_backward<float>(g) : delta_rule_backward<bf16>(g);
}

}  // namespace
