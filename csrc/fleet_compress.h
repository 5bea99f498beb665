// Slots of a fleet brought back to `rank` rows: the largest singular values of D = B^T A, by Gram matrices in float64.
//
// With A A^T = L L^T, the eigenvalues of C = L^T (B B^T) L are the squares of D's singular values s. Let V be its
// eigenvectors: U = B^T L V / s are D's left singular vectors, orthonormal whatever rounding made of L, and D^T U / s =
// A^T (B B^T) L V / s^2 the right ones; nothing is inverted. Rows are first made as long in A as in B, which D does not
// notice: large rows of the one then hide no large rows of the other.
//
// A sum over columns is made in pieces that depend on the number of columns only, and these are added in order: a
// slot's bits depend neither on how many threads there are nor on which others are compressed.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "eigen.h"
#include "fleet_pull.h"
#include "replay.h"
#include "rounding.h"
#include "scratch.h"
#include "wide.h"

namespace {

constexpr int64_t GRAM_COLUMNS = 256;  // of a panel of all rows in float64, which the second-level cache holds
constexpr int64_t MOST_PIECES = 8;     // of a Gram matrix
constexpr double NEGLIGIBLE = 1e-15;   // beside the largest square

// Columns [begin, end) of the pieces of a sum over `columns`.
struct Pieces {
  int64_t columns, width, count;
  explicit Pieces(int64_t columns) : columns(columns) {
    const int64_t panels = (columns + GRAM_COLUMNS - 1) / GRAM_COLUMNS, each = (panels + MOST_PIECES - 1) / MOST_PIECES;
    width = std::max<int64_t>(each, 1) * GRAM_COLUMNS;
    count = std::max<int64_t>((columns + width - 1) / width, 1);
  }
};

// A slot while it is compressed; kept from one to the next for its memory. `ld` = padded(capacity).
struct Compressed {
  int64_t slot, held, kept;
  bool cuts, replays, finite;
  double spent, gone;       // eta_sum, |change|_F
  Wide grams;               // ld x ld for each piece of A A^T, then of B B^T
  Wide work;                // of the decomposition
  Wide factor_a, factor_b;  // padded(kept) x ld: what the old rows are multiplied by
  Wide replayed;            // held x wide(n): the rows of A after replay, if any
  Wide fresh_a, fresh_b;    // padded(kept) x wide(n), x wide(m): new rows that are still to be pulled
  Wide of_fresh;            // their Gram matrices, see `Pull`
  Rotations rotations;
};

// The part of the work that does not depend on the type of rows: from Gram matrices to factors of the rows.
inline void decompose(Compressed& s, int64_t pieces_a, int64_t pieces_b, int64_t ld, bool directions) {
  const int64_t size = s.held, square = ld * ld, kept = s.kept, width = padded(kept);
  double *ga = s.grams.get(), *gb = ga + pieces_a * square;
  for (int64_t p = 1; p < pieces_a; p++)
    for (int64_t k = 0; k < square; k++) ga[k] += ga[p * square + k];
  for (int64_t p = 1; p < pieces_b; p++)
    for (int64_t k = 0; k < square; k++) gb[k] += gb[p * square + k];
  double *lt = s.work.get(), *t = lt + square, *c = t + square, *reflectors = c + square;
  double *x = reflectors + square, *xt = x + square, *vectors = xt + square;
  double *d = vectors, *e = d + ld, *tau = e + ld, *spare = tau + ld, *scale_a = spare + ld, *scale_b = scale_a + ld;

  double largest = 0;
  s.finite = true;
  for (int64_t r = 0; r < size; r++) {
    const double norm_a = std::sqrt(ga[r * ld + r]), norm_b = std::sqrt(gb[r * ld + r]);
    s.finite = s.finite && std::isfinite(norm_a) && std::isfinite(norm_b);
    const bool empty = norm_a == 0 || norm_b == 0;
    scale_a[r] = empty ? 0 : std::sqrt(norm_b / norm_a);
    scale_b[r] = empty ? 0 : std::sqrt(norm_a / norm_b);
    largest = std::max(largest, norm_a * norm_b);
  }
  if (!s.finite) return;
  std::memset(s.factor_a.get(), 0, width * ld * sizeof(double));
  std::memset(s.factor_b.get(), 0, width * ld * sizeof(double));
  s.gone = 0;
  if (largest == 0) return;
  const double unit = std::sqrt(largest);
  for (int64_t r = 0; r < size; r++) {
    scale_a[r] /= unit;
    scale_b[r] /= unit;
  }
  for (int64_t i = 0; i < size; i++)
    for (int64_t j = 0; j <= i; j++) {
      ga[i * ld + j] = ga[j * ld + i] = ga[i * ld + j] * scale_a[i] * scale_a[j];
      gb[i * ld + j] = gb[j * ld + i] = gb[i * ld + j] * scale_b[i] * scale_b[j];
    }

  std::memset(lt, 0, 4 * square * sizeof(double));
  const int64_t count = pivoted_cholesky(ga, size, ld, NEGLIGIBLE, lt, spare);
  combine(lt, ld, padded(count), size, gb, ld, padded(size), t, ld);  // L^T (B B^T)
  add_row_products(t, padded(count), lt, padded(count), ld, padded(size), true, c, ld);
  for (int64_t i = 0; i < count; i++)
    for (int64_t j = 0; j < i; j++) c[j * ld + i] = c[i * ld + j];
  for (int64_t i = 0; i < count; i++)  // beside the diagonal, the last tile of a row has more than half
    for (int64_t j = count; j < ld; j++) c[i * ld + j] = 0;
  tridiagonalize(c, count, ld, d, e, reflectors, tau, spare);
  ql(d, e, count, s.rotations);

  std::vector<int64_t> order(count);
  for (int64_t i = 0; i < count; i++) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return d[i] > d[j]; });
  const double floor = count ? NEGLIGIBLE * d[order[0]] : 0;
  const auto singular = [&](int64_t i) { return i < count && d[order[i]] > floor ? std::sqrt(d[order[i]]) : 0.0; };
  std::memset(x, 0, count * width * sizeof(double));
  for (int64_t i = 0; i < std::min(kept, count); i++) x[order[i] * width + i] = 1;
  apply_rotations(s.rotations, x, width, width);
  apply_reflectors(reflectors, tau, count, ld, x, width, width);
  std::memset(xt, 0, width * ld * sizeof(double));
  for (int64_t q = 0; q < count; q++)
    for (int64_t i = 0; i < kept; i++) xt[i * ld + q] = x[q * width + i];
  combine(xt, ld, width, count, t, ld, padded(size), s.factor_a.get(), ld);
  combine(xt, ld, width, count, lt, ld, padded(size), s.factor_b.get(), ld);

  const double cut = directions ? singular(kept) : 0;
  double gone = 0;
  for (int64_t i = 0; i < std::max(kept, count); i++) {
    const double value = singular(i), stays = i < kept ? std::max(value - cut, 0.0) : 0;
    gone += (value - stays) * (value - stays);
    if (i >= kept) continue;
    const double by_b = value > 0 ? unit * std::sqrt(stays) / value : 0, by_a = value > 0 ? by_b / value : 0;
    for (int64_t r = 0; r < size; r++) {
      s.factor_a.get()[i * ld + r] *= by_a * scale_a[r];
      s.factor_b.get()[i * ld + r] *= by_b * scale_b[r];
    }
  }
  s.gone = largest * std::sqrt(gone);
}

constexpr int64_t decompose_work(int64_t ld) { return 6 * ld * ld + 6 * ld; }

template <class T>
struct Compression {
  const ttt::FleetCompress& a;
  const Pieces pieces_a, pieces_b;
  const int64_t ld = padded(a.capacity);
  const Pull pull;

  explicit Compression(const ttt::FleetCompress& a) : a(a), pieces_a(a.n), pieces_b(a.m), pull(a) {}

  int64_t columns(bool of_a) const { return of_a ? a.n : a.m; }
  T* row(const Compressed& s, bool of_a, int64_t r) const {
    return static_cast<T*>(of_a ? a.a : a.b) + (s.slot * a.capacity + r) * columns(of_a);
  }

  bool begin(Compressed& s, int64_t slot) const {
    s.slot = slot;
    s.held = std::min<int64_t>(a.rows[slot], a.capacity);
    s.spent = a.eta_sum[slot];
    s.cuts = s.held > a.rank;
    s.kept = s.cuts ? std::min({a.rank, a.n, a.m}) : s.held;
    s.replays = s.held > 0 && a.replay_rows > 0 && *a.seen > 0;
    s.finite = true;
    s.gone = 0;
    s.rotations.clear();
    if (s.cuts) {
      s.grams.need((pieces_a.count + pieces_b.count) * ld * ld);
      s.work.need(decompose_work(ld));
      s.factor_a.need(padded(s.kept) * ld);
      s.factor_b.need(padded(s.kept) * ld);
      s.rotations.reserve(s.held * s.held);
    }
    if (pull.on) {
      s.fresh_a.need(padded(s.kept) * wide(a.n));
      s.fresh_b.need(padded(s.kept) * wide(a.m));
      s.of_fresh.need(4 * s.kept * s.kept);
    }
    if (s.replays) replay(s);
    return s.held > 0 && (s.cuts || s.replays || pull.on);
  }

  // A <- A - (A X_r^T) V.
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
    c.replay = a.replay;
    c.threads = a.threads;
    Replay drawn(a.replay_rows, a.n);
    draw_replay<T>(c, static_cast<float>(s.spent), drawn);
    const int64_t width = wide(a.n), rows = a.replay_rows;
    Wide x, v;
    x.need(rows * drawn.width);
    v.need(rows * drawn.width);
    for (int64_t k = 0; k < rows * drawn.width; k += STRIP)
      for (int half = 0; half < 2; half++) {
        const float* from = (half ? drawn.v.get() : drawn.x.get()) + k;
        float columns[STRIP];
        store2_rounded<splits<T>>(columns, {load(from), load(from + VL)}, vu{}, vu{});
        widen(columns, STRIP, STRIP, (half ? v.get() : x.get()) + k);
      }
    s.replayed.need(s.held * width);
    const int threads = s.held * rows * width < (1 << 16) ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t r = 0; r < s.held; r++) {
      double* out = s.replayed.get() + r * width;
      widen(row(s, true, r), a.n, width, out);
      std::vector<double> drift(rows);
      for (int64_t q = 0; q < rows; q++) drift[q] = dot(out, x.get() + q * drawn.width, width);
      for (int64_t q = 0; q < rows; q++)
        for (int64_t j = 0; j < width; j += WL)
          store(out + j, load_wide(out + j) - drift[q] * load_wide(v.get() + q * drawn.width + j));
    }
  }

  // Columns [first, first + count) of all rows as they are before compression, `width` apart, zeros behind them.
  void panel(const Compressed& s, bool of_a, int64_t first, int64_t count, int64_t width, double* out) const {
    for (int64_t r = 0; r < s.held; r++)
      if (of_a && s.replays)
        widen(s.replayed.get() + r * wide(a.n) + first, count, width, out + r * width);
      else
        widen(row(s, of_a, r) + first, count, width, out + r * width);
  }

  void gram(const Compressed& s, bool of_a, int64_t piece, double* scratch) const {
    const Pieces& p = of_a ? pieces_a : pieces_b;
    double* out = s.grams.get() + ((of_a ? 0 : pieces_a.count) + piece) * ld * ld;
    std::memset(out, 0, ld * ld * sizeof(double));
    const int64_t last = std::min(p.columns, (piece + 1) * p.width);
    for (int64_t j = piece * p.width; j < last; j += GRAM_COLUMNS) {
      const int64_t count = std::min(GRAM_COLUMNS, last - j), width = wide(count), rows = (s.held + 3) / 4 * 4;
      panel(s, of_a, j, count, width, scratch);
      std::memset(scratch + s.held * width, 0, (rows - s.held) * width * sizeof(double));
      add_row_products(scratch, rows, scratch, rows, width, width, true, out, ld);
    }
  }

  // BLOCK_COLUMNS columns of the new rows.
  void renew(const Compressed& s, bool of_a, int64_t first, double* scratch) const {
    const int64_t count = std::min(BLOCK_COLUMNS, columns(of_a) - first);
    double *old = scratch, *fresh = scratch + ld * BLOCK_COLUMNS;
    panel(s, of_a, first, count, BLOCK_COLUMNS, old);
    if (s.cuts)
      combine((of_a ? s.factor_a : s.factor_b).get(), ld, padded(s.kept), s.held, old, BLOCK_COLUMNS, BLOCK_COLUMNS,
              fresh, BLOCK_COLUMNS);
    else
      fresh = old;
    if (!pull.on) return finish(s, of_a, first, fresh);
    const int64_t width = wide(columns(of_a));
    double* to = (of_a ? s.fresh_a : s.fresh_b).get() + first;
    for (int64_t i = 0; i < s.kept; i++)
      std::memcpy(to + i * width, fresh + i * BLOCK_COLUMNS, std::min(BLOCK_COLUMNS, width - first) * sizeof(double));
  }

  void pulled(const Compressed& s, bool of_a, int64_t first, double* scratch) const {
    const double *own = (of_a ? s.fresh_a : s.fresh_b).get(), *grams = s.of_fresh.get();
    pull.apply(of_a, own, s.kept, first, a.lam * s.spent, grams, scratch);
    finish(s, of_a, first, scratch);
  }

  // New rows into the slot, as its type; zeros into those that become free.
  void finish(const Compressed& s, bool of_a, int64_t first, const double* fresh) const {
    const int64_t count = std::min(BLOCK_COLUMNS, columns(of_a) - first);
    const vw top =
        static_cast<double>(std::is_same_v<T, bf16> ? 0x1.fep127f : std::numeric_limits<float>::max()) - vw{};
    alignas(64) uint32_t words[BLOCK_COLUMNS / 2];
    alignas(64) float narrow[BLOCK_COLUMNS];
    alignas(64) T out[BLOCK_COLUMNS];
    for (int64_t i = 0; i < s.kept; i++) {
      for (int j = 0; j < BLOCK_COLUMNS; j += WL) {
        vw v = load_wide(fresh + i * BLOCK_COLUMNS + j);
        v = v > top ? top : v;
        v = v < -top ? -top : v;
        const vn f = __builtin_convertvector(v, vn);
        std::memcpy(narrow + j, &f, sizeof f);
      }
      if constexpr (std::is_same_v<T, float>) {
        std::memcpy(out, narrow, sizeof out);
      } else {
        rounding_bits<1, BLOCK_COLUMNS / NC>(static_cast<uint32_t>(first / 8), static_cast<uint32_t>(i),
                                             static_cast<uint32_t>(a.step[s.slot]), a.seed, words);
        for (int j = 0; j < BLOCK_COLUMNS; j += STRIP) {
          const vu bits_a = __builtin_convertvector(load_as<vh>(words + j / 2), vu);
          const vu bits_b = __builtin_convertvector(load_as<vh>(words + (j + VL) / 2), vu);
          store2_rounded<false>(out + j, {load(narrow + j), load(narrow + j + VL)}, bits_a, bits_b);
        }
      }
      std::memcpy(row(s, of_a, i) + first, out, count * sizeof(T));
    }
    for (int64_t r = s.kept; r < s.held; r++) std::memset(row(s, of_a, r) + first, 0, count * sizeof(T));
  }

  void end(const Compressed& s) const {
    const double top = std::numeric_limits<float>::max();
    if (s.cuts) a.lost[s.slot] = static_cast<float>(std::min(a.lost[s.slot] + s.gone, top));
    a.rows[s.slot] = static_cast<int32_t>(s.kept);
    a.eta_sum[s.slot] = 0;
    a.step[s.slot]++;
  }
};

// A share of the work of one slot: a piece of a Gram matrix, or a block of columns.
struct Share {
  Compressed* slot;
  bool of_a;
  int64_t at;
};

// The first slot that was left as it was, because its rows are not finite; -1 if none was.
template <class T>
int64_t fleet_compress(const ttt::FleetCompress& a) {
  const Compression<T> work(a);
  const int64_t ld = work.ld;
  const int threads = static_cast<double>(a.capacity) * a.capacity * (a.m + a.n) < 65536 ? 1 : a.threads;
  std::vector<Compressed> slots(std::min<int64_t>(a.count, threads));
  Wide scratch;
  const int64_t own = std::max((ld + 4) * GRAM_COLUMNS, 2 * ld * BLOCK_COLUMNS);
  scratch.need(own * threads);
  int64_t failed = -1;
  for (int64_t k = 0; k < a.count; k += threads) {
    std::vector<Compressed*> chosen, cut;
    std::vector<Share> grams, weights, blocks;
    for (int64_t i = k; i < std::min<int64_t>(a.count, k + threads); i++) {
      Compressed* s = &slots[i - k];
      chosen.push_back(s);
      if (!work.begin(*s, a.slots[i])) continue;
      if (s->cuts) cut.push_back(s);
      for (const bool of_a : {true, false}) {
        for (int64_t p = 0; s->cuts && p < (of_a ? work.pieces_a : work.pieces_b).count; p++)
          grams.push_back({s, of_a, p});
        for (int64_t r = 0; work.pull.on && r < s->kept; r++) weights.push_back({s, of_a, r});
        for (int64_t j = 0; j < work.columns(of_a); j += BLOCK_COLUMNS) blocks.push_back({s, of_a, j});
      }
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      double* mine = scratch.get() + own * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < grams.size(); i++) work.gram(*grams[i].slot, grams[i].of_a, grams[i].at, mine);
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < cut.size(); i++)
        decompose(*cut[i], work.pieces_a.count, work.pieces_b.count, ld, a.directions);
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < blocks.size(); i++)
        if (blocks[i].slot->finite) work.renew(*blocks[i].slot, blocks[i].of_a, blocks[i].at, mine);
      if (work.pull.on) {
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < weights.size(); i++)
          if (weights[i].slot->finite) {
            const Compressed& s = *weights[i].slot;
            work.pull.weigh(weights[i].of_a, (weights[i].of_a ? s.fresh_a : s.fresh_b).get(), s.kept, weights[i].at,
                            s.of_fresh.get());
          }
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < blocks.size(); i++)
          if (blocks[i].slot->finite) work.pulled(*blocks[i].slot, blocks[i].of_a, blocks[i].at, mine);
      }
    }
    for (const Compressed* s : chosen) {
      if (s->finite)
        work.end(*s);
      else if (failed < 0)
        failed = s->slot;
    }
  }
  return failed;
}

int64_t run_fleet_compress(const ttt::FleetCompress& a) {
  return a.dtype == ttt::kF32 ? fleet_compress<float>(a) : fleet_compress<bf16>(a);
}

}  // namespace
