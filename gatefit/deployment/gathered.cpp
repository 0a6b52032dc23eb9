// A convolution of one image with some of a weight's rows (output channels) and some of its columns (input
// channels). Rows and columns are read where they lie, so any mask costs what it opens and nothing is packed.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

typedef float Lanes __attribute__((vector_size(32), aligned(4)));
constexpr int LANES = 8;
constexpr int ROWS = 6;  // with two vectors of pixels each, what 16 registers hold
constexpr int64_t PARALLEL = 1 << 14;  // values worth sharing among threads

Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
Lanes splat(float s) { return Lanes{s, s, s, s, s, s, s, s}; }

// Input channel j, tap (y, x) of an output pixel stand at p + j * plane + y * line + x * step.
struct Walk {
  int64_t channels, plane, height, line, width, step;
};

template <int R>
void multiply(const float* p, const float* q, const Walk& walk, const float* const* rows, const int64_t* columns,
              Lanes (*sums)[2]) {
  Lanes a[R][2];
  for (int r = 0; r < R; ++r) a[r][0] = a[r][1] = splat(0.f);
  for (int64_t j = 0; j < walk.channels; ++j, p += walk.plane, q += walk.plane) {
    int64_t at = columns[j];
    for (int64_t y = 0; y < walk.height; ++y) {
      const float *left = p + y * walk.line, *right = q + y * walk.line;
      for (int64_t x = 0; x < walk.width; ++x, ++at, left += walk.step, right += walk.step) {
        const Lanes u = load(left), v = load(right);
        for (int r = 0; r < R; ++r) {
          const Lanes w = splat(rows[r][at]);
          a[r][0] += w * u;
          a[r][1] += w * v;
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) sums[r][0] = a[r][0], sums[r][1] = a[r][1];
}

using Multiply = void (*)(const float*, const float*, const Walk&, const float* const*, const int64_t*, Lanes (*)[2]);
const Multiply MULTIPLY[] = {nullptr,     multiply<1>, multiply<2>, multiply<3>,
                             multiply<4>, multiply<5>, multiply<6>};

}  // namespace

extern "C" {

// image (channels, height, width); weight (all, every, kernel, kernel) of which row rows[i] gives output channel i
// and column columns[j] reads input channel j; bias (all,) or null; added and out (count, out height, out width),
// added may be null.
void gathered_conv(const float* image, const float* weight, const float* bias, const int64_t* rows,
                   const int64_t* columns, const float* added, float* out, int64_t channels, int64_t height,
                   int64_t width, int64_t count, int64_t every, int64_t kernel, int64_t stride, int64_t padding,
                   int64_t relu, int64_t threads) {
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
        for (int64_t y = 0; y < out_height; ++y) {
          const int64_t source = y * stride - padding + t / kernel;
          if (source < 0 || source >= height) continue;
          const float* line = image + (c * height + source) * width;
          for (int64_t x = 0; x < out_width; ++x) {
            const int64_t column = x * stride - padding + t % kernel;
            if (column >= 0 && column < width) tap[y * out_width + x] = line[column];
          }
        }
      }
  }
  if (to.size() % 2) to.push_back(to.back()), from.push_back(from.back());
  const int64_t tiles = to.size() / 2, groups = (count + ROWS - 1) / ROWS;
  const auto run = [&](int64_t tile, int64_t group) {
    const int64_t begin = group * ROWS, some = std::min<int64_t>(ROWS, count - begin);
    const float* taken[ROWS];
    Lanes sums[ROWS][2];
    for (int64_t r = 0; r < some; ++r) taken[r] = weight + rows[begin + r] * every * taps;
    MULTIPLY[some](base + from[2 * tile], base + from[2 * tile + 1], walk, taken, offsets.data(), sums);
    for (int64_t r = 0; r < some; ++r) {
      const float shift = bias ? bias[rows[begin + r]] : 0.f;
      for (int half = 0; half < 2; ++half) {
        const int64_t first = to[2 * tile + half], live = std::min<int64_t>(LANES, pixels - first);
        const int64_t at = (begin + r) * pixels + first;
        for (int64_t i = 0; i < live; ++i) {
          const float value = sums[r][half][i] + shift + (added ? added[at + i] : 0.f);
          out[at + i] = relu ? std::max(value, 0.f) : value;
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

}  // extern "C"
