// The output head of a language model in a learning step: the losses of targets, from their logits, and the gradient of
// these losses at the head's input, from the words that matter to it (ttt/learn/head.py).
//
// A token with the logits z has the loss log(total) - (z_target - highest), where highest is its largest logit and
// total the sum of e_j = exp(z_j - highest). The gradient at the head's input is the sum over the words of
// (e_j / total - [j = target]) W_j. For each token those words are left out whose e_j is at most a threshold, which is
// chosen so that they sum to no more than `mass` times the total. The mean row of W stands for each of them: what is
// left out of many tokens has the same direction, and would add up. What a token gets does not depend on other tokens.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "api.h"
#include "exponential.h"
#include "failure.h"
#include "head_api.h"
#include "scratch.h"
#include "vec.h"

namespace {

// The strip of logits at p, of which `count` are left: -infinity stands behind the last.
template <class T>
inline Two logits_at(const T* p, int64_t count) {
  if (count >= STRIP) return load2<splits<T>>(p);
  float lanes[STRIP];
  for (int j = 0; j < STRIP; j++)
    lanes[place<splits<T>>(j)] = j < count ? load1(p + j) : -std::numeric_limits<float>::infinity();
  return {load(lanes), load(lanes + VL)};
}

template <class T>
inline float highest_of(const T* logits, int64_t words) {
  vf high[2][2];
  for (auto& each : high) each[0] = each[1] = splat(-std::numeric_limits<float>::infinity());
  const auto raise = [](vf& to, vf v) { to = v > to ? v : to; };
  for (int64_t j = 0, turn = 0; j < words; j += STRIP, turn ^= 1) {
    const Two z = logits_at(logits + j, words - j);
    raise(high[turn][0], z.a);
    raise(high[turn][1], z.b);
  }
  for (vf v : {high[0][1], high[1][0], high[1][1]}) raise(high[0][0], v);
  float lanes[VL];
  store(lanes, high[0][0]);
  return *std::max_element(lanes, lanes + VL);
}

template <class T>
void head_scores(const ttt::HeadScores& a) {
  constexpr int64_t block = 64 * STRIP;  // words whose sum is made in float32
  const int threads = static_cast<double>(a.tokens) * a.words < 65536 ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t t = 0; t < a.tokens; t++) {
    const T* logits = static_cast<const T*>(a.logits) + t * a.words;
    const float highest = highest_of(logits, a.words);
    double total = 0;
    for (int64_t j0 = 0; j0 < a.words; j0 += block) {
      Two part = {};
      for (int64_t j = j0; j < std::min(j0 + block, a.words); j += STRIP) {
        const Two z = logits_at(logits + j, a.words - j);
        part.a += exponential(z.a - highest);
        part.b += exponential(z.b - highest);
      }
      total += sum(part.a + part.b);
    }
    a.highest[t] = highest;
    a.total[t] = static_cast<float>(total);
    a.nll[t] = static_cast<float>(std::log(total) - (load1(logits + a.targets[t]) - highest));
  }
}

// The words of a token that matter, strip by strip, each with what its row of W is multiplied with.
struct HeadWords {
  std::vector<int32_t> word;
  std::vector<float> factor;
  float left = 0;  // the probability of all others
};

// The largest of some thresholds, from `low` on, for which the numbers at e that are at most as large sum to no more
// than `allowed`; `low` has been found to be one. Each of the COUNT thresholds is `ratio` times the one before it.
inline float largest_threshold(const float* e, int64_t wide, float low, float ratio, float allowed) {
  constexpr int COUNT = 8;
  vf left[COUNT] = {};
  vf limit[COUNT];
  float threshold[COUNT];
  for (int k = 0; k < COUNT; k++) {
    threshold[k] = low * std::pow(ratio, static_cast<float>(k + 1));
    limit[k] = splat(threshold[k]);
  }
  for (int64_t j = 0; j < wide; j += VL) {
    const vf value = load(e + j);
#pragma GCC unroll 8
    for (int k = 0; k < COUNT; k++) left[k] += value <= limit[k] ? value : vf{};
  }
  float found = low;
  for (int k = 0; k < COUNT && sum(left[k]) <= allowed; k++) found = threshold[k];
  return found;
}

// Finds the words that matter to a token. `e` has room for as many floats as there are words, in whole strips.
template <class T>
void matter(const T* logits, int64_t words, int64_t target, float highest, float total, float mass, float* e,
            HeadWords& to) {
  if (!std::isfinite(total)) {  // a logit is not: the gradient shall not be either
    to.word.push_back(static_cast<int32_t>(target));
    to.factor.push_back(std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const int64_t wide = (words + STRIP - 1) / STRIP * STRIP;
  for (int64_t j = 0; j < words; j += STRIP) {
    const Two z = logits_at(logits + j, words - j);
    store2<false>(e + j, {exponential(z.a - highest), exponential(z.b - highest)});
  }
  const int64_t at = target / STRIP * STRIP + place<splits<T>>(static_cast<int>(target % STRIP));
  const float own = e[at];
  e[at] = std::numeric_limits<float>::infinity();  // the target is never left out
  // All words up to `low` may be left out; no word above `allowed` may. Two searches narrow this down.
  const float allowed = mass * total, low = allowed / static_cast<float>(words);
  const float ratio = std::pow(static_cast<float>(words), 1.0f / 9);
  float threshold = largest_threshold(e, wide, low, ratio, allowed);
  threshold = largest_threshold(e, wide, threshold, std::pow(ratio, 1.0f / 9), allowed);
  const auto put = [&](int64_t place_of_e) {
    const int64_t strip = place_of_e / STRIP * STRIP;
    const int lane = static_cast<int>(place_of_e - strip);
    const int column = splits<T> ? (lane < VL ? 2 * lane : 2 * (lane - VL) + 1) : lane;
    to.word.push_back(static_cast<int32_t>(strip + column));
    to.factor.push_back((place_of_e == at ? own - total : e[place_of_e]) / total);
  };
  for (int64_t j = 0; j < wide; j += VL) {
#if defined(__AVX512F__)
    const __m512 value = (__m512)load(e + j);
    for (uint32_t kept = _mm512_cmp_ps_mask(value, (__m512)splat(threshold), _CMP_NLE_UQ); kept; kept &= kept - 1)
      put(j + __builtin_ctz(kept));
#else
    for (int64_t l = j; l < j + VL; l++)
      if (!(e[l] <= threshold)) put(l);
#endif
  }
  double kept = 1;  // the target's factor is its probability less 1
  for (const float factor : to.factor) kept += factor;
  to.left = std::max(0.0f, static_cast<float>(1 - kept));
}

// Strips of columns that are summed at a time, in registers.
constexpr int HEAD_STRIPS = VL == 16 ? 8 : 5;

// Bytes of W that all tokens meet before the next ones, and the most words: the fewer are summed one after the other,
// the less is lost to rounding.
constexpr int64_t HEAD_BLOCK = 384 << 10, HEAD_BLOCK_WORDS = 512;

// acc (columns in the order of strips) += the sum over `count` words of factor W_word, for some strips of the columns
// from W on; d: the length of a row of W. Of the last strip `columns` columns are left, if that is fewer than a strip.
template <int strips, class W>
inline void add_words(float* acc, const W* weight, int64_t d, const int32_t* word, const float* factor, int64_t count,
                      int64_t columns) {
  Two value[strips] = {};
  const bool whole = columns >= strips * STRIP;
  for (int64_t i = 0; i < count; i++) {
    const W* row = weight + word[i] * d;
    const vf f = splat(factor[i]);
#pragma GCC unroll 8
    for (int s = 0; s < strips; s++) {
      const bool part = s + 1 == strips && !whole;
      const Two w =
          part ? load2_part<splits<W>>(row + s * STRIP, columns - s * STRIP) : load2<splits<W>>(row + s * STRIP);
      value[s].a += f * w.a;
      value[s].b += f * w.b;
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < strips; s++) {
    store(acc + s * STRIP, load(acc + s * STRIP) + value[s].a);
    store(acc + s * STRIP + VL, load(acc + s * STRIP + VL) + value[s].b);
  }
}

template <int strips, class W>
inline void add_words_of(int some, float* acc, const W* weight, int64_t d, const int32_t* word, const float* factor,
                         int64_t count, int64_t columns) {
  if constexpr (strips > 1)
    if (some < strips) return add_words_of<strips - 1>(some, acc, weight, d, word, factor, count, columns);
  add_words<strips>(acc, weight, d, word, factor, count, columns);
}

// The gradients, as sums over the words of each token. Threads share the columns.
template <class W>
void add_rows_of_head(const ttt::HeadGradient& a, const std::vector<HeadWords>& kept) {
  const W* weight = static_cast<const W*>(a.weight);
  const int64_t strips = (a.width + STRIP - 1) / STRIP, parts = std::min<int64_t>(strips, a.threads);
  const auto columns_of = [&](int64_t part) {
    const int64_t first = part * strips / parts, own = (part + 1) * strips / parts - first;
    const int64_t j0 = first * STRIP, columns = std::min(own * STRIP, a.width - j0), wide = own * STRIP;
    const int64_t pieces = (own + HEAD_STRIPS - 1) / HEAD_STRIPS;
    // All tokens meet a block of words, whose part of W stays in the second-level cache, before the next one.
    const int64_t fit = HEAD_BLOCK / (columns * static_cast<int64_t>(sizeof(W)));
    const int64_t block = std::min(std::max<int64_t>(fit, 16), HEAD_BLOCK_WORDS);
    Scratch sums(a.tokens * wide);
    std::fill(sums.get(), sums.get() + a.tokens * wide, 0.0f);
    // To the sums of token t, `count` of the rows of W that begin at `rows`.
    const auto add = [&](int64_t t, const W* rows, const int32_t* word, const float* factor, int64_t count) {
      for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t from = piece * own / pieces, some = (piece + 1) * own / pieces - from, j = from * STRIP;
        add_words_of<HEAD_STRIPS>(static_cast<int>(some), sums.get() + t * wide + j, rows + j0 + j, a.width, word,
                                  factor, count, columns - j);
      }
    };
    std::vector<size_t> at(a.tokens, 0);
    for (int64_t end = block; end < a.words + block; end += block)
      for (int64_t t = 0; t < a.tokens; t++) {
        const HeadWords& words = kept[t];
        const size_t begin = at[t];
        while (at[t] < words.word.size() && words.word[at[t]] < end) at[t]++;
        const int64_t count = static_cast<int64_t>(at[t] - begin);
        if (count > 0) add(t, weight, words.word.data() + begin, words.factor.data() + begin, count);
      }
    const int32_t first_word = 0;
    for (int64_t t = 0; t < a.tokens; t++) {
      if (kept[t].left > 0) add(t, static_cast<const W*>(a.mean), &first_word, &kept[t].left, 1);
      store_strips(sums.get() + t * wide, columns, static_cast<W*>(a.out) + t * a.width + j0);
    }
  };
  Failure failure;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static)
  for (int64_t part = 0; part < parts; part++) failure.of([&] { columns_of(part); });
  failure.rethrow();
}

// The number of rows of W that the gradients were made of, each counted once for each token; -1 if that is more than
// `most`, and nothing is made.
template <class T>
int64_t head_gradient(const ttt::HeadGradient& a) {
  std::vector<HeadWords> kept(a.tokens);
  std::atomic<int64_t> count{0};
  const int64_t wide = (a.words + STRIP - 1) / STRIP * STRIP;
  const int64_t parts = std::min<int64_t>(a.tokens, a.threads);
  Failure failure;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static)
  for (int64_t part = 0; part < parts; part++)
    failure.of([&] {
      Scratch e(wide);
      for (int64_t t = part; t < a.tokens; t += parts) {
        if ((a.wanted != nullptr && !a.wanted[t]) || count > a.most) continue;
        matter(static_cast<const T*>(a.logits) + t * a.words, a.words, a.targets[t], a.highest[t], a.total[t], a.mass,
               e.get(), kept[t]);
        count += static_cast<int64_t>(kept[t].word.size());
      }
    });
  failure.rethrow();
  if (count > a.most) return -1;
  if (a.weight_dtype == ttt::kF32)
    add_rows_of_head<float>(a, kept);
  else
    add_rows_of_head<bf16>(a, kept);
  return count;
}

void run_head_scores(const ttt::HeadScores& a) {
  if (a.dtype == ttt::kF32)
    head_scores<float>(a);
  else
    head_scores<bf16>(a);
}

int64_t run_head_gradient(const ttt::HeadGradient& a) {
  return a.dtype == ttt::kF32 ? head_gradient<float>(a) : head_gradient<bf16>(a);
}

}  // namespace
