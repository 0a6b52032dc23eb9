// Convolutions 3 x 3 where all rows are wanted: lanes hold rows, so weights are packed ahead, and what lies beyond the
// border costs nothing. For images that pieces of 14 or 16 pixels fill, or that are narrow.

#include "convolve.h"

namespace {

constexpr int64_t FEW = 32;  // columns whose weights for LANES rows stay in the first-level cache
constexpr int64_t LARGE = 1 << 20;  // weights that come from memory: a single image reads them in the order they lie in
constexpr int64_t SMALL = 64;  // pixels, for which sums of all rows stay near meanwhile
constexpr int64_t SIDE_BY_SIDE = 4;  // columns, and how many pieces of a column are fetched ahead, where it does

// Where LANES rows of a packed weight begin, how far its columns lie apart, and whether what comes next is fetched from
// the same column, and how far ahead, or (0) from those that follow.
struct Rows {
  const float* weight;
  int64_t column, ahead;
};

// Adds to the sums (height, width) of LANES rows at H lines of P pixels from (y, left) on, the whole width if H > 1, the
// whole image if H = P: channel j of the image (channels, height, width) is read by column columns[j] of the rows. The
// loops are written twice, and out: behind a lambda or a condition the sums leave the registers.
template <int P, int H>
void by_rows(const float* image, Rows rows, const int64_t* columns, int64_t channels, int64_t y, int64_t left,
             int64_t height, int64_t width, Lanes* sums) {
  const bool first = H > 1 || left == 0, last = H > 1 || left + P == width;
  bool inside[H][3];
  for (int h = 0; h < H; ++h)
    for (int dy = 0; dy < 3; ++dy)
      inside[h][dy] = y + h < height && y + h + dy - 1 >= 0 && y + h + dy - 1 < height;
  Lanes a[H * P] = {};
  for (int64_t j = 0; j < channels; ++j) {
    const float *plane = image + j * height * width + left, *taps = rows.weight + columns[j] * rows.column;
    const float* next = rows.ahead ? taps + rows.ahead : rows.weight + columns[std::min(j + 2, channels - 1)] * rows.column;
    for (int t = 0; t < 9; ++t) __builtin_prefetch(next + t * LANES);
    if constexpr (H == P) {
#pragma GCC unroll 4
      for (int from = 0; from < H; ++from)
#pragma GCC unroll 3
        for (int dy = 0; dy < 3; ++dy) {
          const int h = from + 1 - dy;
          if (h < 0 || h >= H) continue;
#pragma GCC unroll 3
          for (int dx = 0; dx < 3; ++dx) {
            const Lanes w = load(taps + (dy * 3 + dx) * LANES);
#pragma GCC unroll 4
            for (int x = 0; x < P; ++x)
              if (x + dx > 0 && x + dx <= P) a[h * P + x] += w * (plane[from * P + x + dx - 1] - Lanes{});
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

// As `Convolution` with all rows, stride 1 and padding 1; weight packed: (every, count / LANES, 9, LANES).
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
        case 4: return all[0].height == 4 ? run_as<4, 4>(all, share) : run_as<4, 2>(all, share);
        case 7: return run_as<7, 2>(all, share);
        case 8: return run_as<8, 2>(all, share);
        default: return all[0].width % 16 ? run_as<14, 1>(all, share) : run_as<16, 1>(all, share);
      }
    };
    Threads::share(threads, threads, [&](int64_t i) { part({i, threads}); });
  }

 private:
  template <int P, int H>
  static void run_as(const std::vector<NarrowConvolution>& all, Share share) {
    const NarrowConvolution& one = all[0];
    const int64_t groups = one.count / LANES, first = share.begin(groups), last = share.end(groups);
    if (all.size() == 1 && one.every * one.count * 9 >= LARGE && one.height * one.width <= SMALL) one.column_by_column<P, H>(first, last);
    else group_by_group<P, H>(all, first, last);
  }

  // Weights that are near, or that images share: for LANES rows at a time.
  template <int P, int H>
  static void group_by_group(const std::vector<NarrowConvolution>& all, int64_t first, int64_t last) {
    const int64_t every = all[0].every, pixels = all[0].height * all[0].width;
    static thread_local Scratch kept;
    Lanes* sums = reinterpret_cast<Lanes*>(kept.need(all.size() * pixels * LANES));
    for (int64_t group = first; group < last; ++group) {
      std::fill(sums, sums + all.size() * pixels, Lanes{});
      std::vector<int64_t> at(all.size());
      for (int64_t column = 0; column < every; column += FEW)
        for (size_t i = 0; i < all.size(); ++i) {
          const NarrowConvolution& it = all[i];
          const int64_t begin = at[i];
          while (at[i] < it.channels && it.columns[at[i]] < column + FEW) ++at[i];
          if (at[i] > begin) it.add<P, H>(group, 0, begin, at[i], sums + i * pixels);
        }
      for (size_t i = 0; i < all.size(); ++i) all[i].finish(sums + i * pixels, group * LANES);
    }
  }

  // Weights that a single image reads from memory: of what is closed next to nothing is fetched.
  template <int P, int H>
  void column_by_column(int64_t first, int64_t last) const {
    const int64_t pixels = height * width;
    static thread_local Scratch kept;
    Lanes* sums = reinterpret_cast<Lanes*>(kept.need((last - first) * pixels * LANES));
    std::fill(sums, sums + (last - first) * pixels, Lanes{});
    for (int64_t j = 0; j < channels; j += SIDE_BY_SIDE)
      for (int64_t group = first; group < last; ++group)
        add<P, H>(group, SIDE_BY_SIDE * 9 * LANES, j, std::min(j + SIDE_BY_SIDE, channels), sums + (group - first) * pixels);
    for (int64_t group = first; group < last; ++group) finish(sums + (group - first) * pixels, group * LANES);
  }

  // Add what channels [begin, end) give to LANES rows.
  template <int P, int H>
  void add(int64_t group, int64_t ahead, int64_t begin, int64_t end, Lanes* sums) const {
    const Rows rows = {weight + group * 9 * LANES, count * 9, ahead};
    for (int64_t y = 0; y < height; y += H)
      for (int64_t left = 0; left < width; left += P)
        by_rows<P, H>(image + begin * height * width, rows, columns + begin, end - begin, y, left, height, width, sums);
  }

  void finish(const Lanes* sums, int64_t first) const {
    const int64_t pixels = height * width;
    for (int64_t r = 0; r < LANES; ++r)
      for (int64_t p = 0; p < pixels; p += LANES) {
        const int64_t row = first + r, some = std::min<int64_t>(LANES, pixels - p), at = row * pixels + p;
        const float* these = reinterpret_cast<const float*>(sums + p) + r;
        Lanes value = load(these, 0, some, LANES) + (bias ? bias[row] : 0.f);
        if (added) value += load(added + at, some);
        store(out + at, bounds.cut(value), some);
      }
  }
};

}  // namespace
