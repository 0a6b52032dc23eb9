// Convolutions of one image with some of a weight's rows (output channels) and some of its columns (input channels).
// Rows and columns are read where they lie, so any mask costs what it opens and nothing is packed.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, SUMS = 24;  // of 32 registers
#else
constexpr int LANES = 8, SUMS = 12;  // of 16
#endif
constexpr int ROWS = 12, VECTORS = 4;
constexpr int64_t PARALLEL = 1 << 14;  // values worth sharing among threads
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }

// Input channel j, tap (y, x) of an output pixel stand at p + j * plane + y * line + x * step.
struct Walk {
  int64_t channels, plane, height, line, width, step;
};

// Sums of R rows at V groups of LANES pixels.
template <int R, int V>
void multiply(const float* const* pixels, const Walk& walk, const float* const* rows, const int64_t* columns,
              Lanes (*sums)[VECTORS]) {
  Lanes a[R][V] = {};
  const float* p[V];
  for (int v = 0; v < V; ++v) p[v] = pixels[v];
  for (int64_t j = 0; j < walk.channels; ++j) {
    int64_t at = columns[j];
    for (int64_t y = 0; y < walk.height; ++y) {
      int64_t place = j * walk.plane + y * walk.line;
      for (int64_t x = 0; x < walk.width; ++x, ++at, place += walk.step) {
        Lanes u[V];
        for (int v = 0; v < V; ++v) u[v] = load(p[v] + place);
        for (int r = 0; r < R; ++r) {
          const Lanes w = rows[r][at] - Lanes{};
          for (int v = 0; v < V; ++v) a[r][v] += w * u[v];
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = a[r][v];
}

using Multiply = void (*)(const float* const*, const Walk&, const float* const*, const int64_t*, Lanes (*)[VECTORS]);

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

// image (channels, height, width); weight (all, every, kernel, kernel) of which row rows[i] gives output channel i
// and column columns[j] reads input channel j; bias (all,) or null; added and out (count, out height, out width),
// added may be null. Values are cut at lowest and highest.
void convolve(const float* image, const float* weight, const float* bias, const int64_t* rows,
                   const int64_t* columns, const float* added, float* out, int64_t channels, int64_t height,
                   int64_t width, int64_t count, int64_t every, int64_t kernel, int64_t stride, int64_t padding,
                   float lowest, float highest, int64_t threads) {
  const int64_t out_height = (height + 2 * padding - kernel) / stride + 1;
  const int64_t out_width = (width + 2 * padding - kernel) / stride + 1;
  const int64_t pixels = out_height * out_width, taps = kernel * kernel;
  std::vector<int64_t> offsets(channels), from, to;  // of groups of LANES output pixels
  for (int64_t j = 0; j < channels; ++j) offsets[j] = columns[j] * taps;
  std::vector<float> copy;
  const float* base = image;
  Walk walk;
  if (kernel == 1 && stride == 1 && padding == 0 && pixels >= LANES) {
    walk = {channels, pixels, 1, 0, 1, 0};
    for (int64_t i = 0; i < pixels; i += LANES) to.push_back(std::min(i, pixels - LANES));
    from = to;
  } else if (stride == 1 && out_width >= LANES) {  // rows of pixels, read from a padded copy
    const int64_t line = width + 2 * padding, lines = height + 2 * padding;
    copy.resize(channels * lines * line);
    base = copy.data();
    walk = {channels, lines * line, kernel, line, kernel, 1};
    for (int64_t y = 0; y < out_height; ++y)
      for (int64_t i = 0; i < out_width; i += LANES) {
        const int64_t x = std::min(i, out_width - LANES);  // the last ones of a row may be computed twice
        to.push_back(y * out_width + x);
        from.push_back(y * line + x);
      }
#pragma omp parallel for num_threads(threads) schedule(static) if (channels * pixels > PARALLEL)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t y = 0; y < height; ++y)
        std::memcpy(copy.data() + (c * lines + y + padding) * line + padding, image + (c * height + y) * width,
                    width * sizeof(float));
  } else {  // (channels, taps, pixels)
    const int64_t padded = (pixels + LANES - 1) / LANES * LANES;
    copy.resize(channels * taps * padded);
    base = copy.data();
    walk = {channels, taps * padded, 1, 0, taps, padded};
    for (int64_t i = 0; i < padded; i += LANES) to.push_back(i);
    from = to;
#pragma omp parallel for num_threads(threads) schedule(static) if (channels * taps * pixels > PARALLEL)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < taps; ++t) {
        float* tap = copy.data() + (c * taps + t) * padded;
        const int64_t dy = t / kernel - padding, dx = t % kernel - padding;
        const int64_t low = dx < 0 ? (stride - 1 - dx) / stride : 0;
        const int64_t high = std::min(out_width, (width - 1 - dx) / stride + 1);
        for (int64_t y = 0; y < out_height; ++y) {
          const int64_t source = y * stride + dy;
          if (source < 0 || source >= height) continue;
          const float* line = image + (c * height + source) * width + dx;
          for (int64_t x = low; x < high; ++x) tap[y * out_width + x] = line[x * stride];
        }
      }
  }
  const int64_t all = to.size(), wide = std::min<int64_t>(VECTORS, all), high = std::min<int64_t>(ROWS, SUMS / wide);
  const int64_t tiles = (all + wide - 1) / wide, groups = (count + high - 1) / high;
  const auto run = [&](int64_t tile, int64_t group) {
    const int64_t begin = group * high, some = std::min(high, count - begin);
    const int64_t left = tile * wide, vectors = std::min(wide, all - left);
    const float *taken[ROWS] = {}, *pixel[VECTORS] = {};
    Lanes sums[ROWS][VECTORS];
    for (int64_t r = 0; r < some; ++r) taken[r] = weight + rows[begin + r] * every * taps;
    for (int64_t v = 0; v < vectors; ++v) pixel[v] = base + from[left + v];
    MULTIPLY.of[some][vectors](pixel, walk, taken, offsets.data(), sums);
    for (int64_t r = 0; r < some; ++r) {
      const float shift = bias ? bias[rows[begin + r]] : 0.f;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t first = to[left + v], live = std::min<int64_t>(LANES, pixels - first);
        const int64_t at = (begin + r) * pixels + first;
        for (int64_t i = 0; i < live; ++i) {
          const float value = sums[r][v][i] + shift + (added ? added[at + i] : 0.f);
          out[at + i] = std::min(std::max(value, lowest), highest);
        }
      }
    }
  };
  if (tiles >= groups) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t g = 0; g < groups; ++g) run(t, g);
  } else {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t t = 0; t < tiles; ++t) run(t, g);
  }
}

// Channel i of image (count, height, width) by row rows[i] of weight (all, 1, kernel, kernel); else as above.
void convolve_depthwise(const float* image, const float* weight, const float* bias, const int64_t* rows, float* out,
                        int64_t count, int64_t height, int64_t width, int64_t kernel, int64_t stride, int64_t padding,
                        float lowest, float highest, int64_t threads) {
  const int64_t line = width + 2 * padding, lines = height + 2 * padding;
  const int64_t out_height = (lines - kernel) / stride + 1, out_width = (line - kernel) / stride + 1;
#pragma omp parallel num_threads(threads) if (count * out_height * out_width > PARALLEL)
  {
    std::vector<float> copy(lines * line);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t y = 0; y < height; ++y)
        std::memcpy(copy.data() + (y + padding) * line + padding, image + (c * height + y) * width,
                    width * sizeof(float));
      const float* taps = weight + rows[c] * kernel * kernel;
      const float shift = bias ? bias[rows[c]] : 0.f;
      for (int64_t y = 0; y < out_height; ++y) {
        float* to = out + (c * out_height + y) * out_width;
        std::fill(to, to + out_width, shift);
        for (int64_t dy = 0; dy < kernel; ++dy)
          for (int64_t dx = 0; dx < kernel; ++dx) {
            const float w = taps[dy * kernel + dx];
            const float* from = copy.data() + (y * stride + dy) * line + dx;
            for (int64_t x = 0; x < out_width; ++x) to[x] += w * from[x * stride];
          }
        for (int64_t x = 0; x < out_width; ++x) to[x] = std::min(std::max(to[x], lowest), highest);
      }
    }
  }
}

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

int64_t out_pixels(int64_t height, int64_t width, int64_t kernel, int64_t stride, int64_t padding) {
  return ((height + 2 * padding - kernel) / stride + 1) * ((width + 2 * padding - kernel) / stride + 1);
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
    const int64_t out_height = (height + 2 * step.padding - step.kernel) / step.stride + 1;
    const int64_t out_width = (width + 2 * step.padding - step.kernel) / step.stride + 1;
    std::vector<float>& buffer = buffers[k % 2];
    if (!last) buffer.resize(std::max<size_t>(buffer.size(), count * out_height * out_width));
    float* to = last ? out : buffer.data();
    if (step.depthwise)
      convolve_depthwise(now, step.weight, bias, rows, to, count, height, width, step.kernel, step.stride,
                         step.padding, step.lowest, step.highest, threads);
    else
      convolve(now, step.weight, bias, rows, columns, last ? shortcut : nullptr, to, channels, height, width, count,
               step.columns, step.kernel, step.stride, step.padding, step.lowest, step.highest, threads);
    now = to, height = out_height, width = out_width;
  }
}

}  // namespace

extern "C" {

void gathered_conv(const float* images, const float* weight, const float* bias, const int64_t* rows,
                   const int64_t* columns, const float* added, float* out, int64_t batch, int64_t channels,
                   int64_t height, int64_t width, int64_t count, int64_t every, int64_t kernel, int64_t stride,
                   int64_t padding, float lowest, float highest, int64_t threads) {
  const int64_t step = channels * height * width, to = count * out_pixels(height, width, kernel, stride, padding);
  each_image(batch, threads, [&](int64_t i, int64_t share) {
    convolve(images + i * step, weight, bias, rows, columns, added ? added + i * to : nullptr, out + i * to, channels,
             height, width, count, every, kernel, stride, padding, lowest, highest, share);
  });
}

void gathered_depthwise(const float* images, const float* weight, const float* bias, const int64_t* rows, float* out,
                        int64_t batch, int64_t count, int64_t height, int64_t width, int64_t kernel, int64_t stride,
                        int64_t padding, float lowest, float highest, int64_t threads) {
  const int64_t step = count * height * width, to = count * out_pixels(height, width, kernel, stride, padding);
  each_image(batch, threads, [&](int64_t i, int64_t share) {
    convolve_depthwise(images + i * step, weight, bias, rows, out + i * to, count, height, width, kernel, stride,
                       padding, lowest, highest, share);
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
