#pragma once

// Convolutions of one image with some of a weight's rows (output channels) and some of its columns (input channels).
// Rows and columns are read where they lie, so any mask costs what it opens and no weight is packed: lanes hold pixels,
// weights are broadcast.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, SUMS = 24;  // of 32 registers
#else
constexpr int LANES = 8, SUMS = 12;  // of 16
#endif
constexpr int VECTORS = 4, ROWS = 12, LONE_ROWS = 8;  // rows where there is but one vector: addresses take registers too
constexpr int64_t PANEL = 1 << 15;  // values that stay in the second-level cache while all rows read them
constexpr int64_t FAR = 5 << 15;  // weights that do beside it
constexpr int64_t PARALLEL = 1 << 14;  // values worth sharing among threads

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
void store(float* p, Lanes x) { *reinterpret_cast<Lanes*>(p) = x; }

// Lanes [low, high) alone, the others are read as 0; and the first `count`, 0 to LANES.
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
  const auto below = [&](int64_t end) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(std::clamp<int64_t>(end, 0, LANES)), lanes); };
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

// Of two vectors that follow each other, every second value: from the first value on, or with `odd` from the second on.
Lanes every_second(Lanes a, Lanes b, bool odd) {
#ifdef __AVX512F__
  const __m512i lanes = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return (Lanes)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(lanes, _mm512_set1_epi32(odd)), (__m512)b);
#elif defined(__AVX2__)
  const __m256 pairs = odd ? _mm256_shuffle_ps((__m256)a, (__m256)b, 0xDD) : _mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  return (Lanes)_mm256_castsi256_ps(_mm256_permute4x64_epi64(_mm256_castps_si256(pairs), 0xD8));
#else
  Lanes x = {};
  for (int64_t i = 0; i < LANES; ++i) x[i] = 2 * i + odd < LANES ? a[2 * i + odd] : b[2 * i + odd - LANES];
  return x;
#endif
}

// The same as `load` of p[lane * stride].
Lanes load(const float* p, int64_t low, int64_t high, int64_t stride) {
  if (stride == 1) return load(p, lanes_of(low, high));
  if (stride == 2)
    return every_second(load(p, lanes_of(2 * low, 2 * high - 1)),
                        load(p + LANES, lanes_of(2 * low - LANES, 2 * high - 1 - LANES)), false);
#ifdef __AVX512F__
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(stride));
  return (Lanes)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes_of(low, high), places, p, 4);
#else
  Lanes x = {};
  for (int64_t i = std::max<int64_t>(low, 0); i < std::min<int64_t>(high, LANES); ++i) x[i] = p[i * stride];
  return x;
#endif
}

int64_t vectors_of(int64_t values) { return (values + LANES - 1) / LANES; }

// Memory that is kept for the next call, while its thread lives; what is in it is not defined.
struct Scratch {
  std::vector<float> memory;
  float* need(int64_t values) {
    if (int64_t(memory.size()) < values) memory.resize(values);
    return memory.data();
  }
};

struct Bounds {
  float lowest, highest;
  Lanes cut(Lanes x) const {  // keeps NaN
    const Lanes low = lowest - Lanes{}, high = highest - Lanes{};
    x = x < low ? low : x;
    return x > high ? high : x;
  }
};

// An input plane, laid out so that what a tap of the kernel reads for consecutive output pixels lies side by side: with
// its border, split by the remainder of the stride, in lines of the output's width and a little more. Positions of the
// output are counted with what lies between its lines.
struct Layout {
  int64_t height, width, kernel, stride, padding;
  int64_t out_height = (height + 2 * padding - kernel) / stride + 1, out_width = (width + 2 * padding - kernel) / stride + 1;
  int64_t pixels = out_height * out_width, taps = kernel * kernel;
  bool as_it_is = kernel == 1 && stride == 1 && padding == 0;
  int64_t parts = std::min(stride, kernel), reach = (kernel - 1) / stride;
  int64_t line = out_width + reach, lines = out_height + reach, part = lines * line, plane = parts * parts * part;
  int64_t positions = (out_height - 1) * line + out_width;

  int64_t place(int64_t tap) const {
    const int64_t y = tap / kernel, x = tap % kernel;
    return (y % stride * parts + x % stride) * part + y / stride * line + x / stride;
  }

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

  // Put sums at positions [begin, end) in a plane: with shift and what is added, if anything, cut at the bounds.
  void finish(const float* sums, int64_t begin, int64_t end, float shift, const float* added, float* out,
              Bounds bounds) const {
    end = std::min(end, positions);
    const int64_t width = reach ? out_width : pixels, step = reach ? line : pixels;  // without gaps, one line
    for (int64_t y = begin / step; y * step < end; ++y) {
      const int64_t left = std::max<int64_t>(0, begin - y * step), right = std::min(width, end - y * step);
      const float *from = sums + y * step - begin, *more = added ? added + y * width : nullptr;
      float* to = out + y * width;
      int64_t x = left;
      for (; x + LANES <= right; x += LANES) {
        Lanes value = load(from + x) + shift;
        if (more) value += load(more + x);
        store(to + x, bounds.cut(value));
      }
      if (x >= right) continue;
      Lanes value = load(from + x, right - x) + shift;
      if (more) value += load(more + x, right - x);
      store(to + x, bounds.cut(value), right - x);
    }
  }
};

// Sums of R rows at V vectors of pixels, on top of those that are there if `more`: input channel j, tap t of vector v
// stand at pixels + j * plane + places[t] + v * LANES.
template <int R, int V>
void multiply(const float* pixels, int64_t plane, const int64_t* places, int64_t taps, const float* const* rows,
              const int64_t* columns, int64_t channels, bool more, float* sums) {
  Lanes a[R][V];
  const float* weights[R];
  for (int r = 0; r < R; ++r) {
    weights[r] = rows[r];
    for (int v = 0; v < V; ++v) a[r][v] = more ? load(sums + (r * V + v) * LANES) : Lanes{};
  }
  for (int64_t j = 0; j < channels; ++j, pixels += plane) {
    int64_t at = columns[j];
    for (int64_t t = 0; t < taps; ++t, ++at) {
      const float* p = pixels + places[t];
      Lanes u[V];
      for (int v = 0; v < V; ++v) u[v] = load(p + v * LANES);
      for (int r = 0; r < R; ++r) {
        const Lanes w = weights[r][at] - Lanes{};
        for (int v = 0; v < V; ++v) a[r][v] += w * u[v];
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(sums + (r * V + v) * LANES, a[r][v]);
}

using Multiply = decltype(&multiply<1, 1>);

struct Table {
  Multiply of[ROWS + 1][VECTORS + 1] = {};
  template <int R, int V>
  void fill() {
    if constexpr (R * V <= SUMS) of[R][V] = multiply<R, V>;
    if constexpr (V > 1) fill<R, V - 1>();
    else if constexpr (R > 1) fill<R - 1, VECTORS>();
  }
  Table() { fill<ROWS, VECTORS>(); }
};
const Table MULTIPLY;

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

// Which part of the work thread `me` of `all` does.
struct Share {
  int64_t me, all;
  int64_t begin(int64_t count) const { return count * me / all; }
  int64_t end(int64_t count) const { return count * (me + 1) / all; }
};

// Call some(begin, end) for parts of [0, count), one for each thread; for all at once where there are too few values to
// share.
template <typename Some>
void parts_of(int64_t count, int64_t values, int64_t threads, const Some& some) {
  if (values <= PARALLEL) threads = 1;
  Threads::share(threads, threads, [&](int64_t t) {
    const Share share = {t, threads};
    some(share.begin(count), share.end(count));
  });
}

// Call one(i) for each i in [0, count); as above.
template <typename One>
void each_of(int64_t count, int64_t values, int64_t threads, const One& one) {
  parts_of(count, values, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) one(i);
  });
}

// What a convolution is given: image (channels, height, width); weight (all, every, kernel, kernel), of which row
// rows[i] gives output channel i and column columns[j], ascending, reads input channel j; bias (all,) or null; added, or
// null, and out (count, out height, out width).
struct Convolution {
  const float *image, *weight, *bias;
  const int64_t *rows, *columns;
  const float* added;
  float* out;
  int64_t channels, count, every;
  Layout layout;
  Bounds bounds;

  void run(int64_t threads) const {
    static thread_local Scratch kept;
    const float* source = image;
    if (!layout.as_it_is) {
      float* copy = kept.need(room());
      each_of(channels, channels * layout.plane, threads, [&](int64_t c) {
        layout.spread(image + c * layout.height * layout.width, copy + c * layout.plane);
      });
      source = copy;
    }
    const std::vector<int64_t> columns_at = offsets();
    Threads::share(threads, threads, [&](int64_t i) { part(source, columns_at.data(), {i, threads}); });
  }

  // Of images of one size, one after another; or where each is one tile and the weights are large, chunk by chunk of the
  // columns, so that weights are read once for all.
  static void run(const std::vector<Convolution>& all) {
    const Convolution& one = all[0];
    const int64_t taps = one.layout.taps;
    int64_t most = 1;
    bool alike = one.dense();
    for (const Convolution& it : all) most = std::max(most, it.count), alike &= it.channels == one.channels;
    const int64_t chunk = std::max<int64_t>(1, FAR / (most * taps));
    if (!alike || chunk >= one.channels) {
      for (const Convolution& it : all) it.run(1);
      return;
    }
    static thread_local std::vector<Scratch> copies, sums;
    static thread_local Scratch panel;
    copies.resize(std::max(copies.size(), all.size())), sums.resize(std::max(sums.size(), all.size()));
    std::vector<std::vector<int64_t>> columns_at;
    std::vector<Tiles> tiles;
    for (size_t i = 0; i < all.size(); ++i) {
      float* copy = copies[i].need(all[i].room());
      for (int64_t c = 0; c < all[i].channels; ++c)
        one.layout.spread(all[i].image + c * one.layout.height * one.layout.width, copy + c * one.layout.plane);
      columns_at.push_back(all[i].offsets());
      tiles.emplace_back(all[i]);
    }
    for (int64_t begin = 0; begin < one.channels; begin += chunk)
      for (size_t i = 0; i < all.size(); ++i) {
        const Tiles& its = tiles[i];
        all[i].add(copies[i].memory.data(), columns_at[i].data(), its, 0, begin, std::min(chunk, one.channels - begin), 0,
                   its.groups, panel.need(chunk * taps * its.wide * LANES + 2 * LANES),
                   sums[i].need(its.groups * its.high * its.wide * LANES));
      }
  }

 private:
  int64_t room() const { return channels * layout.plane + 2 * VECTORS * LANES; }  // the last vectors read beyond

  std::vector<int64_t> offsets() const {
    std::vector<int64_t> result(channels);
    for (int64_t j = 0; j < channels; ++j) result[j] = columns[j] * layout.taps;
    return result;
  }

  // Small maps are packed without what lies between their lines; one tile then holds them.
  bool dense() const {
    return layout.reach && layout.out_width <= LANES && layout.pixels <= VECTORS * LANES &&
           vectors_of(layout.pixels) < vectors_of(layout.positions);
  }

  // How positions of the output, in vectors, are cut into tiles, and rows into groups.
  struct Tiles {
    Layout result;  // of what is summed
    bool lone;  // the last pixel would have a vector to itself, and is summed with channels side by side
    int64_t vectors, count, wide, high, groups;
    explicit Tiles(const Convolution& it) : result(it.layout) {
      if (it.dense()) result.reach = 0, result.positions = it.layout.pixels;
      lone = it.layout.taps == 1 && result.positions > LANES && result.positions % LANES == 1;
      vectors = vectors_of(result.positions - lone), count = (vectors + VECTORS - 1) / VECTORS;
      wide = (vectors + count - 1) / count;
      high = wide == 1 ? LONE_ROWS : std::min<int64_t>(ROWS, SUMS / wide), groups = (it.count + high - 1) / high;
    }
    int64_t begin(int64_t tile) const { return vectors * tile / count; }
  };

  // Tiles of pixels by groups of rows, in chunks of input channels.
  void part(const float* source, const int64_t* columns_at, Share share) const {
    const Tiles tiles(*this);
    const bool by_tiles = tiles.count >= tiles.groups || tiles.count >= 4 * share.all;
    const Share whole = {0, 1}, of_tiles = by_tiles ? share : whole, of_groups = by_tiles ? whole : share;
    const int64_t first = of_groups.begin(tiles.groups), last = of_groups.end(tiles.groups);
    const int64_t panel_room = layout.taps * tiles.wide * LANES;
    const int64_t chunk = std::max<int64_t>(1, packs() ? std::min(channels, PANEL / panel_room) : channels);
    static thread_local Scratch panels, sums;
    float* panel = packs() ? panels.need(chunk * panel_room + 2 * LANES) : nullptr;
    float* sum = sums.need((last - first) * tiles.high * (tiles.wide * LANES + tiles.lone));
    for (int64_t tile = of_tiles.begin(tiles.count); tile < of_tiles.end(tiles.count); ++tile)
      for (int64_t begin = 0; begin < channels || begin == 0; begin += chunk)
        add(source, columns_at, tiles, tile, begin, std::min(chunk, channels - begin), first, last, panel, sum);
  }

  bool packs() const { return dense() || layout.taps == 1; }

  // Sum `some` channels from `begin` on for groups [first, last) of rows at a tile; with the last channels, finish.
  void add(const float* source, const int64_t* columns_at, const Tiles& tiles, int64_t tile, int64_t begin, int64_t some,
           int64_t first, int64_t last, float* panel, float* sum) const {
    const int64_t taps = layout.taps, left = tiles.begin(tile), vectors = tiles.begin(tile + 1) - left;
    const int64_t start = left * LANES, width = vectors * LANES;
    std::vector<int64_t> places(taps);
    for (int64_t t = 0; t < taps; ++t) places[t] = packs() ? t * width : layout.place(t);
    const float* from = source + begin * layout.plane;
    if (packs()) pack(from, some, start, width, channels - begin, panel);
    const bool lone = tiles.lone && tile + 1 == tiles.count;
    const int64_t at = some ? columns_at[begin] : 0, span = some ? columns_at[begin + some - 1] + 1 - at : 0;
    const float* pixel = lone ? last_pixel(from, columns_at + begin, some, span) : nullptr;
    float* last_sums = sum + (last - first) * tiles.high * tiles.wide * LANES - first * tiles.high;
    for (int64_t g = first; g < last; ++g) {
      const int64_t row = g * tiles.high, these = std::min(tiles.high, count - row);
      const float* taken[ROWS];
      for (int64_t r = 0; r < these; ++r) taken[r] = weight + rows[row + r] * every * taps;
      float* here = sum + (row - first * tiles.high) * tiles.wide * LANES;
      MULTIPLY.of[these][vectors](packs() ? panel : from + start, packs() ? taps * width : layout.plane, places.data(),
                                  taps, taken, columns_at + begin, some, begin > 0, here);
      for (int64_t r = row; lone && r < row + these; ++r)
        last_sums[r] = (begin ? last_sums[r] : 0.f) + dot(taken[r - row] + at, pixel, span);
      if (begin + some < channels) continue;
      for (int64_t r = 0; r < these; ++r) {
        const int64_t to = (row + r) * layout.pixels, end = to + layout.pixels - 1;
        const float shift = bias ? bias[rows[row + r]] : 0.f;
        tiles.result.finish(here + r * width, start, start + width, shift, added ? added + to : nullptr, out + to, bounds);
        if (lone) store(out + end, bounds.cut(last_sums[row + r] + shift + (added ? added[end] : 0.f) + Lanes{}), 1);
      }
    }
  }

  // The last pixel's values of `some` channels, where the columns of a row that read them lie, and 0 between.
  const float* last_pixel(const float* from, const int64_t* columns_at, int64_t some, int64_t span) const {
    static thread_local Scratch kept;
    float* to = kept.need(span + 1);
    std::fill(to, to + span, 0.f);
    for (int64_t j = 0; j < some; ++j) to[columns_at[j] - columns_at[0]] = from[j * layout.plane + layout.pixels - 1];
    return to;
  }

  // What `some` of the `left` channels from `from` on read for `width` output positions from `start` on, side by side:
  // (some, taps, width).
  void pack(const float* from, int64_t some, int64_t start, int64_t width, int64_t left, float* to) const {
    for (int64_t j = 0; j < some; ++j)
      for (int64_t t = 0; t < layout.taps; ++t, to += width) {
        const float* p = from + j * layout.plane + layout.place(t);
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
