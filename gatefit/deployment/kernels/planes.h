#pragma once

// Layers that treat each channel by itself: depthwise convolutions and max pooling.

#include <limits>

#include "convolve.h"

namespace {

// DEPTHWISE of abi.h for one image: out (n_out, OH, OW) = clamp(bias + convolution) of image (n_out, H, W). Channel i
// takes channel oc[i] of weight (OC, 1, K, K) and of bias (OC,), which may be null.
struct DepthwiseConvolution {
  const float *image, *weight, *bias;
  const int64_t* oc;
  float* out;
  int64_t n_out;
  Layout layout;
  Bounds bounds;

  void run(int64_t threads) const {
    each_of(n_out, n_out * layout.pixels, threads, [&](int64_t c) {
      switch (layout.kernel * 100 + layout.stride) {
        case 301: return channel<3, 1>(c);
        case 302: return channel<3, 2>(c);
        case 501: return channel<5, 1>(c);
        case 502: return channel<5, 2>(c);
        case 701: return channel<7, 1>(c);
        default: return any(c);
      }
    });
  }

 private:
  static constexpr int LINES = 7;  // of the result that are summed at once

  // The lanes [low, high) that lie inside the image where tap dx of a line is read for outputs from x on.
  int64_t low(int64_t x, int64_t dx) const { return ceil_of(layout.padding - dx, layout.stride) - x; }
  int64_t high(int64_t x, int64_t dx) const { return ceil_of(layout.width + layout.padding - dx, layout.stride) - x; }
  static int64_t ceil_of(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

  // One channel, for K x K kernels of stride S. Each line of the image is read once for all lines of the result that
  // need it.
  template <int K, int S>
  void channel(int64_t c) const {
    const float* plane = image + c * layout.height * layout.width;
    const float* taps = weight + oc[c] * layout.taps;
    for (int64_t x = 0; x < layout.out_width; x += LANES) {
      // Masks of the vectors that tap dx of a line reads. For a stride of 2 two taps share a pair of vectors.
      Mask inside[K], beyond[K];
      for (int dx = 0; dx < K; dx += S) {
        const int64_t first = layout.padding - dx - x * S, end = layout.width + first;
        inside[dx] = lanes_of(first, end), beyond[dx] = lanes_of(first - LANES, end - LANES);
      }
      for (int64_t y = 0; y < layout.out_height; y += LINES) {
        Lanes sums[LINES];
        for (Lanes& sum : sums) sum = (bias ? bias[oc[c]] : 0.f) - Lanes{};
#pragma GCC unroll 20
        for (int line = 0; line < (LINES - 1) * S + K; ++line) {
          const int64_t from = y * S + line - layout.padding;
          if (from < 0 || from >= layout.height) continue;
          const float* p = plane + from * layout.width + x * S - layout.padding;
          Lanes a = {}, b = {};
#pragma GCC unroll 7
          for (int dx = 0; dx < K; ++dx) {
            if (dx % S == 0) a = load(p + dx, inside[dx]);
            if (S == 2 && dx % S == 0) b = load(p + dx + LANES, beyond[dx]);
            const Lanes values = S == 1 ? a : every_second(a, b, dx % 2);
#pragma GCC unroll 7
            for (int h = 0; h < LINES; ++h)
              if (line >= h * S && line < h * S + K) sums[h] += taps[(line - h * S) * K + dx] * values;
          }
        }
#pragma GCC unroll 7
        for (int h = 0; h < LINES; ++h)  // written out: where one is reached by a variable, all lie in memory
          if (y + h < layout.out_height) finish(c, y + h, x, sums[h]);
      }
    }
  }

  // One channel, for any kernel and stride.
  void any(int64_t c) const {
    const float* plane = image + c * layout.height * layout.width;
    for (int64_t y = 0; y < layout.out_height; ++y)
      for (int64_t x = 0; x < layout.out_width; x += LANES) {
        Lanes sum = (bias ? bias[oc[c]] : 0.f) - Lanes{};
        for (int64_t dy = 0; dy < layout.kernel; ++dy) {
          const int64_t from = y * layout.stride + dy - layout.padding;
          if (from < 0 || from >= layout.height) continue;
          const float* p = plane + from * layout.width + x * layout.stride - layout.padding;
          const float* taps = weight + oc[c] * layout.taps + dy * layout.kernel;
          for (int64_t dx = 0; dx < layout.kernel; ++dx)
            sum += taps[dx] * load(p + dx, low(x, dx), high(x, dx), layout.stride);
        }
        finish(c, y, x, sum);
      }
  }

  void finish(int64_t c, int64_t y, int64_t x, Lanes sum) const {
    const int64_t count = std::min<int64_t>(LANES, layout.out_width - x);
    store(out + c * layout.pixels + y * layout.out_width + x, bounds.clamp(sum), count);
  }
};

// MAX_POOLING of abi.h for one image (n_channels, H, W); out (n_channels, OH, OW).
struct MaxPooling {
  const float* image;
  float* out;
  int64_t n_channels;
  Layout layout;

  void run(int64_t threads) const {
    each_of(n_channels, n_channels * layout.height * layout.width, threads, [&](int64_t c) { channel(c); });
  }

 private:
  static Lanes larger(Lanes a, Lanes b) { return (b > a) | (b != b) ? b : a; }  // NaN is larger than anything

  // One channel. For each line of the result: the largest value over the lines of the image, with a border, then along
  // them.
  void channel(int64_t c) const {
    static thread_local Scratch kept;
    const int64_t room = (layout.out_width + LANES) * layout.stride + layout.kernel + layout.width + LANES;
    float* line = kept.need(room);
    std::fill(line, line + room, -std::numeric_limits<float>::infinity());
    const float* plane = image + c * layout.height * layout.width;
    float* to = out + c * layout.pixels;
    for (int64_t y = 0; y < layout.out_height; ++y, to += layout.out_width) {
      const int64_t top = y * layout.stride - layout.padding;
      const int64_t first = std::max<int64_t>(0, top), end = std::min(layout.height, top + layout.kernel);
      for (int64_t x = 0; x < layout.width; x += LANES) {
        const int64_t count = std::min<int64_t>(LANES, layout.width - x);
        Lanes largest = load(plane + first * layout.width + x, count);
        for (int64_t from = first + 1; from < end; ++from)
          largest = larger(largest, load(plane + from * layout.width + x, count));
        store(line + layout.padding + x, largest, count);
      }
      for (int64_t x = 0; x < layout.out_width; x += LANES) {
        Lanes largest = strided(line + x * layout.stride);
        for (int64_t dx = 1; dx < layout.kernel; ++dx)
          largest = larger(largest, strided(line + x * layout.stride + dx));
        store(to + x, largest, std::min<int64_t>(LANES, layout.out_width - x));
      }
    }
  }

  // Every stride-th value from p on.
  Lanes strided(const float* p) const {
    return layout.stride == 2 ? every_second(load(p), load(p + LANES), false) : load(p, 0, LANES, layout.stride);
  }
};

}  // namespace
