#pragma once

// Convolutions with some of a weight's output channels (oc) and some of its input channels (ic), see abi.h for formulas
// and letters. The weight is read where it lies, so that any mask costs what it opens: the lanes of a register hold
// neighbouring pixels, and each weight is broadcast to all of them.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "abi.h"
#include "threads.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, SUMS = 24;  // floats of a register; registers of 32 that hold sums
#else
constexpr int LANES = 8, SUMS = 12;  // likewise, of 16
#endif
constexpr int VECTORS = 4;  // registers of pixels that are summed at once, at most
constexpr int MAX_OC = 12;  // output channels that are summed at once, at most
constexpr int LONE_OC = 8;  // likewise for one register of pixels: the addresses of weights take registers too
constexpr int64_t PANEL_VALUES = 1 << 15;  // pixels that stay in the second-level cache for all output channels
constexpr int64_t NEAR_WEIGHTS = 5 << 15;  // weights that stay there beside them
constexpr int64_t PARALLEL = 1 << 14;  // values worth sharing among threads

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));

Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
void store(float* p, Lanes x) { *reinterpret_cast<Lanes*>(p) = x; }

// Lanes [low, high) alone, the others are read as 0 and not written; and the first `count`, 0 to LANES.
#ifdef __AVX512F__
using Mask = __mmask16;
Mask lanes_below(int64_t count) { return (1u << std::clamp<int64_t>(count, 0, LANES)) - 1; }
Mask lanes_of(int64_t low, int64_t high) { return lanes_below(high) & ~lanes_below(low); }
Lanes load(const float* p, Mask mask) { return (Lanes)_mm512_maskz_loadu_ps(mask, p); }
void store(float* p, Lanes x, int64_t count) { _mm512_mask_storeu_ps(p, lanes_below(count), (__m512)x); }
#elif defined(__AVX2__)
using Mask = __m256i;
Mask lanes_of(int64_t low, int64_t high) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto below = [&](int64_t end) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(std::clamp<int64_t>(end, 0, LANES)), lanes);
  };
  return _mm256_andnot_si256(below(low), below(high));
}
Lanes load(const float* p, Mask mask) { return (Lanes)_mm256_maskload_ps(p, mask); }
void store(float* p, Lanes x, int64_t count) { _mm256_maskstore_ps(p, lanes_of(0, count), (__m256)x); }
#else
struct Mask { int64_t low, high; };
Mask lanes_of(int64_t low, int64_t high) { return {std::max<int64_t>(low, 0), std::min<int64_t>(high, LANES)}; }
Lanes load(const float* p, Mask mask) {
  Lanes x = {};
  for (int64_t i = mask.low; i < mask.high; ++i) x[i] = p[i];
  return x;
}
void store(float* p, Lanes x, int64_t count) { std::memcpy(p, &x, count * sizeof(float)); }
#endif
Lanes load(const float* p, int64_t count) { return load(p, lanes_of(0, count)); }

// Every second value of two vectors that follow each other: from the first value on, or with `odd` from the second on.
Lanes every_second(Lanes a, Lanes b, bool odd) {
#ifdef __AVX512F__
  const __m512i lanes = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return (Lanes)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(lanes, _mm512_set1_epi32(odd)), (__m512)b);
#elif defined(__AVX2__)
  const __m256 pairs =
      odd ? _mm256_shuffle_ps((__m256)a, (__m256)b, 0xDD) : _mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  return (Lanes)_mm256_castsi256_ps(_mm256_permute4x64_epi64(_mm256_castps_si256(pairs), 0xD8));
#else
  Lanes x = {};
  for (int64_t i = 0; i < LANES; ++i) x[i] = 2 * i + odd < LANES ? a[2 * i + odd] : b[2 * i + odd - LANES];
  return x;
#endif
}

// Load p[lane * stride] for lanes [low, high), 0 for the others.
Lanes load(const float* p, int64_t low, int64_t high, int64_t stride) {
  if (stride == 1) return load(p, lanes_of(low, high));
  if (stride == 2)
    return every_second(load(p, lanes_of(2 * low, 2 * high - 1)),
                        load(p + LANES, lanes_of(2 * low - LANES, 2 * high - 1 - LANES)), false);
#ifdef __AVX512F__
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offsets = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(stride));
  return (Lanes)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes_of(low, high), offsets, p, 4);
#else
  Lanes x = {};
  for (int64_t i = std::max<int64_t>(low, 0); i < std::min<int64_t>(high, LANES); ++i) x[i] = p[i * stride];
  return x;
#endif
}

int64_t vectors_of(int64_t values) { return (values + LANES - 1) / LANES; }

// Memory that stays for the next call while its thread lives. Its contents are undefined.
struct Scratch {
  std::vector<float> memory;
  float* need(int64_t values) {
    if (int64_t(memory.size()) < values) memory.resize(values);
    return memory.data();
  }
};

// exp(x) up to rounding, 0 and infinity but for their size; keeps NaN. x = n * ln 2 + r, and a polynomial is exp(r).
Lanes exponential(Lanes x) {
  const Lanes low = -87.f - Lanes{}, high = 88.f - Lanes{}, half = 0.5f - Lanes{};
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Lanes scaled = x * 1.44269504f;
  const Ints n = __builtin_convertvector(scaled < Lanes{} ? scaled - half : scaled + half, Ints);
  const Lanes whole = __builtin_convertvector(n, Lanes);
  const Lanes r = x - whole * 0.693359375f - whole * -2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  Lanes sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  return (sum * r * r + r + 1.f) * (Lanes)((n + 127) << 23);
}

Lanes sigmoid(Lanes x) { return 1.f / (1.f + exponential(-x)); }

// erf(x) but for 1.5e-7, by Hastings' formula (Abramowitz and Stegun, 7.1.26).
Lanes error_function(Lanes x) {
  const Lanes size = x < Lanes{} ? -x : x, t = 1.f / (1.f + 0.3275911f * size);
  Lanes sum = t * 1.061405429f - 1.453152027f;
  sum = sum * t + 1.421413741f;
  sum = sum * t - 0.284496736f;
  sum = sum * t + 0.254829592f;
  const Lanes result = 1.f - sum * t * exponential(-size * size);
  return x < Lanes{} ? -result : result;
}

// An activation of abi.h.
struct Bounds {
  float lowest, highest;
  int64_t activation = CLAMP;
  float parameter = 0.f;

  Lanes clamp(Lanes x) const {  // keeps NaN
    if (activation != CLAMP) return other(x);
    return between(x, lowest, highest);
  }

 private:
  static Lanes between(Lanes x, float lowest, float highest) {
    const Lanes low = lowest - Lanes{}, high = highest - Lanes{};
    x = x < low ? low : x;
    return x > high ? high : x;
  }

  __attribute__((noinline)) Lanes other(Lanes x) const {
    switch (activation) {
      case SILU: return x * sigmoid(x);
      case HARDSWISH: return x * between(x + 3.f, 0.f, 6.f) * (1.f / 6);
      case GELU: return 0.5f * x * (1.f + error_function(x * 0.70710678f));
      case GELU_TANH: return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
      case LEAKY_RELU: return x > Lanes{} ? x : parameter * x;
      default: return x > Lanes{} ? x : parameter * (exponential(x) - 1.f);
    }
  }
};

// An input plane (H, W), laid out so that the pixels that one tap of the kernel reads for consecutive output pixels lie
// side by side: with its border, split into parts * parts planes by the remainders of y and x divided by the stride.
// Each part has `lines` of OW + reach pixels. A position counts along such lines, so that `reach` positions without a
// pixel lie between two lines of the output.
// Example: a line of W = 6 pixels a b c d e f with K = 3, stride = 2, padding = 1, thus OW = 3. With its border it is
// 0 a b c d e f 0. Part 0 of it holds 0 b d f, part 1 holds a c e 0. Tap 0 reads 0 b d, tap 1 a c e, tap 2 b d f.
struct Layout {
  int64_t height, width, kernel, stride, padding;
  int64_t out_height = (height + 2 * padding - kernel) / stride + 1;
  int64_t out_width = (width + 2 * padding - kernel) / stride + 1;
  int64_t pixels = out_height * out_width, taps = kernel * kernel;
  bool is_plain = kernel == 1 && stride == 1 && padding == 0;  // the image itself has this layout
  int64_t parts = std::min(stride, kernel), reach = (kernel - 1) / stride;
  int64_t line = out_width + reach, lines = out_height + reach, part = lines * line, plane = parts * parts * part;
  int64_t positions = (out_height - 1) * line + out_width;

  // Where the pixel that a tap (kh * K + kw) reads for the first position stands in the plane.
  int64_t offset_of(int64_t tap) const {
    const int64_t y = tap / kernel, x = tap % kernel;
    return (y % stride * parts + x % stride) * part + y / stride * line + x / stride;
  }

  // Copy a plane (H, W) into this layout.
  void spread(const float* from, float* to) const {
    for (int64_t py = 0; py < parts; ++py)
      for (int64_t px = 0; px < parts; ++px) {
        const int64_t low = (std::max<int64_t>(0, padding - px) + stride - 1) / stride;
        const int64_t high = (width - 1 - px + padding + stride) / stride;
        for (int64_t y = 0; y < lines; ++y, to += line) {
          const int64_t source = y * stride + py - padding;
          const bool inside = source >= 0 && source < height;
          const float* s = from + source * width + px - padding;
          for (int64_t x = 0; x < line; x += LANES) {
            const Lanes values = inside ? load(s + x * stride, low - x, high - x, stride) : Lanes{};
            store(to + x, values, std::min<int64_t>(LANES, line - x));
          }
        }
      }
  }

  // out = clamp(sums + shift + residual) for the positions [begin, end) of an output plane; residual may be null.
  void finish(const float* sums, int64_t begin, int64_t end, float shift, const float* residual, float* out,
              Bounds bounds) const {
    end = std::min(end, positions);
    const int64_t width = reach ? out_width : pixels, step = reach ? line : pixels;  // without gaps, one line
    for (int64_t y = begin / step; y * step < end; ++y) {
      const int64_t left = std::max<int64_t>(0, begin - y * step), right = std::min(width, end - y * step);
      const float *from = sums + y * step - begin, *also = residual ? residual + y * width : nullptr;
      float* to = out + y * width;
      int64_t x = left;
      for (; x + LANES <= right; x += LANES) {
        Lanes value = load(from + x) + shift;
        if (also) value += load(also + x);
        store(to + x, bounds.clamp(value));
      }
      if (x >= right) continue;
      Lanes value = load(from + x, right - x) + shift;
      if (also) value += load(also + x, right - x);
      store(to + x, bounds.clamp(value), right - x);
    }
  }
};

// The innermost loop, for N output channels and V vectors of pixels, whose sums stay in registers:
//     sums[n, v, :] = (resume ? sums[n, v, :] : 0) + sum over j, t of weight_of[n][ic_at[j] + t] * pixels[j, t, v, :]
// Vector v of the pixels that tap t reads of input channel j stands at pixels + j * plane + tap_at[t] + v * LANES.
template <int N, int V>
void multiply(const float* pixels, int64_t plane, const int64_t* tap_at, int64_t taps, const float* const* weight_of,
              const int64_t* ic_at, int64_t n_in, bool resume, float* sums) {
  Lanes a[N][V];
  const float* weights[N];
  for (int n = 0; n < N; ++n) {
    weights[n] = weight_of[n];
    for (int v = 0; v < V; ++v) a[n][v] = resume ? load(sums + (n * V + v) * LANES) : Lanes{};
  }
  for (int64_t j = 0; j < n_in; ++j, pixels += plane) {
    int64_t tap = ic_at[j];
    for (int64_t t = 0; t < taps; ++t, ++tap) {
      const float* p = pixels + tap_at[t];
      Lanes u[V];
      for (int v = 0; v < V; ++v) u[v] = load(p + v * LANES);
      for (int n = 0; n < N; ++n) {
        const Lanes w = weights[n][tap] - Lanes{};
        for (int v = 0; v < V; ++v) a[n][v] += w * u[v];
      }
    }
  }
  for (int n = 0; n < N; ++n)
    for (int v = 0; v < V; ++v) store(sums + (n * V + v) * LANES, a[n][v]);
}

using Multiply = decltype(&multiply<1, 1>);

// multiply<N, V> for each N and V whose sums fit the registers.
struct Table {
  Multiply of[MAX_OC + 1][VECTORS + 1] = {};
  template <int N, int V>
  void add() {
    if constexpr (N * V <= SUMS) of[N][V] = multiply<N, V>;
    if constexpr (V > 1) add<N, V - 1>();
    else if constexpr (N > 1) add<N - 1, VECTORS>();
  }
  Table() { add<MAX_OC, VECTORS>(); }
};
const Table MULTIPLY;

// sum over i of a[i] * b[i]
float dot(const float* a, const float* b, int64_t count) {
  Lanes sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES)
    for (int v = 0; v < 4; ++v) sums[v] += load(a + i + v * LANES) * load(b + i + v * LANES);
  for (; i < count; i += LANES) sums[0] += load(a + i, count - i) * load(b + i, count - i);
  const Lanes all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0.f;
  for (int l = 0; l < LANES; ++l) sum += all[l];
  return sum;
}

// The part of the work that thread `me` of `all` does.
struct Share {
  int64_t me, all;
  int64_t begin(int64_t count) const { return count * me / all; }
  int64_t end(int64_t count) const { return count * (me + 1) / all; }
};

// Call some(begin, end) for parts of [0, count), one for each thread; for all of it at once if there are too few values
// to share.
template <typename Some>
void parts_of(int64_t count, int64_t values, int64_t threads, const Some& some) {
  if (values <= PARALLEL) threads = 1;
  Threads::share(threads, threads, [&](int64_t t) {
    const Share share = {t, threads};
    some(share.begin(count), share.end(count));
  });
}

// Call one(i) for each i in [0, count); shared as by `parts_of`.
template <typename One>
void each_of(int64_t count, int64_t values, int64_t threads, const One& one) {
  parts_of(count, values, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) one(i);
  });
}

// CONVOLUTION of abi.h for one image: out (n_out, OH, OW) = clamp(bias + residual + convolution) of image (n_in, H, W)
// with weight (OC, IC, K, K), where IC = ic_total. Output channel i is the weight's oc[i], input channel j its ic[j],
// ascending. bias (OC,) and residual (n_out, OH, OW) may be null.
struct Convolution {
  const float *image, *weight, *bias;
  const int64_t *oc, *ic;
  const float* residual;
  float* out;
  int64_t n_in, n_out, ic_total;
  Layout layout;
  Bounds bounds;

  void run(int64_t threads) const {
    static thread_local Scratch kept;
    const float* source = image;
    if (!layout.is_plain) {
      float* copy = kept.need(room());
      each_of(n_in, n_in * layout.plane, threads, [&](int64_t c) {
        layout.spread(image + c * layout.height * layout.width, copy + c * layout.plane);
      });
      source = copy;
    }
    const std::vector<int64_t> ic_at = ic_offsets();
    Threads::share(threads, threads, [&](int64_t i) { part(source, ic_at.data(), {i, threads}); });
  }

  // Run images of one size, one after another. Where each is one tile and the weights are large, run chunk by chunk of
  // the input channels instead, so that weights are read from memory once for all images.
  static void run(const std::vector<Convolution>& all) {
    const Convolution& one = all[0];
    const int64_t taps = one.layout.taps;
    int64_t most_out = 1;
    bool alike = one.dense();
    for (const Convolution& it : all) most_out = std::max(most_out, it.n_out), alike &= it.n_in == one.n_in;
    const int64_t chunk = std::max<int64_t>(1, NEAR_WEIGHTS / (most_out * taps));
    if (!alike || chunk >= one.n_in) {
      for (const Convolution& it : all) it.run(1);
      return;
    }
    static thread_local std::vector<Scratch> copies, sums;
    static thread_local Scratch panel;
    copies.resize(std::max(copies.size(), all.size())), sums.resize(std::max(sums.size(), all.size()));
    std::vector<std::vector<int64_t>> ic_at;
    std::vector<Tiles> tiles;
    for (size_t i = 0; i < all.size(); ++i) {
      float* copy = copies[i].need(all[i].room());
      for (int64_t c = 0; c < all[i].n_in; ++c)
        one.layout.spread(all[i].image + c * one.layout.height * one.layout.width, copy + c * one.layout.plane);
      ic_at.push_back(all[i].ic_offsets());
      tiles.emplace_back(all[i]);
    }
    for (int64_t begin = 0; begin < one.n_in; begin += chunk)
      for (size_t i = 0; i < all.size(); ++i) {
        const Tiles& its = tiles[i];
        all[i].add(copies[i].memory.data(), ic_at[i].data(), its, 0, begin, std::min(chunk, one.n_in - begin), 0,
                   its.n_groups, panel.need(chunk * taps * its.vectors_per_tile * LANES + 2 * LANES),
                   sums[i].need(its.n_groups * its.oc_per_group * its.vectors_per_tile * LANES));
      }
  }

 private:
  int64_t room() const { return n_in * layout.plane + 2 * VECTORS * LANES; }  // the last vectors read beyond

  std::vector<int64_t> ic_offsets() const {
    std::vector<int64_t> result(n_in);
    for (int64_t j = 0; j < n_in; ++j) result[j] = ic[j] * layout.taps;
    return result;
  }

  // Small maps are packed without the gaps between their lines; one tile then holds them.
  bool dense() const {
    return layout.reach && layout.out_width <= LANES && layout.pixels <= VECTORS * LANES &&
           vectors_of(layout.pixels) < vectors_of(layout.positions);
  }

  // Cuts the output's positions, in vectors, into tiles, and its channels into groups.
  struct Tiles {
    Layout result;  // of the sums
    bool lone;  // the last pixel would have a vector to itself: it is summed with input channels in the lanes instead
    int64_t vectors, n_tiles, vectors_per_tile, oc_per_group, n_groups;
    explicit Tiles(const Convolution& it) : result(it.layout) {
      if (it.dense()) result.reach = 0, result.positions = it.layout.pixels;
      lone = it.layout.taps == 1 && result.positions > LANES && result.positions % LANES == 1;
      vectors = vectors_of(result.positions - lone), n_tiles = (vectors + VECTORS - 1) / VECTORS;
      vectors_per_tile = (vectors + n_tiles - 1) / n_tiles;
      oc_per_group = vectors_per_tile == 1 ? LONE_OC : std::min<int64_t>(MAX_OC, SUMS / vectors_per_tile);
      n_groups = (it.n_out + oc_per_group - 1) / oc_per_group;
    }
    int64_t begin(int64_t tile) const { return vectors * tile / n_tiles; }
  };

  // Run one thread's share: tiles of pixels by groups of output channels, each in chunks of input channels.
  void part(const float* source, const int64_t* ic_at, Share share) const {
    const Tiles tiles(*this);
    const bool by_tiles = tiles.n_tiles >= tiles.n_groups || tiles.n_tiles >= 4 * share.all;
    const Share whole = {0, 1}, of_tiles = by_tiles ? share : whole, of_groups = by_tiles ? whole : share;
    const int64_t first = of_groups.begin(tiles.n_groups), last = of_groups.end(tiles.n_groups);
    const int64_t panel_room = layout.taps * tiles.vectors_per_tile * LANES;
    const int64_t chunk = std::max<int64_t>(1, packs() ? std::min(n_in, PANEL_VALUES / panel_room) : n_in);
    static thread_local Scratch panels, sums;
    float* panel = packs() ? panels.need(chunk * panel_room + 2 * LANES) : nullptr;
    float* sum = sums.need((last - first) * tiles.oc_per_group * (tiles.vectors_per_tile * LANES + tiles.lone));
    for (int64_t tile = of_tiles.begin(tiles.n_tiles); tile < of_tiles.end(tiles.n_tiles); ++tile)
      for (int64_t begin = 0; begin < n_in || begin == 0; begin += chunk)
        add(source, ic_at, tiles, tile, begin, std::min(chunk, n_in - begin), first, last, panel, sum);
  }

  bool packs() const { return dense() || layout.taps == 1; }

  // Sum input channels [begin, begin + n_chunk) for a tile and groups [first, last) of output channels. With the last
  // chunk, finish the results.
  void add(const float* source, const int64_t* ic_at, const Tiles& tiles, int64_t tile, int64_t begin, int64_t n_chunk,
           int64_t first, int64_t last, float* panel, float* sums) const {
    const int64_t taps = layout.taps, left = tiles.begin(tile), vectors = tiles.begin(tile + 1) - left;
    const int64_t start = left * LANES, width = vectors * LANES;
    std::vector<int64_t> tap_at(taps);
    for (int64_t t = 0; t < taps; ++t) tap_at[t] = packs() ? t * width : layout.offset_of(t);
    const float* from = source + begin * layout.plane;
    if (packs()) pack(from, n_chunk, start, width, n_in - begin, panel);
    const bool lone = tiles.lone && tile + 1 == tiles.n_tiles;
    const int64_t at = n_chunk ? ic_at[begin] : 0, span = n_chunk ? ic_at[begin + n_chunk - 1] + 1 - at : 0;
    const float* pixel = lone ? last_pixel(from, ic_at + begin, n_chunk, span) : nullptr;
    float* last_sums =
        sums + (last - first) * tiles.oc_per_group * tiles.vectors_per_tile * LANES - first * tiles.oc_per_group;
    for (int64_t g = first; g < last; ++g) {
      const int64_t first_oc = g * tiles.oc_per_group, n_group = std::min(tiles.oc_per_group, n_out - first_oc);
      const float* weights[MAX_OC];
      for (int64_t i = 0; i < n_group; ++i) weights[i] = weight + oc[first_oc + i] * ic_total * taps;
      float* group_sums = sums + (first_oc - first * tiles.oc_per_group) * tiles.vectors_per_tile * LANES;
      MULTIPLY.of[n_group][vectors](packs() ? panel : from + start, packs() ? taps * width : layout.plane,
                                    tap_at.data(), taps, weights, ic_at + begin, n_chunk, begin > 0, group_sums);
      for (int64_t i = first_oc; lone && i < first_oc + n_group; ++i)
        last_sums[i] = (begin ? last_sums[i] : 0.f) + dot(weights[i - first_oc] + at, pixel, span);
      if (begin + n_chunk < n_in) continue;
      for (int64_t i = 0; i < n_group; ++i) {
        const int64_t to = (first_oc + i) * layout.pixels, end = to + layout.pixels - 1;
        const float shift = bias ? bias[oc[first_oc + i]] : 0.f;
        tiles.result.finish(group_sums + i * width, start, start + width, shift, residual ? residual + to : nullptr,
                            out + to, bounds);
        if (!lone) continue;
        const Lanes value = last_sums[first_oc + i] + shift + (residual ? residual[end] : 0.f) + Lanes{};
        store(out + end, bounds.clamp(value), 1);
      }
    }
  }

  // The last pixel's values of n_chunk input channels, spread as the weights that read them lie, with 0 between them.
  // Their dot product with a slice of the weight is the sum. Example: values v and w of ic = 2, 5 give [v, 0, 0, w].
  const float* last_pixel(const float* from, const int64_t* ic_at, int64_t n_chunk, int64_t span) const {
    static thread_local Scratch kept;
    float* to = kept.need(span + 1);
    std::fill(to, to + span, 0.f);
    for (int64_t j = 0; j < n_chunk; ++j) to[ic_at[j] - ic_at[0]] = from[j * layout.plane + layout.pixels - 1];
    return to;
  }

  // Lay out what each tap reads for `width` output positions from `start` on, side by side: (n_chunk, K * K, width).
  // `from` is the first of the input channels, `left` their number from there to the image's end.
  void pack(const float* from, int64_t n_chunk, int64_t start, int64_t width, int64_t left, float* to) const {
    for (int64_t j = 0; j < n_chunk; ++j)
      for (int64_t t = 0; t < layout.taps; ++t, to += width) {
        const float* p = from + j * layout.plane + layout.offset_of(t);
        if (dense())  // each line overwrites what the one before stored too much
          for (int64_t y = 0; y < layout.out_height; ++y) store(to + y * layout.out_width, load(p + y * layout.line));
        else if (start + width > (left - j) * layout.plane)  // nothing may be read behind the image
          std::copy(p + start, p + std::min(start + width, layout.positions), to);
        else
          for (int64_t v = 0; v < width; v += LANES) store(to + v, load(p + start + v));
      }
  }
};

}  // namespace
