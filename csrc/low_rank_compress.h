// Compression of slots to `rank` rows, with replay and the pull to the anchor. For the formulas see
// ttt.ops.low_rank_compress, for the decomposition truncate.h, for the pull low_rank_pull.h.
//
// Sums over columns are made in pieces whose size depends only on the number of columns, and the pieces are added in
// order. So a slot's bits depend neither on the number of threads nor on which other slots are compressed.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "low_rank_pull.h"
#include "replay.h"
#include "rounding.h"
#include "truncate.h"
#include "wide.h"

namespace {

constexpr int64_t GRAM_COLUMNS = 512;  // columns at a time, which fit into the second-level cache even as doubles
constexpr int64_t MOST_PIECES = 8;     // of a Gram matrix
constexpr int64_t KEPT_ROWS = 256;     // workspace for slots with more rows, tens of megabytes, is freed after a call

struct Pieces {
  int64_t width, count;
  explicit Pieces(int64_t columns) {
    const int64_t panels = (columns + GRAM_COLUMNS - 1) / GRAM_COLUMNS, each = (panels + MOST_PIECES - 1) / MOST_PIECES;
    width = std::max<int64_t>(each, 1) * GRAM_COLUMNS;
    count = std::max<int64_t>((columns + width - 1) / width, 1);
  }
};

// Whether the largest magnitude is such that squares and their sums stay within float32's range, or is zero.
inline bool ordinary(const bf16* x, int64_t count) {
  vh most = {};
  int64_t j = 0;
  for (; j + VL <= count; j += VL) {
    const vh v = load_as<vh>(x + j) & 0x7fff;
    most = v > most ? v : most;
  }
  uint16_t top = 0;
  for (int l = 0; l < VL; l++) top = std::max<uint16_t>(top, most[l]);
  for (; j < count; j++) top = std::max<uint16_t>(top, x[j].bits & 0x7fff);
  return top == 0 || (top > 0x2b80 && top < 0x5380);  // 2^-40, 2^40
}

// Workspace and state of one slot's compression. Its memory is used again for later slots.
struct Compressed {
  int64_t slot, held, kept;
  bool cuts, replays, narrow;  // narrow: new rows are computed in float32
  int wide_panels;             // whether part of a Gram matrix was computed in float64
  double spent;                // eta_sum
  Truncation cut;
  Wide grams;             // ld x ld for each piece of A A^T, then of B B^T
  Wide replayed;          // held x wide(n): the rows of A after replay, if there is any
  Wide fresh_a, fresh_b;  // kept x wide(n), kept x wide(m): new rows before the pull
  Wide of_fresh;          // their Gram matrices, see `Pull`

  // Whether the slot is left unchanged, because its rows are not finite.
  bool stays() const { return cuts && !cut.finite; }
};

template <class T>
struct Compression {
  const ttt::LowRankCompress& a;
  const Pieces pieces_a, pieces_b;
  const int64_t ld = padded(a.capacity);
  const Pull pull;

  explicit Compression(const ttt::LowRankCompress& a) : a(a), pieces_a(a.n), pieces_b(a.m), pull(a) {}

  int64_t columns(bool of_a) const { return of_a ? a.n : a.m; }
  int64_t pieces(bool of_a) const { return (of_a ? pieces_a : pieces_b).count; }
  T* row(const Compressed& s, bool of_a, int64_t r) const {
    return static_cast<T*>(of_a ? a.a : a.b) + (s.slot * a.capacity + r) * columns(of_a);
  }

  // Prepares the compression of a slot. Whether anything but its counters will change.
  bool begin(Compressed& s, int64_t slot) const {
    s.slot = slot;
    s.held = std::min<int64_t>(a.rows[slot], a.capacity);
    s.spent = a.eta_sum[slot];
    s.cuts = s.held > a.rank;
    s.kept = s.cuts ? std::min({a.rank, a.n, a.m}) : s.held;
    s.replays = s.held > 0 && a.replay_rows > 0 && *a.seen > 0;
    s.narrow = false;
    s.wide_panels = 0;
    if (s.cuts) s.grams.need((pieces_a.count + pieces_b.count) * ld * ld);
    if (pull.on) {
      s.fresh_a.need(s.kept * wide(a.n));
      s.fresh_b.need(s.kept * wide(a.m));
      s.of_fresh.need(4 * s.kept * s.kept);
    }
    if (s.replays) replay(s);
    return s.held > 0 && (s.cuts || s.replays || pull.on);
  }

  // Replay: `replayed` = A - (A X_r^T) V.
  void replay(Compressed& s) const {
    ttt::Commit c = {};
    c.memory = a.memory;
    c.seen = a.seen;
    c.step = a.step + s.slot;
    c.n = a.n;
    c.capacity = a.memory_rows;
    c.replay_rows = a.replay_rows;
    c.seed = a.seed;
    c.beta = static_cast<float>(a.beta);
    c.eps = static_cast<float>(a.eps);
    c.threads = a.threads;
    Replay drawn(a.replay_rows, a.n);
    draw_replay<T>(c, drawn);
    const int64_t width = wide(a.n), rows = a.replay_rows, stride = drawn.width;
    Wide factors, drifts;
    factors.need(2 * rows * stride);
    drifts.need(s.held * rows);
    double *x = factors.get(), *v = x + rows * stride;
    const auto in_order = [](const float* from, double* to) {
      float strip[STRIP];
      store2<splits<T>>(strip, {load(from), load(from + VL)});
      widen(strip, STRIP, STRIP, to);
    };
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = 0; j < stride; j += STRIP) {
        in_order(drawn.at(r, j), x + r * stride + j);
        in_order(drawn.v.get() + r * stride + j, v + r * stride + j);
      }
    s.replayed.need(s.held * width);
    const int threads = s.held * rows * width < (1 << 16) ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t r = 0; r < s.held; r++) {
      double *out = s.replayed.get() + r * width, *drift = drifts.get() + r * rows;
      widen(row(s, true, r), a.n, width, out);
      for (int64_t q = 0; q < rows; q++) drift[q] = dot(out, x + q * stride, width);
      for (int64_t q = 0; q < rows; q++)
        for (int64_t j = 0; j < width; j += WL)
          store(out + j, load_wide(out + j) - drift[q] * load_wide(v + q * stride + j));
    }
  }

  // Copies columns [first, first + count) of all rows, after replay, to rows `width` apart, followed by zeros.
  template <class Real>
  void panel(const Compressed& s, bool of_a, int64_t first, int64_t count, int64_t width, Real* out) const {
    for (int64_t r = 0; r < s.held; r++) {
      if constexpr (std::is_same_v<Real, double>)
        if (of_a && s.replays) {
          widen(s.replayed.get() + r * wide(a.n) + first, count, width, out + r * width);
          continue;
        }
      widen(row(s, of_a, r) + first, count, width, out + r * width);
    }
  }

  // One piece of a Gram matrix. Products of bfloat16 numbers are exact in float32: with sums in float32 over a panel,
  // and in float64 over panels, the error is less than a hundredth of that of the rows' own rounding.
  void gram(Compressed& s, bool of_a, int64_t piece, double* scratch) const {
    const int64_t width = (of_a ? pieces_a : pieces_b).width;
    double* out = s.grams.get() + ((of_a ? 0 : pieces_a.count) + piece) * ld * ld;
    std::memset(out, 0, ld * ld * sizeof(double));
    const int64_t last = std::min(columns(of_a), (piece + 1) * width);
    for (int64_t j = piece * width; j < last; j += GRAM_COLUMNS) {
      const int64_t count = std::min(GRAM_COLUMNS, last - j);
      if constexpr (std::is_same_v<T, bf16>) {
        bool fits = !(of_a && s.replays);
        for (int64_t r = 0; r < s.held && fits; r++) fits = ordinary(row(s, of_a, r) + j, count);
        if (fits) {
          using Narrow = std::conditional_t<dots<T>, bf16, float>;
          gram_panel(s, of_a, j, count, reinterpret_cast<Narrow*>(scratch), out);
          continue;
        }
      }
#pragma omp atomic write
      s.wide_panels = 1;
      gram_panel(s, of_a, j, count, scratch, out);
    }
  }

  template <class E>
  void gram_panel(const Compressed& s, bool of_a, int64_t first, int64_t count, E* scratch, double* out) const {
    constexpr int step = Multiply<E>::step;
    const int64_t width = (count + step - 1) / step * step, rows = (s.held + 3) / 4 * 4;
    std::memset(scratch + s.held * width, 0, (rows - s.held) * width * sizeof(E));
    if constexpr (sizeof(E) == 2) {
      for (int64_t r = 0; r < s.held; r++) {
        std::memcpy(scratch + r * width, row(s, of_a, r) + first, count * sizeof(E));
        std::memset(scratch + r * width + count, 0, (width - count) * sizeof(E));
      }
    } else {
      panel(s, of_a, first, count, width, scratch);
    }
    add_row_products(scratch, rows, scratch, rows, width, width, true, out, ld);
  }

  // The lower halves of A A^T and B B^T: the sums of their pieces.
  std::pair<double*, double*> sums(const Compressed& s) const {
    double *ga = s.grams.get(), *gb = ga + pieces_a.count * ld * ld;
    for (const bool of_a : {true, false}) {
      double* sum = of_a ? ga : gb;
      for (int64_t p = 1; p < pieces(of_a); p++)
        for (int64_t k = 0; k < ld * ld; k++) sum[k] += sum[p * ld * ld + k];
    }
    return {ga, gb};
  }

  void truncate(Compressed& s) const {
    const auto [ga, gb] = sums(s);
    s.cut.make(ga, gb, s.held, ld, s.kept);
    s.narrow = std::is_same_v<T, bf16> && s.cut.finite && !s.wide_panels && !pull.on;
    for (const Wide* factor : {&s.cut.factor_a, &s.cut.factor_b})
      for (int64_t k = 0; s.narrow && k < padded(s.kept) * ld; k += WL) {
        const vn f = __builtin_convertvector(load_wide(factor->get() + k), vn);
        std::memcpy(reinterpret_cast<float*>(factor->get()) + k, &f, sizeof f);
      }
  }

  // Computes BLOCK_COLUMNS columns of the new rows, and stores them in the slot unless they are still to be pulled.
  template <class Real>
  void renew(const Compressed& s, bool of_a, int64_t first, Real* scratch) const {
    const int64_t count = std::min(BLOCK_COLUMNS, columns(of_a) - first);
    Real *old = scratch, *fresh = scratch;
    panel(s, of_a, first, count, BLOCK_COLUMNS, old);
    if (s.cuts) {
      fresh = old + ld * BLOCK_COLUMNS;
      combine(reinterpret_cast<const Real*>((of_a ? s.cut.factor_a : s.cut.factor_b).get()), ld, padded(s.kept), s.held,
              old, BLOCK_COLUMNS, BLOCK_COLUMNS, fresh, BLOCK_COLUMNS);
    }
    if (!pull.on) return finish(s, of_a, first, fresh);
    if constexpr (std::is_same_v<Real, double>) {
      const int64_t width = wide(columns(of_a)), size = std::min(BLOCK_COLUMNS, width - first);
      for (int64_t i = 0; i < s.kept; i++)
        std::memcpy((of_a ? s.fresh_a : s.fresh_b).get() + i * width + first, fresh + i * BLOCK_COLUMNS,
                    size * sizeof(double));
    }
  }

  void pulled(const Compressed& s, bool of_a, int64_t first, double* scratch) const {
    pull.apply(of_a, (of_a ? s.fresh_a : s.fresh_b).get(), s.kept, first, a.lam * s.spent, s.of_fresh.get(), scratch);
    finish(s, of_a, first, scratch);
  }

  // Clamps and rounds columns of the new rows and stores them in the slot.
  template <class Real>
  void finish(const Compressed& s, bool of_a, int64_t first, const Real* fresh) const {
    using V = Lanes<Real>;
    const int64_t count = std::min(BLOCK_COLUMNS, columns(of_a) - first);
    const V top = static_cast<Real>(std::is_same_v<T, bf16> ? 0x1.fep127f : std::numeric_limits<float>::max()) - V{};
    const StepKey step_key(a.seed, static_cast<uint32_t>(a.step[s.slot]));
    alignas(64) float narrow[BLOCK_COLUMNS];
    alignas(64) T out[BLOCK_COLUMNS];
    for (int64_t i = 0; i < s.kept; i++) {
      for (int j = 0; j < BLOCK_COLUMNS; j += sizeof(V) / sizeof(Real)) {
        V v = load_as<V>(fresh + i * BLOCK_COLUMNS + j);
        v = v > top ? top : v;
        v = v < -top ? -top : v;
        if constexpr (std::is_same_v<Real, float>) {
          store(narrow + j, v);
        } else {
          const vn f = __builtin_convertvector(v, vn);
          std::memcpy(narrow + j, &f, sizeof f);
        }
      }
      if constexpr (std::is_same_v<T, float>) {
        std::memcpy(out, narrow, sizeof out);
      } else {
        const RowKey key = step_key.of_row(i);
        for (int j = 0; j < BLOCK_COLUMNS; j += STRIP)
          store2_rounded<false>(out + j, {load(narrow + j), load(narrow + j + VL)},
                                bits_of<false>(random_words(key, first + j)));
      }
      std::memcpy(row(s, of_a, i) + first, out, count * sizeof(T));
    }
  }

  // Clears a row that becomes free: the whole row at once, which is faster than block by block.
  void clear(const Compressed& s, bool of_a, int64_t r) const {
    std::memset(row(s, of_a, r), 0, columns(of_a) * sizeof(T));
  }

  void end(const Compressed& s) const {
    const double top = std::numeric_limits<float>::max();
    if (s.cuts) a.lost[s.slot] = static_cast<float>(std::min(a.lost[s.slot] + s.cut.gone, top));
    a.rows[s.slot] = static_cast<int32_t>(s.kept);
    a.eta_sum[s.slot] = 0;
    a.step[s.slot]++;
  }
};

// A unit of work on one slot: a piece of a Gram matrix, a row of one, a block of columns, or a row.
struct Share {
  Compressed* slot;
  bool of_a;
  int64_t at;
};

// Compresses `a.count` slots. Returns the first slot that was left as it was because its rows are not finite, or -1.
template <class T>
int64_t low_rank_compress(const ttt::LowRankCompress& a) {
  const Compression<T> work(a);
  const int threads = static_cast<double>(a.capacity) * a.capacity * (a.m + a.n) < 65536 ? 1 : a.threads;
  // Kept from call to call by each calling thread, because new memory pages are slow to get.
  thread_local std::vector<Compressed> slots;
  thread_local Wide scratch;
  if (static_cast<int>(slots.size()) < threads) slots = std::vector<Compressed>(threads);
  const int64_t own = work.ld * std::max(GRAM_COLUMNS, 2 * BLOCK_COLUMNS);
  scratch.need(own * threads);
  double* const memory = scratch.get();
  int64_t failed = -1;
  for (int64_t k = 0; k < a.count; k += threads) {
    std::vector<Compressed*> chosen, cut;
    std::vector<Share> grams, weights, blocks, freed;
    for (int64_t i = k; i < std::min<int64_t>(a.count, k + threads); i++) {
      Compressed* s = &slots[i - k];
      chosen.push_back(s);
      if (!work.begin(*s, a.slots[i])) continue;
      if (s->cuts) cut.push_back(s);
      for (const bool of_a : {true, false}) {
        for (int64_t p = 0; s->cuts && p < work.pieces(of_a); p++) grams.push_back({s, of_a, p});
        for (int64_t r = 0; work.pull.on && r < s->kept; r++) weights.push_back({s, of_a, r});
        for (int64_t j = 0; j < work.columns(of_a); j += BLOCK_COLUMNS) blocks.push_back({s, of_a, j});
        for (int64_t r = s->kept; r < s->held; r++) freed.push_back({s, of_a, r});
      }
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      double* mine = memory + own * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < grams.size(); i++) work.gram(*grams[i].slot, grams[i].of_a, grams[i].at, mine);
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < cut.size(); i++) work.truncate(*cut[i]);
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < blocks.size(); i++) {
        const Compressed& s = *blocks[i].slot;
        if (s.stays()) continue;
        if (s.narrow)
          work.renew(s, blocks[i].of_a, blocks[i].at, reinterpret_cast<float*>(mine));
        else
          work.renew(s, blocks[i].of_a, blocks[i].at, mine);
      }
      if (work.pull.on) {
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < weights.size(); i++) {
          const auto [s, of_a, at] = weights[i];
          if (!s->stays())
            work.pull.weigh(of_a, (of_a ? s->fresh_a : s->fresh_b).get(), s->kept, at, s->of_fresh.get());
        }
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < blocks.size(); i++)
          if (!blocks[i].slot->stays()) work.pulled(*blocks[i].slot, blocks[i].of_a, blocks[i].at, mine);
      }
#pragma omp for schedule(dynamic, 8)
      for (size_t i = 0; i < freed.size(); i++)
        if (!freed[i].slot->stays()) work.clear(*freed[i].slot, freed[i].of_a, freed[i].at);
    }
    for (const Compressed* s : chosen) {
      if (!s->stays())
        work.end(*s);
      else if (failed < 0)
        failed = s->slot;
    }
  }
  if (work.ld > KEPT_ROWS) {
    slots.clear();
    scratch = Wide();
  }
  return failed;
}

int64_t run_low_rank_compress(const ttt::LowRankCompress& a) {
  return a.dtype == ttt::kF32 ? low_rank_compress<float>(a) : low_rank_compress<bf16>(a);
}

}  // namespace
