// Gated blocks, and the convolutions they are made of, for batches of images; called from Python.

#include "convolve.h"

namespace {

// A convolution in the chain of a branch; open_rows and open_columns say whether the open units are its rows, columns.
struct Step {
  const float *weight, *bias;
  int64_t rows, columns, kernel, stride, padding, depthwise, open_rows, open_columns, filled;
  float lowest, highest;
};

// A block whose branch is a chain of convolutions, and its gates: one layer for both, (has_block + units, features).
struct Block {
  const float *gate_weight, *gate_bias, *fill, *lowered;  // fill (channels, units), or null
  int64_t features, has_block, units, steps;
  const Step* step;
  float lowest, highest;  // behind the sum
};

float dot(const float* a, const float* b, int64_t count) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

std::vector<float> logits_of(const Block& block, const float* image, int64_t pixels) {
  std::vector<float> pooled(block.features), logits(block.has_block + block.units);
  for (int64_t c = 0; c < block.features; ++c) {
    float sum = 0.f;
    const float* plane = image + c * pixels;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < pixels; ++i) sum += plane[i];
    pooled[c] = sum / pixels;
  }
  for (size_t k = 0; k < logits.size(); ++k)
    logits[k] = block.gate_bias[k] + dot(block.gate_weight + k * block.features, pooled.data(), block.features);
  return logits;
}

// Call one(i, threads) for each image: the threads share the images, or where those are few, each image.
template <typename One>
void each_image(int64_t batch, int64_t threads, const One& one) {
  if (batch < threads) {
    for (int64_t i = 0; i < batch; ++i) one(i, threads);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < batch; ++i) one(i, 1);
}

// image (features, height, width); shortcut and out as the branch gives. Gates are steps.
void run_block(const Block* block, const float* image, const float* shortcut, float* out, int64_t height,
               int64_t width, int64_t total, int64_t threads) {
  const std::vector<float> logits = logits_of(*block, image, height * width);
  if (block->has_block && logits[0] <= 0.f) {
    for (int64_t i = 0; i < total; ++i) out[i] = std::min(std::max(shortcut[i], block->lowest), block->highest);
    return;
  }
  const float* units = logits.data() + block->has_block;
  std::vector<int64_t> open, every;
  std::vector<float> left, shifted;
  for (int64_t u = 0; u < block->units; ++u)
    if (units[u] > 0.f) open.push_back(u);
  if (block->fill) {
    left.resize(block->units);
    for (int64_t u = 0; u < block->units; ++u)
      left[u] = units[u] > 0.f ? 0.f : std::max(units[u] + block->lowered[u], 0.f) / 8;
  }
  static thread_local std::vector<float> buffers[2];
  const float* now = image;
  for (int64_t k = 0; k < block->steps; ++k) {
    const Step& step = block->step[k];
    const bool last = k + 1 == block->steps;
    const int64_t most = std::max(step.rows, step.columns);
    for (int64_t i = every.size(); i < most; ++i) every.push_back(i);
    const int64_t count = step.open_rows ? open.size() : step.rows;
    const int64_t channels = step.open_columns ? open.size() : step.columns;
    const int64_t* rows = step.open_rows ? open.data() : every.data();
    const int64_t* columns = step.open_columns ? open.data() : every.data();
    const float* bias = step.bias;
    if (step.filled) {
      shifted.assign(step.rows, 0.f);
      for (int64_t c = 0; c < step.rows; ++c)
        shifted[c] = (bias ? bias[c] : 0.f) + dot(block->fill + c * block->units, left.data(), block->units);
      bias = shifted.data();
    }
    const Layout layout = {height, width, step.kernel, step.stride, step.padding};
    std::vector<float>& buffer = buffers[k % 2];
    if (!last) buffer.resize(std::max<size_t>(buffer.size(), count * layout.pixels));
    float* to = last ? out : buffer.data();
    const Bounds bounds = {step.lowest, step.highest};
    if (step.depthwise)
      DepthwiseConvolution{now, step.weight, bias, rows, to, count, layout, bounds}.run(threads);
    else
      Convolution{now,   step.weight, bias,         rows,   columns, last ? shortcut : nullptr, to, channels,
                  count, step.columns, layout, bounds}
          .run(threads);
    now = to, height = layout.out_height, width = layout.out_width;
  }
}

}  // namespace

extern "C" {

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

// images (batch, features, height, width); shortcut and out (batch, total values).
void gathered_block(const Block* block, const float* images, const float* shortcut, float* out, int64_t batch,
                    int64_t height, int64_t width, int64_t total, int64_t threads) {
  each_image(batch, threads, [&](int64_t i, int64_t share) {
    run_block(block, images + i * block->features * height * width, shortcut + i * total, out + i * total, height,
              width, total, share);
  });
}

}  // extern "C"
