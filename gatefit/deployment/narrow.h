// Convolutions 3 x 3 where all rows are wanted: lanes hold rows, so weights are packed ahead, and what lies beyond the
// border costs nothing. For images that pieces of 14 or 16 pixels fill, or that are narrow.

#include "convolve.h"

namespace {

constexpr int64_t FEW = 32;  // columns whose weights for LANES rows stay in the first-level cache

// Adds to the sums (height, width) of LANES rows at H lines of P pixels from (y, left) on, the whole width if H > 1:
// channel j of the image (channels, height, width) is read by column columns[j] of weight (columns, 9, LANES).
template <int P, int H>
void by_rows(const float* image, const float* weight, const int64_t* columns, int64_t channels, int64_t y, int64_t left,
             int64_t height, int64_t width, Lanes* sums) {
  const bool first = H > 1 || left == 0, last = H > 1 || left + P == width;
  bool inside[H][3];
  for (int h = 0; h < H; ++h)
    for (int dy = 0; dy < 3; ++dy)
      inside[h][dy] = y + h < height && y + h + dy - 1 >= 0 && y + h + dy - 1 < height;
  Lanes a[H * P] = {};
  for (int64_t j = 0; j < channels; ++j) {
    const float *plane = image + j * height * width + left, *taps = weight + columns[j] * 9 * LANES;
    if (j + 2 < channels)
      for (int t = 0; t < 9; ++t) __builtin_prefetch(weight + (columns[j + 2] * 9 + t) * LANES);
    if constexpr (H > 2) {  // short lines: a weight is loaded once for all of them
#pragma GCC unroll 3
      for (int dy = 0; dy < 3; ++dy)
#pragma GCC unroll 3
        for (int dx = 0; dx < 3; ++dx) {
          const Lanes w = load(taps + (dy * 3 + dx) * LANES);
#pragma GCC unroll 4
          for (int h = 0; h < H; ++h) {
            if (!inside[h][dy]) continue;
            const float* line = plane + (y + h + dy - 1) * width;
#pragma GCC unroll 16
            for (int x = 0; x < P; ++x)
              if (!(x + dx == 0 && first) && !(x + dx == P + 1 && last)) a[h * P + x] += w * (line[x + dx - 1] - Lanes{});
          }
        }
    } else {
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h)
#pragma GCC unroll 3
        for (int dy = 0; dy < 3; ++dy) {
          if (!inside[h][dy]) continue;
          const float* line = plane + (y + h + dy - 1) * width;
#pragma GCC unroll 3
          for (int dx = 0; dx < 3; ++dx) {
            const Lanes w = load(taps + (dy * 3 + dx) * LANES);
#pragma GCC unroll 16
            for (int x = 0; x < P; ++x)
              if (!(x + dx == 0 && first) && !(x + dx == P + 1 && last)) a[h * P + x] += w * (line[x + dx - 1] - Lanes{});
          }
        }
    }
  }
  for (int h = 0; h < H && y + h < height; ++h)
    for (int x = 0; x < P; ++x) sums[(y + h) * width + left + x] += a[h * P + x];
}

// As `Convolution` with all rows, stride 1 and padding 1; weight packed: (count / LANES, every, 9, LANES).
struct NarrowConvolution {
  const float *image, *weight, *bias;
  const int64_t* columns;
  const float* added;
  float* out;
  int64_t channels, count, every, height, width;
  Bounds bounds;

  static bool fits(int64_t width) {
    return width == 4 || width == 7 || width == 8 || (width > 0 && (width % 14 == 0 || width % 16 == 0));
  }

  // Of images of one size, whose weights are read once for all; threads share the rows.
  static void run(const std::vector<NarrowConvolution>& all, int64_t threads) {
    const auto part = [&](Share share) {
      switch (all[0].width) {
        case 4: return run_as<4, 4>(all, share);
        case 7: return run_as<7, 2>(all, share);
        case 8: return run_as<8, 2>(all, share);
        default: return all[0].width % 16 ? run_as<14, 1>(all, share) : run_as<16, 1>(all, share);
      }
    };
    if (threads == 1) return part({0, 1});
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < threads; ++i) part({i, threads});
  }

 private:
  template <int P, int H>
  static void run_as(const std::vector<NarrowConvolution>& all, Share share) {
    const NarrowConvolution& one = all[0];
    const int64_t pixels = one.height * one.width;
    static thread_local Scratch kept;
    Lanes* sums = reinterpret_cast<Lanes*>(kept.need(all.size() * pixels * LANES));
    for (int64_t r = share.begin(one.count / LANES); r < share.end(one.count / LANES); ++r) {
      const float* weight = one.weight + r * one.every * 9 * LANES;
      std::fill(sums, sums + all.size() * pixels, Lanes{});
      std::vector<int64_t> at(all.size());
      for (int64_t column = 0; column < one.every; column += FEW)
        for (size_t i = 0; i < all.size(); ++i) {
          const NarrowConvolution& it = all[i];
          const int64_t begin = at[i];
          while (at[i] < it.channels && it.columns[at[i]] < column + FEW) ++at[i];
          if (at[i] == begin) continue;
          for (int64_t y = 0; y < one.height; y += H)
            for (int64_t left = 0; left < one.width; left += P)
              by_rows<P, H>(it.image + begin * pixels, weight, it.columns + begin, at[i] - begin, y, left, one.height,
                            one.width, sums + i * pixels);
        }
      for (size_t i = 0; i < all.size(); ++i) all[i].finish(reinterpret_cast<float*>(sums + i * pixels), r * LANES, pixels);
    }
  }

  void finish(const float* sums, int64_t first, int64_t pixels) const {
    for (int64_t r = 0; r < LANES; ++r)
      for (int64_t p = 0; p < pixels; p += LANES) {
        const int64_t row = first + r, some = std::min<int64_t>(LANES, pixels - p), at = row * pixels + p;
        Lanes value = load(sums + p * LANES + r, 0, some, LANES) + (bias ? bias[row] : 0.f);
        if (added) value += load(added + at, some);
        store(out + at, bounds.cut(value), some);
      }
  }
};

}  // namespace
