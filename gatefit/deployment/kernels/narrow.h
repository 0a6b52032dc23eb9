#pragma once

// Convolutions 3 x 3 with all output channels: these lie in the lanes of a register, so weights are packed ahead (see
// `StepStruct::packed_weight` in abi.h), and taps beyond the border cost nothing. For images that are narrow, or whose
// width is a multiple of 14 or 16.

#include "convolve.h"

namespace {

constexpr int64_t IC_CHUNK = 32;  // input channels whose weights for one group stay in the first-level cache
constexpr int64_t LARGE_WEIGHT = 1 << 20;  // values of a weight that comes from memory: one image reads it in its order
constexpr int64_t SMALL_IMAGE = 64;  // pixels of an image whose sums for all output channels stay in a cache meanwhile
constexpr int64_t IC_AHEAD = 4;  // input channels that such an image reads at once, and groups that it fetches ahead

// One group, LANES output channels, of a packed weight (IC, OC / LANES, 9, LANES).
struct PackedGroup {
  const float* weight;  // of input channel 0
  int64_t ic_stride;  // from one input channel to the next
  int64_t ahead;  // what to fetch next: the values this far ahead, or (0) those of the input channel after the next
};

// sums[y, x, :] += sum over j, kh, kw of weight[ic[j], kh * 3 + kw, :] * image[j, y + kh - 1, x + kw - 1]
// for one group of output channels, image (n_in, height, width), sums (height, width) registers, at H lines of P pixels
// from (y, left) on. P is the whole width if H > 1, and the image is H x P if H = P. The loops stand twice, and written
// out: behind a lambda or a condition the sums leave the registers.
template <int P, int H>
void add_tile(const float* image, PackedGroup group, const int64_t* ic, int64_t n_in, int64_t y, int64_t left,
             int64_t height, int64_t width, Lanes* sums) {
  const bool first = H > 1 || left == 0, last = H > 1 || left + P == width;
  bool inside[H][3];
  for (int h = 0; h < H; ++h)
    for (int dy = 0; dy < 3; ++dy)
      inside[h][dy] = y + h < height && y + h + dy - 1 >= 0 && y + h + dy - 1 < height;
  Lanes a[H * P] = {};
  for (int64_t j = 0; j < n_in; ++j) {
    const float *plane = image + j * height * width + left, *taps = group.weight + ic[j] * group.ic_stride;
    const float* next =
        group.ahead ? taps + group.ahead : group.weight + ic[std::min(j + 2, n_in - 1)] * group.ic_stride;
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
              if (!(x + dx == 0 && first) && !(x + dx == P + 1 && last))
                a[h * P + x] += w * (line[x + dx - 1] - Lanes{});
          }
        }
    }
  }
  for (int h = 0; h < H && y + h < height; ++h)
    for (int x = 0; x < P; ++x) sums[(y + h) * width + left + x] += a[h * P + x];
}

// CONVOLUTION of abi.h for one image with K = 3, stride = padding = 1 and all output channels: n_out = OC. weight is
// packed: (IC, OC / LANES, 9, LANES), where IC = ic_total.
struct NarrowConvolution {
  const float *image, *weight, *bias;
  const int64_t* ic;
  const float* residual;
  float* out;
  int64_t n_in, n_out, ic_total, height, width;
  Bounds bounds;

  static bool fits(int64_t width) {
    return width == 4 || width == 7 || width == 8 || (width > 0 && (width % 14 == 0 || width % 16 == 0));
  }

  // Run images of one size, for which the weights are read once; threads share the output channels.
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
    const int64_t groups = one.n_out / LANES, first = share.begin(groups), last = share.end(groups);
    const bool is_large = one.ic_total * one.n_out * 9 >= LARGE_WEIGHT;
    if (all.size() == 1 && is_large && one.height * one.width <= SMALL_IMAGE) one.channel_by_channel<P, H>(first, last);
    else group_by_group<P, H>(all, first, last);
  }

  // For weights that are near, or that images share: finish one group of output channels after another.
  template <int P, int H>
  static void group_by_group(const std::vector<NarrowConvolution>& all, int64_t first, int64_t last) {
    const int64_t ic_total = all[0].ic_total, pixels = all[0].height * all[0].width;
    static thread_local Scratch kept;
    Lanes* sums = reinterpret_cast<Lanes*>(kept.need(all.size() * pixels * LANES));
    for (int64_t group = first; group < last; ++group) {
      std::fill(sums, sums + all.size() * pixels, Lanes{});
      std::vector<int64_t> at(all.size());
      for (int64_t begin_ic = 0; begin_ic < ic_total; begin_ic += IC_CHUNK)
        for (size_t i = 0; i < all.size(); ++i) {
          const NarrowConvolution& it = all[i];
          const int64_t begin = at[i];
          while (at[i] < it.n_in && it.ic[at[i]] < begin_ic + IC_CHUNK) ++at[i];
          if (at[i] > begin) it.add<P, H>(group, 0, begin, at[i], sums + i * pixels);
        }
      for (size_t i = 0; i < all.size(); ++i) all[i].finish(sums + i * pixels, group * LANES);
    }
  }

  // For weights that a single image reads from memory, in the order they lie in: next to nothing of what is closed is
  // fetched.
  template <int P, int H>
  void channel_by_channel(int64_t first, int64_t last) const {
    const int64_t pixels = height * width;
    static thread_local Scratch kept;
    Lanes* sums = reinterpret_cast<Lanes*>(kept.need((last - first) * pixels * LANES));
    std::fill(sums, sums + (last - first) * pixels, Lanes{});
    for (int64_t j = 0; j < n_in; j += IC_AHEAD)
      for (int64_t group = first; group < last; ++group)
        add<P, H>(group, IC_AHEAD * 9 * LANES, j, std::min(j + IC_AHEAD, n_in), sums + (group - first) * pixels);
    for (int64_t group = first; group < last; ++group) finish(sums + (group - first) * pixels, group * LANES);
  }

  // Add the products of input channels [begin, end) to the sums of a group of output channels.
  template <int P, int H>
  void add(int64_t group, int64_t ahead, int64_t begin, int64_t end, Lanes* sums) const {
    const PackedGroup packed = {weight + group * 9 * LANES, n_out * 9, ahead};
    for (int64_t y = 0; y < height; y += H)
      for (int64_t left = 0; left < width; left += P)
        add_tile<P, H>(image + begin * height * width, packed, ic + begin, end - begin, y, left, height, width, sums);
  }

  // out = clamp(sums + bias + residual) for output channels [first_oc, first_oc + LANES); sums (pixels, LANES).
  void finish(const Lanes* sums, int64_t first_oc) const {
    const int64_t pixels = height * width;
    for (int64_t lane = 0; lane < LANES; ++lane)
      for (int64_t p = 0; p < pixels; p += LANES) {
        const int64_t c = first_oc + lane, count = std::min<int64_t>(LANES, pixels - p), at = c * pixels + p;
        const float* sums_of_lane = reinterpret_cast<const float*>(sums + p) + lane;
        Lanes value = load(sums_of_lane, 0, count, LANES) + (bias ? bias[c] : 0.f);
        if (residual) value += load(residual + at, count);
        store(out + at, bounds.clamp(value), count);
      }
  }
};

}  // namespace
