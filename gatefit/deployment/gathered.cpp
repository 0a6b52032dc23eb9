// Gated blocks, and the convolutions they are made of, for batches of images; called from Python.

#include "narrow.h"

namespace {

constexpr int64_t GROUP = 16;  // images that share large weights

// A convolution in the chain of a branch; open_rows and open_columns say whether the open units are its rows, columns.
struct Step {
  const float *weight, *bias, *narrow;  // narrow: the weight as `NarrowConvolution` wants it, or null
  int64_t rows, columns, kernel, stride, padding, depthwise, open_rows, open_columns, filled;
  float lowest, highest;
};

// A block whose branch is a chain of convolutions, and its gates: one layer for both, (has_block + units, features).
struct Block {
  const float *gate_weight, *gate_bias, *fill, *lowered;  // fill (units, channels), or null
  int64_t features, has_block, units, steps;
  const Step* step;
  float lowest, highest;  // behind the sum
};

// bias + weight x for rows [begin, end) of a matrix (rows, count). Four at a time hide the wait for memory.
void multiply_rows(const float* weight, const float* x, const float* bias, int64_t count, int64_t begin, int64_t end,
                   float* out) {
  for (int64_t r = begin; r < end; r += 4) {
    const int64_t last = end - 1;
    const float *a = weight + r * count, *b = weight + std::min(r + 1, last) * count;
    const float *c = weight + std::min(r + 2, last) * count, *d = weight + std::min(r + 3, last) * count;
    float sums[4] = {}, &s = sums[0], &t = sums[1], &u = sums[2], &v = sums[3];
#pragma omp simd reduction(+ : s, t, u, v)
    for (int64_t i = 0; i < count; ++i) s += a[i] * x[i], t += b[i] * x[i], u += c[i] * x[i], v += d[i] * x[i];
    for (int64_t i = 0; i < 4 && r + i < end; ++i) out[r + i] = bias[r + i] + sums[i];
  }
}

std::vector<float> logits_of(const Block& block, const float* image, int64_t pixels, int64_t threads) {
  const int64_t count = block.has_block + block.units;
  std::vector<float> pooled(block.features), logits(count);
  each_of(block.features, block.features * pixels, threads, [&](int64_t c) {
    float sum = 0.f;
    const float* plane = image + c * pixels;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < pixels; ++i) sum += plane[i];
    pooled[c] = sum / pixels;
  });
  parts_of(count, count * block.features, threads, [&](int64_t begin, int64_t end) {
    multiply_rows(block.gate_weight, pooled.data(), block.gate_bias, block.features, begin, end, logits.data());
  });
  return logits;
}

// Call one(i, threads) for each image, or group of them: the threads share them, or where those are few, each one.
template <typename One>
void each_image(int64_t batch, int64_t threads, const One& one) {
  if (batch < threads) {
    for (int64_t i = 0; i < batch; ++i) one(i, threads);
    return;
  }
  Threads::share(threads, batch, [&](int64_t i) { one(i, 1); });
}

// One image on its way through a block's branch.
struct Work {
  const float *image, *shortcut;
  float* out;
  std::vector<int64_t> open = {};
  std::vector<float> left = {}, shifted = {};
};

// Let an image's gates, which are steps, say what it opens. False: the block is skipped, and the image done.
bool opens(const Block& block, Work& work, int64_t pixels, int64_t total, int64_t threads) {
  const std::vector<float> logits = logits_of(block, work.image, pixels, threads);
  if (block.has_block && logits[0] <= 0.f) {
    for (int64_t i = 0; i < total; ++i) work.out[i] = std::min(std::max(work.shortcut[i], block.lowest), block.highest);
    return false;
  }
  const float* units = logits.data() + block.has_block;
  for (int64_t u = 0; u < block.units; ++u)
    if (units[u] > 0.f) work.open.push_back(u);
  if (block.fill) {
    work.left.resize(block.units);
    for (int64_t u = 0; u < block.units; ++u)
      work.left[u] = units[u] > 0.f ? 0.f : std::max(units[u] + block.lowered[u], 0.f) / 8;
  }
  return true;
}

// bias + what closed units leave behind, for channels [begin, end) of `channels`.
void fill(const Block& block, Work& work, const float* bias, int64_t channels, int64_t begin, int64_t end) {
  float* to = work.shifted.data();
  for (int64_t c = begin; c < end; ++c) to[c] = bias ? bias[c] : 0.f;
  for (int64_t u = 0; u < block.units; ++u) {
    const float left = work.left[u], *weight = block.fill + u * channels;
    if (left == 0.f) continue;
    for (int64_t c = begin; c < end; ++c) to[c] += left * weight[c];
  }
}

// Images side by side, step by step, of (features, height, width); shortcuts and results, of `total` values, as the
// branch gives.
void run_block(const Block& block, const std::vector<Work>& works, int64_t height, int64_t width, int64_t total,
               int64_t threads) {
  std::vector<Work> all;
  for (Work work : works)
    if (opens(block, work, height * width, total, threads)) all.push_back(std::move(work));
  if (all.empty()) return;
  static thread_local std::vector<Scratch> buffers;  // two for each image
  buffers.resize(std::max(buffers.size(), 2 * all.size()));
  std::vector<int64_t> every;
  for (int64_t k = 0; k < block.steps; ++k) {
    const Step& step = block.step[k];
    const bool last = k + 1 == block.steps;
    for (int64_t i = every.size(); i < std::max(step.rows, step.columns); ++i) every.push_back(i);
    const Layout layout = {height, width, step.kernel, step.stride, step.padding};
    const Bounds bounds = {step.lowest, step.highest};
    std::vector<Convolution> convolutions;
    std::vector<NarrowConvolution> narrow;
    for (size_t i = 0; i < all.size(); ++i) {
      Work& work = all[i];
      const int64_t count = step.open_rows ? work.open.size() : step.rows;
      const int64_t channels = step.open_columns ? work.open.size() : step.columns;
      const int64_t* rows = step.open_rows ? work.open.data() : every.data();
      const int64_t* columns = step.open_columns ? work.open.data() : every.data();
      const float *bias = step.bias, *added = last ? work.shortcut : nullptr;
      if (step.filled) {
        work.shifted.resize(step.rows);
        parts_of(step.rows, step.rows * block.units, threads, [&](int64_t begin, int64_t end) {
          fill(block, work, bias, step.rows, begin, end);
        });
        bias = work.shifted.data();
      }
      float* to = last ? work.out : buffers[2 * i + k % 2].need(count * layout.pixels);
      if (step.depthwise)
        DepthwiseConvolution{work.image, step.weight, bias, rows, to, count, layout, bounds}.run(threads);
      else if (step.narrow)
        narrow.push_back({work.image, step.narrow, bias, columns, added, to, channels, count, step.columns, height, width,
                          bounds});
      else
        convolutions.push_back({work.image, step.weight, bias, rows, columns, added, to, channels, count, step.columns,
                                layout, bounds});
      work.image = to;
    }
    if (!narrow.empty()) NarrowConvolution::run(narrow, threads);
    if (threads == 1 && convolutions.size() > 1) Convolution::run(convolutions);
    else
      for (const Convolution& convolution : convolutions) convolution.run(threads);
    height = layout.out_height, width = layout.out_width;
  }
}

// Images side by side through blocks, of which all but the first have their input for a shortcut. Those work in place:
// each result is added to what it was made from, which only the first of several convolutions reads.
void run_blocks(const Block* blocks, int64_t count, std::vector<Work> all, int64_t height, int64_t width, int64_t total,
                int64_t threads) {
  for (const Block* block = blocks; block < blocks + count; ++block) {
    run_block(*block, all, height, width, total, threads);
    for (const Step* s = block->step; s < block->step + block->steps; ++s) {
      const Layout layout = {height, width, s->kernel, s->stride, s->padding};
      height = layout.out_height, width = layout.out_width;
    }
    for (Work& work : all) work.image = work.shortcut = work.out;
  }
}

// Whether a block's weights are so large that images should share them while they are near.
bool is_large(const Block& block) {
  return std::any_of(block.step, block.step + block.steps, [](const Step& s) {
    return s.kernel == 3 && !s.depthwise && s.rows * s.columns * 9 > FAR;
  });
}

}  // namespace

extern "C" {

// Whether weights should be packed for `NarrowConvolution` where convolutions 3 x 3 meet images of this width.
int64_t gathered_narrow(int64_t width) { return LANES == 16 && NarrowConvolution::fits(width); }

void gathered_conv(const float* images, const float* weight, const float* bias, const int64_t* rows,
                   const int64_t* columns, const float* added, float* out, int64_t batch, int64_t channels,
                   int64_t height, int64_t width, int64_t count, int64_t every, int64_t kernel, int64_t stride,
                   int64_t padding, float lowest, float highest, int64_t threads) {
  const Layout layout = {height, width, kernel, stride, padding};
  const int64_t step = channels * height * width, to = count * layout.pixels;
  each_image(batch, threads, [&](int64_t i, int64_t share) {
    Convolution{images + i * step, weight, bias, rows, columns, added ? added + i * to : nullptr, out + i * to, channels,
                count, every, layout, {lowest, highest}}
        .run(share);
  });
}

void gathered_depthwise(const float* images, const float* weight, const float* bias, const int64_t* rows, float* out,
                        int64_t batch, int64_t count, int64_t height, int64_t width, int64_t kernel, int64_t stride,
                        int64_t padding, float lowest, float highest, int64_t threads) {
  const Layout layout = {height, width, kernel, stride, padding};
  const int64_t step = count * height * width, to = count * layout.pixels;
  each_image(batch, threads, [&](int64_t i, int64_t share) {
    DepthwiseConvolution{images + i * step, weight, bias, rows, out + i * to, count, layout, {lowest, highest}}.run(share);
  });
}

// images (batch, features, height, width) of the first block; shortcut and out (batch, total values).
void gathered_blocks(const Block* blocks, int64_t count, const float* images, const float* shortcut, float* out,
                     int64_t batch, int64_t height, int64_t width, int64_t total, int64_t threads) {
  if (!batch) return;
  const int64_t image = blocks->features * height * width, turns = (batch + threads * GROUP - 1) / (threads * GROUP);
  const bool shared = std::any_of(blocks, blocks + count, is_large);
  const int64_t group = shared ? (batch + threads * turns - 1) / (threads * turns) : 1;  // as many for each thread
  each_image((batch + group - 1) / group, threads, [&](int64_t g, int64_t share) {
    std::vector<Work> works;
    for (int64_t i = g * group; i < std::min(batch, (g + 1) * group); ++i)
      works.push_back({images + i * image, shortcut + i * total, out + i * total});
    run_blocks(blocks, count, std::move(works), height, width, total, share);
  });
}

}  // extern "C"
